"""Every notebook that ships runs from a clean copy with its defaults, as somebody does who opens it and runs all cells.

What makes runs shares one home, so that each run is made once; what reads a finished study finds an invented one.
"""

import os
import subprocess
from pathlib import Path

import nbformat
import pytest
import synthetic_results
from nbclient import NotebookClient

from kdlib.study import profiles
from kdlib.study.parameters import AnalysisParameters
from kdlib.study.profiles import REPOSITORY

TOUR = "00_tour"


def analysis(name: str) -> bool:
    """Whether a notebook only reads results. One that is not known yet has to stand by itself."""
    known = profiles.notebooks()
    return name in known and issubclass(known[name][0], AnalysisParameters)


# In the order in which they need each other; the tour reads what others make.
SHIPPED = sorted((path.stem for path in (REPOSITORY / "notebooks").glob("*.ipynb")), key=lambda one: (one == TOUR, one))
executed: dict[str, nbformat.NotebookNode] = {}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The notebooks as git has them, and nothing else."""
    folder = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "notebooks"], capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [f"notebooks/{name}.ipynb" for name in SHIPPED]
    (folder / "notebooks").mkdir()
    for name in filter(None, names):
        (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def studied(tmp_path_factory) -> Path:
    """A home with the invented results of a finished study."""
    home = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        synthetic_results.write("smoke", grids=tuple(profiles.load("smoke").study.grids))
    return home


def execute(path: Path, home: Path) -> nbformat.NotebookNode:
    """Run all cells in the notebook's own folder; one that fails is an error that shows it."""
    notebook = nbformat.read(path, as_version=4)
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"KDLIB_HOME": str(home), "KDLIB_BATCH": "1", "PYTHONPATH": search}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    return client.execute(env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_it_runs_with_its_defaults(name, copy, studied):
    path = copy / "notebooks" / f"{name}.ipynb"
    assert path.is_file(), f"git does not know notebooks/{name}.ipynb: add it, or delete it"
    found = executed[name] = execute(path, studied if analysis(name) else copy)
    code = [cell for cell in found.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(code), "a notebook shows at least one picture"


def pictures(cells) -> list[dict]:
    """Bundles of outputs that hold a picture."""
    outputs = [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [one for one in outputs if "image/png" in one]


@pytest.mark.slow
def test_every_section_of_the_tour_has_a_picture_and_both_sliders_have_a_static_one():
    if TOUR not in executed:
        pytest.skip("the tour was not run")
    sections: list[list] = []
    for cell in executed[TOUR].cells:
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
def test_what_ran_left_the_copy_as_it_was(copy):
    for path in (copy / "notebooks").iterdir():
        assert path.read_bytes() == (REPOSITORY / "notebooks" / path.name).read_bytes()
    assert {path.name for path in copy.iterdir()} <= {"notebooks", "results"}


@pytest.mark.parametrize("name", [one for one in SHIPPED if one < "10"])
def test_code_is_narrow_enough_to_be_read(name):
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.split("\n")]
    assert [line for line in lines if len(line) > 110] == []


def test_git_has_every_notebook_that_is_executed_and_no_other():
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "notebooks"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {Path(name).stem for name in listed.stdout.split()} == set(SHIPPED)


def test_only_what_makes_runs_shares_its_home():
    assert [name for name in SHIPPED if not analysis(name)][-1] == TOUR
    assert not analysis("99_new")
