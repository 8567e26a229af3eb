import json

import pytest

from kdlib.errors import KdlibError
from kdlib.study import plan, revisions

SOURCE = '''"""What the module is about."""

import math  # for pi


def area(radius):
    """Area of a circle."""
    # known for long
    return math.pi * radius**2


def label():
    return "# not a comment"
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "PACKAGE", tmp_path)
    monkeypatch.setattr(revisions, "RECORD", tmp_path / "revisions.json")
    monkeypatch.setattr(revisions, "MODULES", {"losses": "losses", "cache": "cache"})
    (tmp_path / "losses.py").write_text(SOURCE)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "reader.py").write_text("a = 1\n")
    revisions.code_version.cache_clear()
    yield tmp_path
    revisions.code_version.cache_clear()


def version(module: str) -> str:
    revisions.code_version.cache_clear()
    return revisions.code_version(module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("What the module is about.", "Something\nelse, in two lines."),
        ("Area of a circle.", "Better words."),
        ("# known for long", "# other words"),
        ("  # for pi", ""),
        ("\n\n\ndef label", "\n# new\n\ndef label"),
    ],
)
def test_comments_docstrings_and_blank_lines_are_not_code(package, old, new):
    before = revisions.code_hash("losses")
    assert old in SOURCE
    (package / "losses.py").write_text(SOURCE.replace(old, new))
    assert revisions.code_hash("losses") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("# not a comment", "# not a commend"),
        ("    return math", "    if radius:\n        return math"),
        ("def label", "def name"),
    ],
)
def test_every_other_edit_changes_the_hash(package, old, new):
    before = revisions.code_hash("losses")
    assert old in SOURCE
    (package / "losses.py").write_text(SOURCE.replace(old, new))
    assert revisions.code_hash("losses") != before


def test_code_on_the_line_of_a_docstring_is_code(package):
    (package / "losses.py").write_text('class Error(ValueError): "Wrong."\n')
    before = revisions.code_hash("losses")
    (package / "losses.py").write_text('class Error(KeyError): "Wrong."\n')
    assert revisions.code_hash("losses") != before


def test_a_package_counts_with_all_its_modules(package):
    before = revisions.code_hash("cache")
    (package / "cache" / "writer.py").write_text("b = 2\n")
    after = revisions.code_hash("cache")
    (package / "cache" / "writer.py").write_text("b = 3\n")
    assert len({before, after, revisions.code_hash("cache")}) == 3


def test_undeclared_code_stands_for_itself(package):
    undeclared = version("losses")
    assert undeclared == revisions.code_hash("losses")[:12]
    (package / "losses.py").write_text(SOURCE + "x = 1\n")
    assert version("losses") not in (undeclared, "r1")


def test_keep_says_same_results_and_bump_says_others(package):
    revisions.declare("keep", ["losses"])
    assert version("losses") == "r1"
    (package / "losses.py").write_text(SOURCE + "x = 1\n")
    assert version("losses") == revisions.code_hash("losses")[:12]
    revisions.declare("keep", ["losses"])
    assert version("losses") == "r1"
    (package / "losses.py").write_text(SOURCE + "x = 2\n")
    revisions.declare("bump", ["losses", "cache"])
    assert (version("losses"), version("cache")) == ("r2", "r1")


@pytest.mark.parametrize(("action", "modules"), [("keep", ["loses"]), ("drop", ["losses"]), ("bump", []), ("", [])])
def test_a_wrong_declaration_changes_nothing_and_names_the_modules(package, action, modules):
    revisions.declare("keep", ["losses"])
    before = json.loads(revisions.RECORD.read_text())
    with pytest.raises(KdlibError, match="Expected keep or bump and one or more of: losses, cache. Found:"):
        revisions.declare(action, modules)
    assert json.loads(revisions.RECORD.read_text()) == before


def test_every_module_that_shapes_a_run_can_be_declared():
    assert {module for modules in plan.CODE.values() for module in modules} <= set(revisions.MODULES)


@pytest.mark.parametrize("module", revisions.MODULES)
def test_every_edit_of_the_project_is_declared(module):
    revisions.code_version.cache_clear()
    told = f"Say what your edit was: python -m kdlib.study.revisions keep {module} (same results) or bump {module} (others)"
    assert revisions.code_version(module).startswith("r"), told
