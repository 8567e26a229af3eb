"""Every notebook that ships runs from a clean copy with its defaults, as somebody does who opens it and runs all cells.

What makes runs shares one home, so that each run is made once; what reads a finished study finds an invented one.
"""

from pathlib import Path

import nbformat
import opened
import pytest
from opened import SHIPPED, analysis

from kdlib.study.profiles import REPOSITORY

TOUR = "00_tour"
# In the order in which they need each other; the tour reads what others make.
PRODUCERS = sorted((name for name in SHIPPED if not analysis(name)), key=lambda one: (one == TOUR, one))
seen: dict[str, nbformat.NotebookNode] = {}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    return opened.clean_copy(tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def execute(copy):
    with opened.kernel(copy, copy.parent) as execute:
        yield execute


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCERS)
def test_what_makes_runs_runs_with_its_defaults(name, copy, execute):
    seen[name] = execute(opened.read(copy / f"{name}.ipynb"))
    all_of_it_ran(seen[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(SHIPPED) - set(PRODUCERS)))
def test_what_reads_results_runs_with_its_defaults(name, executed):
    path = executed / "notebooks" / f"{name}.ipynb"
    ran = [opened.read(one) for one in (executed / "executed").glob(f"{name}*.ipynb")]  # of a grid's, once for each
    found = [one for one in ran if sources(one) == sources(opened.read(path))]
    assert len(found) == 1, f"{len(found)} of {len(ran)} ran with the defaults"
    all_of_it_ran(found[0])


def sources(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells]


def all_of_it_ran(found: nbformat.NotebookNode) -> None:
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    first = code[0].execution_count  # not one, for the kernel ran others before
    assert [cell.execution_count for cell in code] == list(range(first, first + len(code)))
    assert pictures(code), "a notebook shows at least one picture"


def pictures(cells) -> list[dict]:
    """Bundles of outputs that hold a picture."""
    outputs = [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [one for one in outputs if "image/png" in one]


@pytest.mark.slow
def test_every_section_of_the_tour_has_a_picture_and_both_sliders_have_a_static_one():
    if TOUR not in seen:
        pytest.skip("the tour was not run")
    sections: list[list] = []
    for cell in seen[TOUR].cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            sections.append([cell])
        elif sections:
            sections[-1].append(cell)
    *sections, onwards = sections
    assert "Where to go next" in onwards[0].source and len(onwards) == 1
    assert [cells[0].source.split("\n")[0] for cells in sections if not pictures(cells)] == []
    widget = "application/vnd.jupyter.widget-view+json"
    assert sum(widget in one for cells in sections for one in pictures(cells)) == 2


@pytest.mark.slow
def test_what_ran_left_its_copy_as_it_was(copy, executed):
    for path in (*copy.iterdir(), *(executed / "notebooks").iterdir()):
        assert path.read_bytes() == (REPOSITORY / "notebooks" / path.name).read_bytes()
    assert {path.name for path in copy.parent.iterdir()} <= {"notebooks", "results"}


@pytest.mark.parametrize("name", SHIPPED)
def test_code_is_narrow_enough_to_be_read(name):
    cells = opened.read(REPOSITORY / "notebooks" / f"{name}.ipynb").cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.split("\n")]
    assert [line for line in lines if len(line) > 110] == []


def test_git_has_every_notebook_that_is_executed_and_no_other():
    if opened.listed() is None:
        pytest.skip("not a git checkout")
    assert opened.listed() == set(SHIPPED)


def test_a_notebook_that_is_not_known_has_to_stand_by_itself():
    assert PRODUCERS[-1] == TOUR
    assert not analysis("99_new")
