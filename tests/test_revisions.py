import json
import math
import subprocess
from types import SimpleNamespace

import pytest

from kdlib.__main__ import main
from kdlib.errors import KdlibError
from kdlib.study import closure, proof, revisions
from kdlib.study.kinds import kinds

SOURCE = '''"""What the module is about."""

import math  # for pi


def area(radius):
    """Area of a circle."""
    # known for long
    return math.pi * radius**2


def label():
    return "# not a comment"
'''


CACHES = closure._imports, revisions.current, revisions.record, revisions.code_version


def forget():
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two kinds of run, none of them declared: a student, which imports losses, and a corpus."""
    monkeypatch.setattr(closure, "PACKAGE", tmp_path)
    monkeypatch.setattr(revisions, "RECORD", tmp_path / "revisions.json")
    found = {"corpus": SimpleNamespace(), "student": SimpleNamespace()}
    monkeypatch.setattr(revisions, "kinds", lambda: found)
    for name in ("runs", "losses"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "losses" / "area.py").write_text(SOURCE)
    (tmp_path / "runs" / "student.py").write_text("def produce():\n    from kdlib.losses.area import area\n    return area(1)\n")
    (tmp_path / "runs" / "corpus.py").write_text("a = 1\n")
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.fixture
def agrees(monkeypatch):
    """The small study agrees; holds how often it was made."""
    made = []
    monkeypatch.setattr(proof, "require_same_results", lambda: made.append(1))
    return made


def edit(package, source):
    (package / "losses" / "area.py").write_text(source)
    forget()


def version(kind: str) -> str:
    forget()
    return revisions.code_version(kind)


def hashed(package) -> str:
    return closure.code_hash(["kdlib.losses.area"])


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
    before = hashed(package)
    assert old in SOURCE
    (package / "losses" / "area.py").write_text(SOURCE.replace(old, new))
    assert hashed(package) == before


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
    before = hashed(package)
    assert old in SOURCE
    (package / "losses" / "area.py").write_text(SOURCE.replace(old, new))
    assert hashed(package) != before


def test_code_on_the_line_of_a_docstring_is_code(package):
    (package / "losses" / "area.py").write_text('class Error(ValueError): "Wrong."\n')
    before = hashed(package)
    (package / "losses" / "area.py").write_text('class Error(KeyError): "Wrong."\n')
    assert hashed(package) != before


def test_a_kind_counts_with_all_that_it_imports_wherever_it_does(package):
    assert closure.closure("kdlib.runs.student") == ["kdlib.losses", "kdlib.losses.area", "kdlib.runs", "kdlib.runs.student"]
    before = revisions.current("student"), revisions.current("corpus")
    edit(package, SOURCE + "x = 1\n")
    assert revisions.current("student") != before[0] and revisions.current("corpus") == before[1]
    (package / "losses" / "other.py").write_text("b = 2\n")
    other = revisions.current("student")
    forget()
    assert revisions.current("student") == other, "nobody imports it"
    (package / "losses" / "__init__.py").write_text("from kdlib.losses import other\n")
    forget()
    assert "kdlib.losses.other" in closure.closure("kdlib.runs.student") and revisions.current("student") != other


@pytest.mark.parametrize(
    ("line", "imported"),
    [
        ("import kdlib.losses.area", True),
        ("from kdlib.losses import area", True),
        ("from kdlib.losses.area import label as name", True),
        ("try:\n    from kdlib.losses.area import area\nexcept ImportError:\n    pass", True),
        ("class A:\n    def b(self):\n        import kdlib.losses.area as c", True),
        ("if a:\n    pass\nelif b:\n    pass\nelse:\n    import kdlib.losses.area", True),
        ("match a:\n    case 1:\n        with b:\n            import kdlib.losses.area", True),
        ("try:\n    pass\nexcept ImportError:\n    import kdlib.losses.area", True),
        ("for a in b:\n    pass\nelse:\n    try:\n        pass\n    finally:\n        import kdlib.losses.area", True),
        ("import losses.area", False),
        ("'from kdlib.losses import area'", False),
    ],
)
def test_every_form_of_an_import_is_found(package, line, imported):
    (package / "runs" / "corpus.py").write_text(line + "\n")
    forget()
    assert ("kdlib.losses.area" in closure.closure("kdlib.runs.corpus")) is imported


def test_where_code_stands_is_part_of_what_it_is(package):
    (package / "losses" / "other.py").write_text("b = 2\n")
    (package / "losses" / "third.py").write_text("b = 2\n")
    assert closure.code_hash(["kdlib.losses.other"]) != closure.code_hash(["kdlib.losses.third"])
    both = closure.code_hash(["kdlib.losses.other", "kdlib.losses.third"])
    assert both == closure.code_hash(["kdlib.losses.third", "kdlib.losses.other"])


def test_undeclared_code_stands_for_itself(package):
    undeclared = version("student")
    assert undeclared == revisions.current("student")[:12] and revisions.undeclared() == ["corpus", "student"]
    edit(package, SOURCE + "x = 1\n")
    assert version("student") not in (undeclared, "r1")


def test_keep_says_same_results_and_bump_says_others(package, agrees):
    assert revisions.keep() == ["corpus", "student"]
    assert (version("student"), version("corpus")) == ("r1", "r1") and agrees == [], "nothing was declared to compare with"
    assert revisions.keep() == [] and agrees == []
    edit(package, SOURCE + "x = 1\n")
    assert version("student") == revisions.current("student")[:12] and revisions.undeclared() == ["student"]
    assert revisions.keep() == ["student"] and agrees == [1]
    assert (version("student"), version("corpus")) == ("r1", "r1")
    edit(package, SOURCE + "x = 2\n")
    assert revisions.bump(["student"]) == ["student"] and agrees == [1], "another revision needs no proof"
    assert (version("student"), version("corpus")) == ("r2", "r1") and revisions.undeclared() == []


def test_keep_is_refused_where_the_two_studies_differ_and_nothing_is_declared(package, monkeypatch, capsys):
    revisions.bump(["corpus", "student"])
    edit(package, SOURCE + "x = 1\n")
    before = revisions.RECORD.read_bytes()
    made = []

    def results(tree, home):
        made.append((tree.name, home.name))
        return {"student kd seed 1": {"evaluation": {"test": {"nll": 4.5 if home.name == "before" else 4.6}}}}

    monkeypatch.setattr(proof, "_export", lambda folder: "0123456789abcdef")
    monkeypatch.setattr(proof, "_edit", lambda declared, folder: None)
    monkeypatch.setattr(proof, "_results", results)
    told = "must agree to keep a revision, got 1 differences: student kd seed 1, evaluation, test, nll: 4.5 became 4.6"
    with pytest.raises(KdlibError, match=f"{told}.*kdlib revisions bump KIND"):
        revisions.keep()
    assert made == [("declared", "before"), ("edited", "after")]
    assert revisions.RECORD.read_bytes() == before and version("student") == revisions.current("student")[:12]
    monkeypatch.setattr(proof, "_results", lambda tree, home: {"student kd seed 1": {"nll": 4.5, "seconds": len(home.name)}})
    assert revisions.keep() == ["student"] and version("student") == "r1"
    assert "comparing the working tree with commit 0123456789ab" in capsys.readouterr().err


@pytest.mark.parametrize("declare", [revisions.keep, revisions.bump])
def test_a_kind_that_is_not_there_is_refused_and_the_known_ones_are_named(package, agrees, declare):
    revisions.bump(["student"])
    before = revisions.RECORD.read_bytes()
    with pytest.raises(KdlibError, match="kinds of run must be among corpus, student, got studnet."):
        declare(["student", "studnet"])
    assert revisions.RECORD.read_bytes() == before and agrees == []


def test_the_command_tells_keeps_and_bumps(package, agrees, capsys):
    def told(*words):
        assert main(["revisions", *words]) == 0
        forget()
        return capsys.readouterr().out

    assert told() == "corpus\nstudent\n"
    assert told("bump", "corpus", "student") == "bumped: corpus, student\n"
    assert told() == told("status") == "all code is as declared\n"
    assert told("keep") == "kept: nothing was edited\n"
    edit(package, SOURCE + "x = 1\n")
    assert told("keep") == "kept: student\n"
    assert main(["revisions", "bump"]) == 2
    assert "bump must be given kinds of run, got none" in capsys.readouterr().err
    assert json.loads(revisions.RECORD.read_text()).keys() == {"corpus", "student"}


# The proof

METRICS = {
    "student kd seed 1": {
        "evaluation": {"test": {"nll": 4.5, "tokens": 1000}},
        "training": {"losses": [5.0, 4.7], "seconds": 9.5, "tokens_per_second": 100.0},
        "cost": {"seconds": 10.0, "device": "a processor"},
        "name": "llama",
        "bound": None,
    }
}


def changed(**paths) -> dict:
    """The metrics with other values, by path."""
    found = json.loads(json.dumps(METRICS))
    for path, value in paths.items():
        *outer, last = path.split("__")
        inside = found["student kd seed 1"]
        for name in outer:
            inside = inside[name]
        inside[int(last) if isinstance(inside, list) else last] = value
    return found


@pytest.mark.parametrize(
    ("paths", "told"),
    [
        ({"evaluation__test__nll": 4.5001}, "student kd seed 1, evaluation, test, nll: 4.5 became 4.5001"),
        ({"evaluation__test__tokens": 1001}, "student kd seed 1, evaluation, test, tokens: 1000 became 1001"),
        ({"evaluation__test__nll": math.nan}, "student kd seed 1, evaluation, test, nll: 4.5 became nan"),
        ({"training__losses__1": 4.8}, "student kd seed 1, training, losses 1: 4.7 became 4.8"),
        ({"training__losses": [5.0]}, "student kd seed 1, training, losses: [5.0, 4.7] became [5.0]"),
        ({"name": "gpt2"}, "student kd seed 1, name: 'llama' became 'gpt2'"),
        ({"bound": 1.0}, "student kd seed 1, bound: None became 1.0"),
    ],
)
def test_a_result_that_changed_is_found_and_named(paths, told):
    assert list(proof.differences(METRICS, changed(**paths))) == [told]


def test_time_devices_and_what_rounds_are_no_results():
    slower = changed(training__seconds=99.0, training__tokens_per_second=1.0, cost={"seconds": 99.0, "device": "another"})
    assert list(proof.differences(METRICS, slower)) == []
    assert list(proof.differences(METRICS, changed(evaluation__test__nll=4.5 * (1 + 1e-8)))) == []
    assert list(proof.differences(METRICS, changed(further=1))) == [], "what is newly measured was not there to change"
    assert list(proof.differences(METRICS, METRICS | {"student kd seed 2": {}})) == []


def test_runs_that_share_a_label_are_all_compared(tmp_path, monkeypatch):
    """As a student of a grid and one of the comparison do."""

    def study(home, numbers):
        runs = home / "results" / "smoke" / "runs"
        planned = [{"id": f"student-{home.name}{place}", "label": "student kd seed 1"} for place in range(len(numbers))]
        for one, number in zip(planned, numbers, strict=True):
            (runs / one["id"]).mkdir(parents=True)
            (runs / one["id"] / "metrics.json").write_text(json.dumps({"nll": number}))
        # The grid repeats the first, which it shares with the comparison.
        plan = {"runs": planned[:1], "grids": {"losses": {"runs": planned[:2]}, "data": {"runs": [planned[0], *planned[2:]]}}}
        (home / "results" / "smoke" / "plan.json").write_text(json.dumps(plan))
        return proof._results(tmp_path, home)

    monkeypatch.setattr(proof.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    before, after = study(tmp_path / "a", [1.0, 2.0, 3.0]), study(tmp_path / "b", [1.0, 2.5, 3.5])
    assert before == {"student kd seed 1": {"nll": 1.0}, "student kd seed 1 (2)": {"nll": 2.0}, "student kd seed 1 (3)": {"nll": 3.0}}
    told = ["student kd seed 1 (2), nll: 2 became 2.5", "student kd seed 1 (3), nll: 3 became 3.5"]
    assert list(proof.differences(before, after)) == told


def test_both_versions_make_the_study_of_the_declared_profile(tmp_path):
    declared = tmp_path / "declared"
    for name in ("kdlib/old.py", "profiles/smoke.yaml"):
        (declared / name).parent.mkdir(parents=True)
        (declared / name).write_text("declared", encoding="utf-8")
    proof._edit(declared, tmp_path / "edited")
    assert (tmp_path / "edited/profiles/smoke.yaml").read_text(encoding="utf-8") == "declared"
    assert not (tmp_path / "edited/kdlib/old.py").exists()
    assert (tmp_path / "edited/kdlib/study/proof.py").read_bytes() == (proof.REPOSITORY / "kdlib/study/proof.py").read_bytes()


def test_a_study_that_does_not_run_is_no_proof(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="…\nKdlibError: the text is empty")
    monkeypatch.setattr(proof.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(KdlibError, match="(?s)The small study must run to be compared.*the text is empty"):
        proof._results(tmp_path, tmp_path)


def test_the_code_that_is_compared_with_is_that_of_the_record(tmp_path):
    try:
        record = proof._git("log", "-1", "--format=%H", "--", "kdlib/study/revisions.json").decode().strip()
    except KdlibError:
        pytest.skip("not a git checkout")
    assert proof._export(tmp_path / "declared") == record
    shown = subprocess.run(
        ["git", "-C", str(proof.REPOSITORY), "show", f"{record}:kdlib/study/revisions.json"], capture_output=True, check=True
    )
    assert (tmp_path / "declared" / "kdlib" / "study" / "revisions.json").read_bytes() == shown.stdout
    assert record in (tmp_path / "declared" / ".git_archival.txt").read_text(), "its runs can say which commit made them"


# The project's own record


def test_the_record_is_of_every_kind_of_run():
    forget()
    assert set(revisions.record()) == set(kinds())
    assert all(one["revision"] >= 1 and len(one["sha256"]) == 64 for one in revisions.record().values())


@pytest.mark.parametrize("kind", kinds())
def test_every_edit_of_the_project_is_declared(kind):
    forget()
    told = "Say what your edit was: kdlib revisions keep (same results) or bump KIND (others)"
    assert revisions.code_version(kind).startswith("r"), told
