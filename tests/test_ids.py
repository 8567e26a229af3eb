"""What the id of a run is made of: every setting that shapes it, the runs that it reads, its code; and nothing else."""

import hashlib
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from pydantic import Field

from kdlib.data import text
from kdlib.study import closure, design, plan, profiles, revisions, store
from kdlib.study.beside import Beside
from kdlib.study.features import Features
from kdlib.study.kinds import kinds

# What the absence of a setting from a run's settings means, and always will: committed results say no more.
FROZEN = {
    "corpus": {},
    "teacher": {"low_precision": "none"},
    "targets": {"source": "teacher", "proposal": 1.0, "stratified": False},
    "scores": {},
    "clusters": {},
    "student": {
        "low_precision": "none",
        "beside": None,
        "data_seed": None,
        "divergence": "forward_kl",
        "features": None,
        "initialisation": "random",
        "noise": 0.0,
        "stages": [],
        "text": "corpus",
    },
    "joint": {},
    "member": {},
    "ensemble": {"combine": None, "calibrate": False},
    "fidelity": {},
}
# Another value of every setting, beside what a run must say for it to be read.
TRAINING = {
    "epochs": ({}, 1.5),
    "batch_size": ({}, 8),
    "gradient_accumulation": ({}, 2),
    "learning_rate": ({}, 0.002),
    "warmup": ({}, 0.2),
    "weight_decay": ({}, 0.2),
    "seed": ({}, 7),
    "precision": ({}, "bfloat16"),
    "compile": ({}, True),
    "low_precision": ({}, "optimizer"),
}
STAGES = [{"share": 1.0, "learning_rate_multipliers": {"mlp": 0.5}}]
OTHERS = {
    "corpus": {
        "domains": ({}, {"speeches": 0.4, "country": 0.6}),
        "ood": ({}, "fiction"),
        "train_tokens": ({}, 20000),
        "heldout_tokens": ({}, 3000),
        "block_length": ({}, 32),
        "tokenizer": ({}, "smollm2-135m-instruct"),
        "vocabulary_size": ({}, 512),
    },
    "teacher": TRAINING
    | {
        "source": ({"adaptation": "frozen"}, "Some/Model@0123abcd"),
        "adaptation": ({}, "full"),
        "tokens": ({}, 20000),
        "lora_rank": ({"adaptation": "lora"}, 4),
        "layers": ({}, 3),
        "hidden_size": ({}, 32),
        "heads": ({}, 2),
    },
    "targets": {
        "teacher": ({}, {"student": {"objective": "ce"}}),
        "kind": ({}, "topk"),
        "draws": ({}, 8),
        "top_k": ({"kind": "topk"}, 8),
        "source": ({}, "dense"),
        "proposal": ({}, 0.8),
        "stratified": ({}, True),
        "temperature": ({}, 2.0),
        "seed": ({}, 7),
        "precision": ({}, "bfloat16"),
    },
    "scores": {
        "scorer": ({}, {"student": {"objective": "ce"}}),
        "measure": ({}, "entropy"),
        "targets": ({"measure": "kl", "scorer": {"student": {"objective": "ce"}}}, {"targets": {"draws": 8}}),
        "precision": ({}, "bfloat16"),
    },
    "clusters": {
        "clusters": ({}, 3),
        "dimensions": ({}, 50),
        "random": ({}, True),
        "seed": ({}, 7),
    },
    "student": TRAINING
    | {
        "objective": ({}, "ce"),
        "kd_weight": ({}, 0.5),
        "temperature": ({}, 2.0),
        "divergence": ({"targets": {"kind": "topk"}}, {"jsd": {"beta": 0.2}}),
        "teacher": ({}, {"student": {"objective": "ce"}}),
        "targets": ({}, {"draws": 8}),
        "fresh_draws": ({"targets": {"source": "dense"}, "seed": 7}, True),
        "features": ({"objective": "online_kd"}, {"of": "relation"}),
        "architecture": ({}, "gpt2"),
        "layers": ({}, 2),
        "hidden_size": ({}, 64),
        "heads": ({}, 1),
        "initialisation": ({}, "embeddings"),
        "noise": ({}, 0.1),
        "start": ({}, {"student": {"objective": "ce"}}),
        "data_seed": ({}, 7),
        "learning_rate_multipliers": ({}, {"mlp": 0.5}),
        "stages": ({}, STAGES),
        "text": ({}, {"bagged": {"share": 0.5, "seed": 1}}),
        "beside": ({}, {"runs": [{"student": {"objective": "ce"}}]}),
    },
    "joint": {
        "student": ({}, {"kd_weight": 0.5}),
        "seeds": ({}, [1, 3]),
        "coupling": ({}, 0.25),
        "pool": ({}, "probability"),
    },
    "member": {
        "of": ({}, {"joint": {"coupling": 0.25}}),
        "number": ({}, 2),
    },
    "ensemble": {
        "method": ({}, "bagging"),
        "options": ({"method": "bagging"}, {"share": 0.5}),
        "student": ({}, {"objective": "ce"}),
        "seeds": ({}, [1, 3]),
        "members": ({}, [{"student": {"seed": 1}}, "scratch"]),
        "pool": ({}, "logit"),
        "combine": ({}, {"weights": "learned"}),
        "calibrate": ({}, True),
        "precision": ({}, "bfloat16"),
    },
    "fidelity": {
        "student": ({}, {"kd_weight": 0.5}),
        "seed": ({}, 7),
        "tokens": ({}, 128),
        "precision": ({}, "bfloat16"),
    },
}
FEATURES = {
    "of": ({"of": "relation"}, "hidden_mse"),
    "weight": ({"of": "relation"}, 0.5),
    "layers": ({"of": "relation"}, "last"),
    "last_k": ({"of": "relation", "layers": "last_k", "last_k": 1}, 2),
    "relations": ({"of": "relation"}, ["value"]),
    "balance": ({"of": "relation"}, "norm"),
}
CE, SEVEN = {"student": {"objective": "ce"}}, {"student": {"objective": "ce", "seed": 7}}
CHOSEN = {"mode": "highest", "measure": "nll", "share": 0.5}
WAYS = {
    "corpus": {},
    "uniform": {},
    "unigram": {},
    "bagged": {"share": ({"share": 0.5, "seed": 1}, 0.6), "seed": ({"share": 0.5, "seed": 1}, 2)},
    "selected": {
        "by": (CHOSEN, {"student": {"objective": "ce"}}),
        "measure": (CHOSEN, "entropy"),
        "mode": (CHOSEN, "lowest"),
        "share": (CHOSEN, 0.6),
        "temperature": ({"mode": "weighted", "measure": "nll", "temperature": 1.0}, 2.0),
        "domains": (CHOSEN, {"speeches": 1.0}),
    },
    "clustered": {
        "by": ({"cluster": 1}, {"clusters": {"clusters": 3}}),
        "cluster": ({"cluster": 1}, 2),
        "own": ({"cluster": 1}, 0.6),
        "seed": ({"cluster": 1}, 2),
    },
    "generated": {
        "by": ({}, {"student": {"objective": "ce"}}),
        "temperature": ({}, 2.0),
        "top_p": ({}, 0.9),
        "share": ({}, 0.5),
        "seed": ({}, 7),
    },
}
# Neither where a run is kept nor how fast it is made.
NOWHERE = {"profile", "compile"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def step(kind, profile="smoke", /, **settings):
    return plan.step(profiles.parameters(kinds()[kind].NOTEBOOK, profile, **settings))


def written(folder, name, **changes):
    """The smoke profile under another name, with changes of its sections."""
    values = profiles.read_yaml((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
    for section, change in changes.items():
        values[section] = values[section] | change if isinstance(change, dict) else change
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | {"name": name}, allow_unicode=True), encoding="utf-8")
    return str(path)


# Absence


def test_what_absence_means_is_frozen():
    assert {name: dict(kind.Parameters.ABSENT) for name, kind in kinds().items()} == FROZEN, (
        "a setting may be added; what was there stays, or the ids of all runs that were made would mean something else"
    )


LATER = [(kind, name) for kind, settings in FROZEN.items() for name in settings]


@pytest.mark.parametrize(("kind", "name"), LATER)
def test_a_setting_that_was_added_later_is_left_out_where_it_is_as_before(kind, name):
    base, other = OTHERS[kind][name]
    plain = step(kind, **base)
    assert getattr(plain.parameters, name) == FROZEN[kind][name], "the profile leaves it alone"
    assert name not in plain.settings["parameters"]
    assert step(kind, **base, **{name: FROZEN[kind][name]}).id == plain.id
    assert name in step(kind, **base, **{name: other}).settings["parameters"]


@pytest.mark.parametrize(("kind", "name"), LATER)
def test_a_default_that_changes_makes_other_ids(kind, name):
    base, other = OTHERS[kind][name]
    values = step(kind, **base).parameters
    model = type(values)
    default = Field(other, validate_default=True)
    changed = type("Changed", (model,), {"__annotations__": {name: model.model_fields[name].annotation}, name: default})
    said = values.model_dump(exclude={name})
    assert changed.model_validate(said).identity() != values.identity()
    kept = changed.model_validate({**said, name: FROZEN[kind][name]})
    assert kept.identity() == values.identity(), "who says the old value gets the old run"


def test_a_run_that_says_nothing_of_what_was_added_later_is_what_it_was():
    """As settings stand in results that were made long ago."""
    student = dict(objective="kd", kd_weight=0.9, temperature=1.0, architecture="llama", layers=1, hidden_size=32, heads=2)
    student |= dict(learning_rate_multipliers={}, epochs=2.0, batch_size=16, gradient_accumulation=1, learning_rate=0.005)
    student |= dict(warmup=0.1, weight_decay=0.1, seed=1, precision="float32")
    given = student | {"profile": "smoke", "teacher": "scratch", "compile": False}
    assert kinds()["student"].Parameters(**given).identity() == student
    targets = dict(kind="sampled", draws=32, temperature=1.0, seed=0, precision="float32")
    given = targets | {"profile": "smoke", "teacher": "scratch", "top_k": 32}
    assert kinds()["targets"].Parameters(**given).identity() == targets


# Settings

EVERY = [(name, field) for name, kind in kinds().items() for field in kind.Parameters.model_fields]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_setting_is_part_of_an_id_or_stands_among_those_that_are_not(kind, name, tmp_path):
    if name == "profile":
        one, other = step(kind), step(kind, written(tmp_path, "mine"))
    else:
        assert name in OTHERS[kind], "give it another value here"
        base, value = OTHERS[kind][name]
        one, other = step(kind, **base), step(kind, **base, **{name: value})
    assert one.parameters != other.parameters
    counts = name not in kinds()[kind].Parameters.UNREAD
    assert (one.settings["parameters"] != other.settings["parameters"]) is counts
    # What is not read itself names other runs, whose ids are.
    assert (one.id != other.id) is (name not in NOWHERE)
    if not counts and name not in NOWHERE:
        assert one.settings["inputs"] != other.settings["inputs"]


@pytest.mark.parametrize(("name", "value"), [("runs", [SEVEN]), ("coupling", 0.5), ("pool", "probability")])
def test_every_setting_of_what_a_student_is_beside_is_part_of_an_id(name, value):
    given = {"runs": [CE], "coupling": 1.0, "pool": "logit"}
    assert step("student", beside=given).id != step("student", beside=given | {name: value}).id
    assert set(Beside.model_fields) == set(given)


@pytest.mark.parametrize("name", Features.model_fields)
def test_every_setting_of_features_is_part_of_an_id(name):
    base, value = FEATURES[name]
    one, other = (step("student", objective="online_kd", features=one) for one in (base, {**base, name: value}))
    assert one.id != other.id


def test_what_features_do_not_read_is_no_part_of_an_id():
    one, other = ({"of": "hidden_mse", "relations": relations} for relations in (["key"], ["value"]))
    assert step("student", objective="online_kd", features=one).id == step("student", objective="online_kd", features=other).id


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, one in text.ways().items() for name in one.model_fields])
def test_every_setting_of_a_text_is_part_of_an_id(way, name):
    base, value = WAYS[way][name]
    one, other = (step("student", objective="online_kd", text={way: chosen}) for chosen in (base, {**base, name: value}))
    assert one.id != other.id
    assert (one.settings["parameters"] != other.settings["parameters"]) is (name not in text.ways()[way].UNREAD)


def test_every_text_is_another_student():
    said = {"bagged": {"share": 0.5, "seed": 1}, "selected": CHOSEN, "clustered": {"cluster": 1}}
    found = [step("student", objective="online_kd", text={way: said[way]} if way in said else way).id for way in WAYS]
    assert set(WAYS) == set(text.ways()) and len(set(found)) == len(WAYS)


@pytest.mark.parametrize(
    ("kind", "base"),
    [("teacher", {"adaptation": name}) for name in ("frozen", "lora", "full", "scratch")]
    + [("targets", {"kind": name}) for name in ("sampled", "topk", "topk_sampled", "dense")]
    + [("student", {"objective": "ce"})],
)
def test_what_a_run_does_not_read_is_no_part_of_its_id(kind, base):
    one = step(kind, **base)
    unread = one.parameters.unread() - NOWHERE
    # Cross-entropy refuses a divergence.
    for name in unread - ({"divergence"} if kind == "student" else set()):
        assert name not in one.settings["parameters"]
        assert step(kind, **base, **{name: OTHERS[kind][name][1]}).id == one.id


# Runs that are named

IN_LOOP = {"objective": "online_kd"}
NAMED = [
    # Settings with a reference, and where the run that it names is found among the inputs.
    ("student", lambda ref: {**IN_LOOP, "teacher": ref}, lambda one: one.inputs["teacher"]),
    ("student", lambda ref: {"start": ref}, lambda one: one.inputs["start"]),
    ("student", lambda ref: {"teacher": ref}, lambda one: one.inputs["targets"].inputs["teacher"]),
    ("student", lambda ref: {"text": {"selected": CHOSEN | {"by": ref}}}, lambda one: one.inputs["scores"].inputs["scorer"]),
    ("student", lambda ref: {**IN_LOOP, "text": {"generated": {"by": ref}}}, lambda one: one.inputs["writer"]),
    ("targets", lambda ref: {"teacher": ref}, lambda one: one.inputs["teacher"]),
    ("scores", lambda ref: {"scorer": ref}, lambda one: one.inputs["scorer"]),
    ("scores", lambda ref: {"scorer": ref, "measure": "kl"}, lambda one: one.inputs["scorer"]),
    ("student", lambda ref: {"beside": {"runs": [ref]}}, lambda one: one.inputs["beside 1"]),
    ("joint", lambda ref: {"student": {"teacher": ref}}, lambda one: one.inputs["targets"].inputs["teacher"]),
    ("ensemble", lambda ref: {"members": [ref]}, lambda one: one.inputs["member 1"]),
    ("fidelity", lambda ref: {"student": {"teacher": ref}}, lambda one: one.inputs["teacher"]),
]


@pytest.mark.parametrize(("kind", "settings", "named"), NAMED)
def test_a_run_that_is_named_counts_by_its_id_and_not_by_how_it_was_named(kind, settings, named):
    one, same, other = (step(kind, **settings(ref)) for ref in (CE, {"student": {"seed": 1, "objective": "ce"}}, SEVEN))
    planner = plan.Planner("smoke")
    assert one.settings == same.settings and one.id == same.id
    assert (named(one).id, named(other).id) == (planner.resolve(CE).id, planner.resolve(SEVEN).id)
    assert one.settings["parameters"] == other.settings["parameters"] and one.id != other.id
    assert "teacher" not in one.settings["parameters"] and "'ce'" not in str(one.settings["parameters"])
    reads = {upstream.id for upstream in one.upstream()}
    assert {run for upstream in one.upstream() for run in upstream.settings["inputs"].values()} < reads


# Machines


def locale_folder(folder):
    """A Latin-1 locale, which few machines have."""
    if not shutil.which("localedef"):
        pytest.skip("localedef makes no locales here")
    made = subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")], capture_output=True)
    if not (folder / "en_US.ISO-8859-1").is_dir():
        pytest.skip(f"no Latin-1 locale can be made here: {made.stderr.decode()}")
    return str(folder)


@pytest.mark.parametrize("where", ["C", "latin-1", "no default encoding", "another folder"])
def test_ids_are_the_same_in_every_locale_and_folder(where, tmp_path, home):
    grid = {"seeds": [1], "students": {"β – é": {"learning_rate_multipliers": {"é": 0.5}}, "of": {"kd_weight": 0.5}}}
    study = {"grids": {"losses": grid}, "methods": {"Säcke": {"method": "bagging", "share": 0.5}}}
    profile = written(tmp_path, "mine", description="Ça va – 雪", study=study)
    design.write(profile, ("losses",))
    code = (
        "import locale, sys\nfrom kdlib.study import design\n"
        "design.write(sys.argv[1], ('losses',))\n"
        "print(locale.getencoding(), *(one.id for one in design.study(sys.argv[1], ('losses',))))"
    )
    options, strict = {}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if where == "C":
        options = strict | {"LC_ALL": "C"}
    elif where == "latin-1":
        options = strict | {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": locale_folder(tmp_path)}
    elif where == "no default encoding":  # of a file that is read or written
        options = {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error::EncodingWarning"}
    folder = tmp_path if where == "another folder" else profiles.REPOSITORY
    environment = {**os.environ, "PYTHONPATH": str(profiles.REPOSITORY), "KDLIB_HOME": str(tmp_path / "there"), **options}
    done = subprocess.run([sys.executable, "-c", code, profile], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoding, *ids = done.stdout.split()
    assert ("utf" not in encoding.lower()) is (where in ("C", "latin-1"))
    assert ids == [one.id for one in design.study(profile, ("losses",))]
    plans = [(folder / "results" / "mine" / "plan.json").read_bytes() for folder in (home, tmp_path / "there")]
    assert plans[0] == plans[1] and hashlib.sha256(plans[0]).hexdigest()


def test_settings_in_another_order_are_the_same_run():
    one = step("ensemble", student={"objective": "ce", "layers": 2, "text": {"bagged": {"share": 0.5, "seed": 1}}})
    other = step("ensemble", student={"text": {"bagged": {"seed": 1, "share": 0.5}}, "layers": 2, "objective": "ce"})
    assert one.id == other.id


def test_a_number_is_the_same_however_it_is_written(tmp_path):
    one, other = (step("student", **profiles.read_yaml(text)) for text in ("learning_rate: 3e-3", "learning_rate: 0.0030"))
    assert one.id == other.id
    assert step("student", kd_weight=1).id == step("student", kd_weight=1.0).id


# Code

READS_MODELS = set(kinds()) - {"corpus"}


@pytest.mark.parametrize("kind", kinds())
def test_an_id_holds_all_code_that_shapes_the_run_and_none_that_plans_it(kind):
    found = set(closure.closure(f"kdlib.runs.{kind}"))
    assert f"kdlib.runs.{kind}" in found and {"kdlib.data.corpus", "kdlib.models.loading"} <= found
    shaping = {"kdlib.losses.fused", "kdlib.ensemble.pooling", "kdlib.ensemble.model", "kdlib.evaluation.metrics"}
    assert (shaping <= found) is (kind in READS_MODELS) and (not shaping & found) is (kind not in READS_MODELS)
    assert not found & closure.APART and not found & {"kdlib.study.profiles", "kdlib.study.plan", "kdlib.runs.make"}
    assert [name for name in found if name.split(".")[1] in ("methods", "analysis")] == []


def test_what_trains_is_code_of_what_trains():
    trains = {"kdlib.training.trainer", "kdlib.training.objective", "kdlib.study.schedules"}
    assert trains <= set(closure.closure("kdlib.runs.student")) & set(closure.closure("kdlib.runs.teacher"))
    assert "kdlib.evaluation.fidelity" in closure.closure("kdlib.runs.fidelity")
    assert "kdlib.evaluation.fidelity" not in closure.closure("kdlib.runs.student")


def test_what_is_kept_apart_is_there():
    assert [name for name in closure.APART if not closure._file(name).is_file()] == []


def test_python_loads_no_other_code_of_the_package():
    found = closure.closure("kdlib.runs.fidelity")  # which reads all others
    code = f"import importlib, sys\nfor name in {found}: importlib.import_module(name)\n"
    code += "print(*(name for name in sys.modules if name.partition('.')[0] == 'kdlib'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=profiles.REPOSITORY, capture_output=True, text=True, check=True)
    assert set(found) <= set(done.stdout.split()) <= set(found) | closure.APART


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A copy of the package's code, declared, to edit."""
    shutil.copytree(closure.PACKAGE, tmp_path / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(closure, "PACKAGE", tmp_path / "kdlib")
    monkeypatch.setattr(revisions, "RECORD", tmp_path / "revisions.json")
    caches = closure._imports, revisions.current, revisions.record, revisions.code_version, design.comparison, design.study, design.cells

    def edited(name="", old="", new="") -> dict[str, str]:
        """The code version of every kind after ``old`` in a file, or its end, became ``new``."""
        if name:
            file = tmp_path / "kdlib" / name
            source = file.read_text(encoding="utf-8")
            assert old in source
            file.write_text(source.replace(old, new, 1) if old else source + new, encoding="utf-8")
        for cached in caches:
            cached.cache_clear()
        return {kind: revisions.code_version(kind) for kind in kinds()}

    edited()
    revisions.bump(list(kinds()))
    yield edited
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("data/corpus.py", set(kinds())),
        ("losses/fused.py", READS_MODELS),
        ("ensemble/pooling.py", READS_MODELS),
        ("evaluation/metrics.py", READS_MODELS),
        ("training/trainer.py", READS_MODELS),
        ("runs/artefacts.py", READS_MODELS),
        ("losses/coupled.py", READS_MODELS),
        ("runs/student.py", {"student", "joint"}),
        ("runs/ingredients.py", {"student", "joint", "fidelity"}),
        ("runs/ensemble.py", {"ensemble"}),
        ("evaluation/fidelity.py", {"fidelity"}),
        ("methods/bagging.py", set()),
        ("analysis/report.py", set()),
        ("study/profiles.py", set()),
        ("study/plan.py", set()),
        ("runs/make.py", set()),
    ],
)
def test_an_edit_makes_other_runs_of_what_imports_it_and_a_comment_makes_none(code, name, changed):
    assert set(code().values()) == {"r1"}
    before = [one.id for one in design.study("smoke")]
    assert set(code(name, new="\n\n# a comment\n").values()) == {"r1"}
    after = code(name, new="\nanother = 1\n")
    assert {kind for kind, version in after.items() if version != "r1"} == changed
    assert all(version == revisions.current(kind)[:12] for kind, version in after.items() if kind in changed)
    assert ([one.id for one in design.study("smoke")] != before) is bool(changed - {"fidelity", "scores"})


def test_a_new_import_brings_its_module_into_the_id(code):
    code("runs/corpus.py", new="\nfrom kdlib.evaluation import fidelity\n")
    revisions.bump(["corpus"])
    revision = revisions.code_version("corpus")
    assert code("evaluation/fidelity.py", new="\nanother = 1\n")["corpus"] != revision


def test_an_id_is_of_all_that_settings_hold():
    found = step("student")
    assert found.settings.keys() == {"kind", "parameters", "inputs", "sources", "code"}
    assert found.id == f"student-{store.digest(found.settings)}"
    for name in found.settings:
        assert store.digest({**found.settings, name: "another"}) != store.digest(found.settings)
