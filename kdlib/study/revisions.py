"""Which version of the code made a run, as part of its run id.

Every kind of run has a *revision* in ``revisions.json``, beside the hash of all code that its producer imports
(:mod:`kdlib.study.closure`). While the code has that hash, the revision stands for it in run ids. Code that was edited
stands for itself by its hash, so an edit always makes new runs, until it is declared::

    kdlib revisions               # which kinds of run the edits concern
    kdlib revisions keep          # same results: old runs stay valid; proved first, or refused
    kdlib revisions bump student  # other results: every run of the kind is made anew
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kdlib.errors import KdlibError
from kdlib.study.closure import closure, code_hash
from kdlib.study.kinds import kinds

RECORD = Path(__file__).with_name("revisions.json")


@cache
def current(kind: str) -> str:
    """SHA-256 of the code behind a kind of run, as it is now."""
    return code_hash(closure(f"kdlib.runs.{kind}"))


@cache
def record() -> dict[str, dict]:
    """The declared revision and hash of every kind of run."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


@cache
def code_version(kind: str) -> str:
    """``r<revision>`` while the code behind the kind is as declared, else the first 12 digits of its hash."""
    declared = record().get(kind, {})
    return f"r{declared['revision']}" if declared.get("sha256") == current(kind) else current(kind)[:12]


def undeclared() -> list[str]:
    """The kinds of run whose code was edited since it was declared."""
    return [kind for kind in kinds() if record().get(kind, {}).get("sha256") != current(kind)]


def keep(names: Sequence[str] = ()) -> list[str]:
    """Declare that the edits change no result, of these kinds or of all; returns the kinds.

    Raises:
        KdlibError: the code as last declared and the code as it is do not agree, see :mod:`kdlib.study.proof`.
    """
    from kdlib.study import proof

    chosen = _chosen(names or undeclared())
    if any(kind in record() for kind in chosen):
        proof.require_same_results()
    _declare({kind: max(1, record().get(kind, {}).get("revision", 0)) for kind in chosen})
    return chosen


def bump(names: Sequence[str]) -> list[str]:
    """Declare that the edits change results of these kinds: runs of them are made anew."""
    chosen = _chosen(names)
    _declare({kind: record().get(kind, {}).get("revision", 0) + 1 for kind in chosen})
    return chosen


def _chosen(names: Sequence[str]) -> list[str]:
    if unknown := [name for name in names if name not in kinds()]:
        raise KdlibError(f"kinds of run must be among {', '.join(kinds())}, got {', '.join(unknown)}.")
    return list(names)


def _declare(revisions: dict[str, int]) -> None:
    found = record() | {kind: {"revision": number, "sha256": current(kind)} for kind, number in revisions.items()}
    RECORD.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    record.cache_clear()
    code_version.cache_clear()
