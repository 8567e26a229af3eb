"""What several test modules share."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import synthetic_results
from nbclient import NotebookClient

from kdlib.analysis import outputs
from kdlib.data import sources
from kdlib.study import profiles
from kdlib.study.profiles import REPOSITORY


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
def analysed(tmp_path_factory) -> Path:
    """A results home in which every analysis notebook has read the synthetic results of the smoke profile, once for each grid."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        grids = tuple(profiles.load("smoke").study.grids)
        synthetic_results.write("smoke", grids=grids)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_execute, outputs.analyses(grids).values()))
    return home


def _execute(analysis: outputs.Analysis) -> None:
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{analysis.notebook}.ipynb", as_version=4)
    if analysis.notebook == outputs.GRID_NOTEBOOK:
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"grid = {analysis.grid!r}"))  # as papermill does
    check = 'import sys\nassert not {"torch", "transformers"} & set(sys.modules)'
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(env=dict(os.environ))


@pytest.fixture
def home(analysed, monkeypatch) -> Path:
    """The analysed results as the home of everything the test writes; for reading only."""
    monkeypatch.setenv("KDLIB_HOME", str(analysed))
    return analysed
