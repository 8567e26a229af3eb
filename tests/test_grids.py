"""The parameter of the one notebook of grids: what it may be, what it is by default, and what is kept under its name."""

from pathlib import Path

import pytest
import yaml

from kdlib.__main__ import main
from kdlib.errors import KdlibError
from kdlib.study import design, profiles, runner, store
from kdlib.study.profiles import REPOSITORY

CELLS = {"seeds": [1], "students": {"one": {}, "two": {"layers": 2}}}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes a variant of the smoke profile with these grids and returns its path."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    values = yaml.safe_load((REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))

    def write(*grids: str) -> str:
        values["study"]["grids"] = dict.fromkeys(grids, CELLS)
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**values, "name": "mine"}, sort_keys=False), encoding="utf-8")
        return str(path)

    return write


def test_a_profile_may_hold_a_grid_of_any_name(mine):
    assert list(profiles.load(mine("depths", "x2_y")).study.grids) == ["depths", "x2_y"]


@pytest.mark.parametrize("name", ["Depths", "2x", "a-b", "a b", "../a", "", "_a"])
def test_a_name_that_files_or_latex_cannot_take_is_refused(mine, name):
    with pytest.raises(KdlibError, match=r"grids.*should match pattern '\^\[a-z\]\[a-z0-9_\]\*\$'"):
        profiles.load(mine(name))


def test_all_is_the_name_of_no_grid(mine):
    with pytest.raises(KdlibError, match="must not be called all.*GRIDS=all"):
        profiles.load(mine("depths", "all"))


def test_the_first_grid_of_students_is_drawn_unless_another_is_named(mine):
    profile = mine("targets", "depths", "widths")
    assert profiles.parameters("21_grid", profile).grid == "depths"
    assert profiles.parameters("21_grid", profile, grid="widths").grid == "widths"


@pytest.mark.parametrize(
    ("grids", "asked", "known"),
    [(["depths", "widths"], "depth", "depths, widths"), (["targets", "depths"], "targets", "depths"), (["targets"], "", "none yet")],
)
def test_a_grid_that_the_profile_does_not_have_is_refused_with_those_it_has(mine, grids, asked, known):
    told = rf"`grid` must be one that profile .* names under study: grids \({known}\), got '{asked}'"
    changes = {"grid": asked} if asked else {}
    with pytest.raises(KdlibError, match=told):
        profiles.parameters("21_grid", mine(*grids), **changes)
    with pytest.raises(KdlibError, match=told):
        profiles.from_notebook("21_grid", {"profile": mine(*grids), "grid": asked})


def test_the_executed_notebook_is_called_by_its_grid(mine, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append((path.stem, output, values["grid"])) or 0)
    assert main(["run", "notebooks/21_grid.ipynb", "--profile", mine("depths", "widths"), "--set", "grid=widths"]) == 0
    folder = (tmp_path / "home" / "results" / "mine" / "executed").resolve()
    assert seen == [("21_grid", folder / "21_grid_widths.ipynb", "widths")]
    assert main(["run", "21_grid", "--profile", mine("depths"), "--set", "grid=widths"]) == 2 and len(seen) == 1


ENSEMBLES = {"seeds": [3, 4, 5, 6], "members": 2, "ensembles": {"together": {}, "alone": {"members": 1, "student": {"epochs": 4}}}}


@pytest.fixture
def with_grid(mine, tmp_path):
    """Writes a variant of the smoke profile with one grid, ``formed``."""

    def write(grid: dict) -> str:
        path = Path(mine("depths"))
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        values["study"]["grids"] = {"depths": CELLS, "formed": grid}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return str(path)

    return write


def test_ensembles_take_the_seeds_group_by_group_and_a_smaller_one_the_first_of_each(with_grid):
    found = design.cells(with_grid(ENSEMBLES | {"base": {"layers": 2}}), "formed")
    assert [one.parameters.seeds for one in found["together"]] == [[3, 4], [5, 6]]
    assert [one.parameters.seeds for one in found["alone"]] == [[3], [5]]
    members = [member.parameters for one in found["alone"] for name, member in one.inputs.items() if name.startswith("member")]
    assert [(one.seed, one.layers, one.epochs) for one in members] == [(3, 2, 4), (5, 2, 4)]


def test_the_order_of_members_is_kept_beside_the_results(with_grid):
    chained = {"seeds": [1, 2, 3, 4], "members": 4, "ensembles": {"chain": {"method": "chain"}}}
    profile = with_grid(chained)
    design.write(profile, ("formed",))
    (run,) = design.cells(profile, "formed")["chain"]
    made = {one.id: one for one in run.upstream()}
    assert [made[one].parameters.seed for one in store.formed(profile, "formed")[run.id]] == [1, 2, 3, 4]
    assert store.formed(profile, "depths") == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"members": 3}, r"seeds of a grid of ensembles must be a multiple of members \(3\), got 4"),
        ({"members": None}, "members and ensembles together"),
        ({"students": {"one": {}}}, "neither students nor vary"),
        ({"ensembles": {}}, "needs students, parameters to vary, or ensembles"),
        ({"seeds": [1, 1]}, r"seeds must be unique, got \[1, 1\]"),
        ({"ensembles": {"a": {"members": 3}}}, "members of a cell must be 1 to 2, those of the grid, got 3 in a"),
        ({"ensembles": {"a": {"seeds": [1]}}}, "must leave seeds to the grid, got it in a"),
    ],
)
def test_a_grid_of_ensembles_that_cannot_be_formed_is_refused(with_grid, change, told):
    with pytest.raises(KdlibError, match=told):
        profiles.load(with_grid(ENSEMBLES | change))


def test_growth_is_told_of_grids_of_ensembles_alone(with_grid):
    profile = with_grid(ENSEMBLES)
    assert profiles.parameters("14_growth", profile).grid == "formed"
    with pytest.raises(KdlibError, match=r"`grid` must be one of ensembles that profile .* names under study: grids \(formed\), got 'depths'"):
        profiles.parameters("14_growth", profile, grid="depths")
