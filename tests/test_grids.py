"""The parameter of the one notebook of grids: what it may be, what it is by default, and what is kept under its name."""

import pytest
import yaml

from kdlib.__main__ import main
from kdlib.errors import KdlibError
from kdlib.study import profiles, runner
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
