"""What several test modules share."""

import fcntl
import gc
import shutil
from pathlib import Path

import nbformat
import opened
import pytest
import synthetic_results

from kdlib.analysis import outputs
from kdlib.data import sources
from kdlib.study import notebooks, profiles

# Modules that take minutes, longest first; see below.
LONG = ("test_pipeline", "test_every_notebook", "test_contributing", "test_cache", "test_training", "test_corpus", "test_command")


def pytest_collection_modifyitems(items):
    """Begin with the longest modules: a worker that began one of them last would be waited for."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="module")
def one_thread():
    """Models this small only lose time by sharing their work among threads."""
    import torch  # not at the top: some tests prove that they do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory):
    import tiny_study  # which imports torch

    home = tmp_path_factory.mktemp("tiny")
    return home, *tiny_study.write(home)


@pytest.fixture(scope="module")
def profile(_tiny):
    """Path of a profile like smoke: one domain of few words, which is easy, and one of many. What is made stays."""
    home, path, domains = _tiny
    catalogue = sources.catalogue() | domains
    # Every run collects garbage, and would walk all that the libraries brought along each time.
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        patch.setattr(sources, "catalogue", lambda: catalogue)
        yield path
    gc.unfreeze()


@pytest.fixture(scope="session")
def executed(request, tmp_path_factory) -> Path:
    """A folder that all workers share: a clean copy of the notebooks, in which every analysis has read, once for each grid,
    the synthetic results of the smoke profile in ``home``, and these notebooks as they were ``executed``."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "analysed"
    # The first worker makes it while the others wait.
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "executed").is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            found = _analyse(opened.clean_copy(folder), folder / "home")
            (folder / "executed").mkdir()
            for name, notebook in found.items():
                nbformat.write(notebook, folder / "executed" / f"{name}.ipynb")
    return folder


def _analyse(copied: Path, home: Path) -> dict[str, nbformat.NotebookNode]:
    """What every analysis shows, by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        grids = tuple(profiles.load("smoke").study.grids)
        synthetic_results.write("smoke", grids=grids)
    with opened.kernel(copied, home) as execute:
        return {name: _execute(execute, copied, analysis) for name, analysis in outputs.analyses(grids).items()}


def _execute(execute, copied: Path, analysis: outputs.Analysis) -> nbformat.NotebookNode:
    path = copied / f"{analysis.notebook}.ipynb"
    notebook = opened.read(path)
    if analysis.grid != notebooks.declared(path).get("grid", analysis.grid):
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"grid = {analysis.grid!r}"))  # as papermill does
    check = 'import sys\nassert not {"torch", "transformers"} & set(sys.modules)'
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    execute(notebook).cells.pop()
    return notebook


@pytest.fixture(scope="session")
def analysed(executed) -> Path:
    """A results home in which every analysis notebook has read the synthetic results of the smoke profile."""
    return executed / "home"


@pytest.fixture
def home(analysed, monkeypatch) -> Path:
    """The analysed results as the home of everything the test writes; for reading only."""
    monkeypatch.setenv("KDLIB_HOME", str(analysed))
    return analysed
