"""Profiles: complete studies, and the parameters that each gives its notebooks.

A *profile* (``profiles/<name>.yaml``) is one complete study: what text, which teacher, how targets are kept, what students
look like, and which runs make up the comparison. Each of its sections is exactly the parameter list of one producer
notebook, so a notebook run with ``--profile quick`` and one run by hand with the same values are the same run.
"""

import difflib
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model, model_validator

from kdlib.errors import KdlibError
from kdlib.study.kinds import kinds
from kdlib.study.parameters import (
    Adaptation,
    AnalysisParameters,
    GridParameters,
    GrowthParameters,
    Parameters,
    Pool,
    Seeds,
    TourParameters,
)

REPOSITORY = Path(__file__).resolve().parents[2]
GridName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
# Notebooks whose globals held parameters alone when they were first looked at in this process.
_seen: set[str] = set()


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: in YAML 1.1 the name ``on``, as in ``features: {on: relation}``, would be one."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":bool")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(text: str) -> Any:
    """The values in a profile's file, or of a setting on the command line.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, _Loader)


class Grid(BaseModel):
    """A study of students, or of ensembles: cells that differ in one respect, each with the same seeds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: Seeds = Field(min_length=1, description="one student a cell and seed; of ensembles one a member")
    members: PositiveInt | None = Field(
        None, description="cells are ensembles of so many members, formed from the seeds group by group; None: they are students"
    )
    base: dict[str, Any] = Field({}, description="what sets all students apart from the section")
    students: dict[str, dict[str, Any]] = Field(
        {}, description="name of a cell: what sets its students apart; others are compared with the first"
    )
    vary: dict[str, list[Any]] = Field({}, description="parameter: values; every combination is a further cell")
    ensembles: dict[str, dict[str, Any]] = Field(
        {},
        description="name of a cell: parameters of 05_ensemble, such as {method: bagging, options: {share: 0.7}}; with {members: 1} it "
        "has another number of them",
    )

    @model_validator(mode="after")
    def _has_cells(self):
        if not self.cells:
            raise ValueError("a grid needs students, parameters to vary, or ensembles")
        if bool(self.members) != bool(self.ensembles) or (self.ensembles and (self.students or self.vary)):
            raise ValueError("a grid needs members and ensembles together, and then neither students nor vary")
        return self

    @model_validator(mode="after")
    def _seeds_fill_the_ensembles(self):
        if self.members and len(self.seeds) % self.members:
            raise ValueError(f"seeds of a grid of ensembles must be a multiple of members ({self.members}), got {len(self.seeds)}")
        for name, changes in self.ensembles.items():
            if unknown := {"seeds", "profile"} & set(changes):
                raise ValueError(f"ensembles of a grid must leave {', '.join(sorted(unknown))} to the grid, got it in {name}")
            if not 1 <= (size := changes.get("members", 1)) <= self.members:
                raise ValueError(f"members of a cell must be 1 to {self.members}, those of the grid, got {size} in {name}")
        return self

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """The settings of every cell, by its name."""
        if self.ensembles:
            return {name: {**changes, "student": {**self.base, **changes.get("student", {})}} for name, changes in self.ensembles.items()}
        found = dict(self.students)
        for values in product(*self.vary.values()) if self.vary else ():
            changes = dict(zip(self.vary, values, strict=True))
            found[", ".join(f"{name} {value}" for name, value in changes.items())] = changes
        return {name: {**self.base, **changes} for name, changes in found.items()}


class Study(BaseModel):
    """Which runs make up the profile's comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teachers: list[Adaptation] = Field(min_length=1, description="teachers made and evaluated")
    objectives: list[Literal["ce", "kd", "online_kd"]] = Field(min_length=1, description="objectives compared")
    pools: list[Pool] = Field(min_length=1, description="ways of pooling compared")
    members: int = Field(ge=1, description="members of one ensemble")
    repeats: int = Field(
        ge=1, description="independent ensembles of each kind; single models have members x repeats seeds"
    )
    methods: dict[str, dict[str, Any]] = Field(
        {},
        description="further ways to form an ensemble: the name in tables, and options of the method of that name, or of another "
        "as in {method: bagging, share: 0.6}",
    )
    grids: dict[GridName, Grid] = Field({}, description="further studies, each made when it is asked for by name")

    @model_validator(mode="after")
    def _all_is_no_grid(self):
        if "all" in self.grids:
            raise ValueError("a grid must not be called all, which stands for every one in GRIDS=all; give it another name")
        return self

    @model_validator(mode="after")
    def _paper_has_what_it_shows(self):
        if not {"ce", "kd"} <= set(self.objectives) or "probability" not in self.pools:
            raise ValueError(
                f"objectives must include ce and kd, and pools probability, for the paper's comparison, got {self.objectives} and "
                f"{self.pools}; add what is missing"
            )
        return self


class Profile(BaseModel):
    """One study: a section per kind of run, and the comparison they are made for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str
    study: Study
    sources: dict[str, Any] = Field(
        {}, description="sources of this profile alone, written as in sources.yaml; a relative path starts at the profile's file"
    )

    @model_validator(mode="after")
    def _teachers_agree(self):
        named = [self.teacher.adaptation, self.targets.teacher, self.student.teacher]
        taught = {one for one in named if isinstance(one, str) and one in get_args(Adaptation)}
        if len(taught) > 1 or not taught <= set(self.study.teachers):
            raise ValueError(
                "teacher.adaptation, targets.teacher and student.teacher must name one teacher that study.teachers holds, got "
                f"{', '.join(map(str, named))} and {self.study.teachers}; write the same adaptation in all of them"
            )
        return self

    @model_validator(mode="after")
    def _students_share_what_they_read(self):
        dense = self.student.targets.get("source", self.targets.source) == "dense"
        if self.student.fresh_draws or dense:
            raise ValueError(
                "students of a comparison must share one run of targets, got fresh_draws or targets of source dense; set these in a "
                "grid (study: grids)"
            )
        return self


@cache
def profile_model() -> type[Profile]:
    """:class:`Profile` with a section for each kind of run; one whose parameters all have defaults may be left out."""
    sections: dict[str, Any] = {}
    for name, kind in kinds().items():
        needed = any(entry.is_required() for field, entry in kind.Parameters.model_fields.items() if field != "profile")
        sections[name] = (kind.Parameters, ...) if needed else (kind.Parameters | None, None)
    return create_model("Profile", __base__=Profile, **sections)


@cache
def notebooks() -> dict[str, tuple[type[Parameters], str]]:
    """Each notebook's parameters and the profile section that fills them, in the order of their numbers.

    Those numbered 10 and up are analyses; which of them a paper is drawn from is told in :mod:`kdlib.analysis.outputs`.
    """
    analyses = [path.stem for path in (REPOSITORY / "notebooks").glob("[1-9][0-9]_*.ipynb")]
    found = {kind.NOTEBOOK: (kind.Parameters, name) for name, kind in kinds().items()}
    found |= {"00_tour": (TourParameters, "tour")} | dict.fromkeys(analyses, (AnalysisParameters, "analysis"))
    found |= {"21_grid": (GridParameters, "analysis"), "14_growth": (GrowthParameters, "analysis")}
    return dict(sorted(found.items()))


def available() -> list[str]:
    """Names of the profiles that ship with the project."""
    return sorted(path.stem for path in (REPOSITORY / "profiles").glob("*.yaml") if path.stem != "sources")


def load(name: str) -> Profile:
    """The profile called ``name`` (or in the .yaml file ``name``), checked.

    Raises:
        KdlibError: no such profile, another one's name, not YAML, or a section with an unknown name or a value out of range.
    """
    given = name.endswith((".yaml", ".yml"))
    path = Path(name).resolve() if given else REPOSITORY / "profiles" / f"{name}.yaml"
    if not (path.is_file() if given else name in available()):
        raise KdlibError(
            f"Unknown profile {name!r}. Expected one of {', '.join(available())}, or the path of a .yaml file."
        )
    if given and path.stem in available() and path != (REPOSITORY / "profiles" / f"{path.stem}.yaml").resolve():
        raise KdlibError(
            f"A profile of your own must not be called {', '.join(available())}, since its name is its folder of results, got {path}. "
            "Rename it."
        )
    return _loaded(name, path, path.stat().st_mtime_ns)


@lru_cache
def _loaded(name: str, path: Path, modified: int) -> Profile:
    # Planning a study asks for its profile once a run and parameter; `modified` has an edited file read again.
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise KdlibError(f"Profile {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise KdlibError(f"Profile {path} must hold a mapping of the sections {', '.join(profile_model().model_fields)}.")
    for section in kinds():
        if isinstance(values.get(section), dict):
            values[section] = {"profile": name, **values[section]}
    for source in (values.get("sources") or {}).values():
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source["path"] = str(path.parent / Path(source["path"]).expanduser())
    found = _validated(profile_model(), values, f"profile {name!r}")
    if found.name != path.stem:
        raise KdlibError(
            f"Profile {path} calls itself {found.name!r}, but its results are kept under {path.stem!r}. Give both one name."
        )
    return found


def parameters(notebook: str, profile: str, /, **changes: Any) -> Parameters:
    """The checked parameters of ``notebook``: its section of ``profile`` with ``changes`` on top.

    Where ``changes`` ask for another objective, what the section sets for its own and this one cannot use is left out.

    Raises:
        KdlibError: unknown notebook, profile or parameter, or a value out of range.
    """
    if notebook not in notebooks():
        raise KdlibError(f"notebook must be one of {', '.join(notebooks())}, got {notebook!r}.")
    model, section = notebooks()[notebook]
    base = getattr(load(profile), section, None)
    _refuse_unknown(model, changes, notebook)
    values = {"profile": profile} if base is None else model.usable(base.model_dump(), changes)
    if issubclass(model, GridParameters):
        values["grid"] = next(iter(_grids_for(model, profile)), "")
    return _with_known_grid(_validated(model, {**values, **changes}, f"notebook {notebook}"))


def from_notebook(notebook: str, namespace: dict[str, Any]) -> Parameters:
    """The checked parameters found among a notebook's globals, called in the cell after the parameters cell.

    papermill adds a misspelt parameter as a new global without complaint, so plain-valued globals that the notebook does
    not declare are refused too. Once in a process: when its cells are run again, their own results are among the globals.
    """
    model, _ = notebooks()[notebook]
    ours = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in {"In", "Out"}
        and (value is None or isinstance(value, str | bool | int | float | list | dict | tuple))
    }
    if notebook not in _seen:
        _refuse_unknown(model, ours, notebook)
        _seen.add(notebook)
    declared = {name: value for name, value in ours.items() if name in model.model_fields}
    checked = _validated(model, declared, f"notebook {notebook}")
    load(checked.profile)
    return _with_known_grid(checked)


def _grids_for(model: type[GridParameters], profile: str) -> list[str]:
    ensembles = model is GrowthParameters
    return [name for name, grid in load(profile).study.grids.items() if name != "targets" and (grid.members or not ensembles)]


def _with_known_grid(checked: Parameters) -> Parameters:
    if isinstance(checked, GridParameters) and checked.grid not in (known := _grids_for(type(checked), checked.profile)):
        of = "of ensembles " if isinstance(checked, GrowthParameters) else ""
        raise KdlibError(
            f"`grid` must be one {of}that profile {checked.profile!r} names under study: grids ({', '.join(known) or 'none yet'}), "
            f"got {checked.grid!r}. The grid targets is drawn by 11_target_fidelity."
        )
    return checked


def _refuse_unknown(model: type[BaseModel], values: dict, where: str) -> None:
    for name in values:
        if name not in model.model_fields:
            close = difflib.get_close_matches(name, model.model_fields, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise KdlibError(f"Unknown parameter {name!r} of {where}.{hint} Allowed: {', '.join(model.model_fields)}.")


def _validated(model: type[BaseModel], values: dict, where: str):
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            # Of a number that may be a schedule, pydantic also names which of the two it was taken for.
            named = [part for at, part in enumerate(problem["loc"]) if at == 0 or part not in ("number", "schedule")]
            place = ".".join(map(str, named)) or "settings"
            # Our own validators say what they found; their input would be the whole section, or the whole profile.
            found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
            told = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden" and (names := _names_at(model, problem["loc"][:-1])):
                told = f"must be one of {', '.join(names)}"
            problems.append(f"{place}: {told}{found}")
        raise KdlibError(f"Bad {where}. " + "; ".join(problems) + ".") from None


def _names_at(model: type[BaseModel], place: Sequence[str | int]) -> list[str]:
    """The settings that there are in a nested one; none where it has no names of its own."""
    for part in place:
        if part in model.model_fields:
            waiting, found = [model.model_fields[part].annotation], []
            while waiting:
                one = waiting.pop()
                waiting += get_args(one)
                found += [one] if isinstance(one, type) and issubclass(one, BaseModel) else []
            if not found:
                return []
            model = found[0]
    return list(model.model_fields)
