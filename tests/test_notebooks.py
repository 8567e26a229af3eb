import json

import fake_notebooks
import pytest

from kdlib.errors import KdlibError
from kdlib.study import notebooks
from kdlib.study.profiles import REPOSITORY


def test_saving_in_jupyter_leaves_the_code_hash(tmp_path):
    path = fake_notebooks.write(tmp_path / "10_objectives.ipynb", "a = 1", "print(a)\nprint(2)")
    before = notebooks.code_hash(path)
    fake_notebooks.save_as_jupyter_does(path)
    assert notebooks.code_hash(path) == before


def test_text_cells_are_not_code(tmp_path):
    path = fake_notebooks.write(tmp_path / "a.ipynb", "a = 1")
    before = notebooks.code_hash(path)
    notebook = json.loads(path.read_text())
    notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": "# New"})
    path.write_text(json.dumps(notebook))
    assert notebooks.code_hash(path) == before


@pytest.mark.parametrize(
    "sources", [("a = 2", "print(a)"), ("a = 1", "print(a) "), ("print(a)", "a = 1"), ("a = 1print(a)",)]
)
def test_any_change_of_code_changes_the_hash(tmp_path, sources):
    before = notebooks.code_hash(fake_notebooks.write(tmp_path / "a.ipynb", "a = 1", "print(a)"))
    assert notebooks.code_hash(fake_notebooks.write(tmp_path / "b.ipynb", *sources)) != before


def test_a_notebook_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    mine = fake_notebooks.write(tmp_path / "notebooks" / "04_student.ipynb", "seed = 1")
    shipped = (REPOSITORY / "notebooks" / "04_student.ipynb").resolve()
    assert notebooks.find("04_student") == shipped
    assert notebooks.find("notebooks/04_student.ipynb") == shipped
    monkeypatch.chdir(tmp_path)
    assert notebooks.find("notebooks/04_student.ipynb") == mine.resolve()


def test_an_unknown_notebook_is_refused_with_the_known_ones():
    with pytest.raises(KdlibError, match="notebook must be one of .*notebooks/04_student.ipynb, .*got 'notebooks/04_studnet.ipynb'"):
        notebooks.find("notebooks/04_studnet.ipynb")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"cells": [{}]}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "04_student.ipynb"
    path.write_text(content)
    with pytest.raises(KdlibError, match="04_student.ipynb cannot be read as a notebook"):
        notebooks.cells(path)


def test_declared_parameters_are_literals(tmp_path):
    path = fake_notebooks.write(tmp_path / "a.ipynb", "seed = 1\nseeds = [1, 2]  # why\nrate = -1e-3", "other = 5")
    assert notebooks.declared(path) == {"seed": 1, "seeds": [1, 2], "rate": -1e-3}


@pytest.mark.parametrize("source", ["seed = 1 + n", "a, b = 1, 2", "import os", "a = b = 1", "a: int = 1"])
def test_a_derived_value_among_the_parameters_is_refused(tmp_path, source):
    path = fake_notebooks.write(tmp_path / "a.ipynb", source)
    with pytest.raises(KdlibError, match="expected only lines like 'name = literal'"):
        notebooks.declared(path)


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    path = fake_notebooks.write(tmp_path / "a.ipynb", "seed = 1")
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["metadata"] = {}
    path.write_text(json.dumps(notebook))
    with pytest.raises(KdlibError, match="has 0 cells tagged 'parameters'"):
        notebooks.declared(path)
