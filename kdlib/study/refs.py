"""How a setting names another run: as the teacher to learn from, the model that scores a text, a member of an ensemble.

A *reference* is one of

- ``full`` (or ``frozen``, ``lora``, ``scratch``): the profile's teacher with this adaptation,
- ``{student: {objective: ce, seed: 1}}``: a run of that kind, by what sets it apart from the profile's section,
- ``student-0123456789ab``: the run with this id,
- a folder or .gguf file, or a hub id with its revision: a checkpoint, read as a teacher that is not trained further,
- a list of references: the probability pool of their models.

:meth:`kdlib.study.plan.Planner.resolve` finds the run.
"""

import re
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator

from kdlib.study.kinds import kinds
from kdlib.study.parameters import Adaptation

RUN_ID = re.compile(r"[a-z]+-[0-9a-f]{12}")


def _checked(reference: str | list | dict) -> str | list | dict:
    if isinstance(reference, str):
        path = Path(reference).expanduser()
        named = reference in get_args(Adaptation) or RUN_ID.fullmatch(reference) or "@" in reference
        if not named and not path.exists():
            raise ValueError(
                f"a run must be one of {', '.join(get_args(Adaptation))}, a run id, {{kind: settings}}, a path that exists or "
                f"a hub id with @revision, got {reference!r}"
            )
        return reference if named else str(path.resolve())
    if isinstance(reference, list):
        if not reference:
            raise ValueError("a pool of runs must have at least one, got an empty list")
        return [_checked(one) for one in reference]
    if len(reference) != 1 or not set(reference) <= set(kinds()):
        raise ValueError(f"a run in words must be {{kind: settings}} with a kind of {', '.join(kinds())}, got {reference}")
    ((kind, settings),) = reference.items()
    if not isinstance(settings, dict):
        raise ValueError(f"the settings of a {kind} must be a mapping, got {settings!r}")
    return reference


Ref = Annotated[str | list[Any] | dict[str, Any], AfterValidator(_checked)]
