import types

import pytest
import yaml

from kdlib import profiles
from kdlib.errors import KdlibError


def smoke() -> dict:
    return yaml.safe_load((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text())


def saved(tmp_path, values: dict) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "mine"}))
    return str(path)


@pytest.mark.parametrize("name", profiles.available())
def test_every_shipped_profile_is_valid_and_carries_its_file_name(name):
    assert profiles.load(name).name == name


def test_the_profiles_of_the_project_are_there():
    assert {"smoke", "quick", "laptop", "gpu", "babylm", "paper"} <= set(profiles.available())
    assert "sources" not in profiles.available()


@pytest.mark.parametrize("name", ["smokee", "sources", "", "../profiles/smoke", "absent.yaml"])
def test_an_unknown_profile_is_refused_with_the_known_ones(name):
    with pytest.raises(KdlibError, match="Unknown profile.*Expected one of.*smoke.*, or the path of a .yaml file"):
        profiles.load(name)


@pytest.mark.parametrize(
    ("section", "name", "value", "told"),
    [
        ("corpus", "train_tokens", 0, "corpus.train_tokens.*greater than 0.*found 0"),
        ("corpus", "domains", {"speeches": 1, "recipes": 1}, "ood domain 'recipes' is also trained on"),
        ("corpus", "domains", {"speeches": 0}, "corpus.domains.speeches"),
        ("corpus", "block_length", 4, "corpus.block_length"),
        ("teacher", "adaptation", "lorra", "teacher.adaptation.*'frozen', 'lora', 'full' or 'scratch'.*found 'lorra'"),
        ("teacher", "epochs", -1, "teacher.epochs"),
        ("targets", "draws", 256, "targets.draws.*less than or equal to 255"),
        ("targets", "temperature", 0, "targets.temperature"),
        ("student", "kd_weight", 1.5, "student.kd_weight"),
        ("student", "heads", 3, "must be an even multiple of heads 3"),
        ("student", "objective", "dpo", "student.objective"),
        ("student", "learning_rate", "fast", "student.learning_rate.*valid number.*found 'fast'"),
        ("student", "learning_rate_multipliers", {"embed": -1}, "student.learning_rate_multipliers.embed"),
        ("student", "kd_wieght", 0.5, "student.kd_wieght"),
        ("ensemble", "seeds", [], "ensemble.seeds"),
        ("analysis", "resamples", 10, "analysis.resamples"),
        ("study", "members", 0, "study.members"),
        ("study", "pools", ["mean"], "study.pools"),
    ],
)
def test_a_bad_value_in_a_profile_is_named_with_what_was_expected(tmp_path, section, name, value, told):
    values = smoke()
    values[section][name] = value
    with pytest.raises(KdlibError, match=told):
        profiles.load(saved(tmp_path, values))


def test_a_missing_parameter_is_named(tmp_path):
    values = smoke()
    del values["student"]["layers"]
    with pytest.raises(KdlibError, match="student.layers: Field required"):
        profiles.load(saved(tmp_path, values))


@pytest.mark.parametrize(
    ("content", "told"), [("a: [1", "is not valid YAML"), ("- 1", "must hold a mapping"), ("", "must hold a mapping")]
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(KdlibError, match=told):
        profiles.load(str(path))


@pytest.mark.parametrize("section", [[1], None, "text"])
def test_a_section_that_is_no_mapping_is_named(tmp_path, section):
    with pytest.raises(KdlibError, match="Bad profile.*student: "):
        profiles.load(saved(tmp_path, {**smoke(), "student": section}))


def test_a_profile_has_the_name_of_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**smoke(), "name": "yours"}))
    with pytest.raises(KdlibError, match="calls itself 'yours', but its results are kept under 'mine'"):
        profiles.load(str(path))


def test_changes_lie_on_top_of_the_profiles_section():
    found = profiles.parameters("04_student", "smoke", seed=7, objective="ce")
    section = smoke()["student"]
    assert found.model_dump(exclude_defaults=True) == {"profile": "smoke", **section, "seed": 7, "objective": "ce"}


def test_a_misspelt_parameter_is_refused_with_the_nearest_name():
    with pytest.raises(
        KdlibError, match="Unknown parameter 'kd_wieght' of 04_student. Did you mean 'kd_weight'.*Allowed: .*objective"
    ):
        profiles.parameters("04_student", "smoke", kd_wieght=0.5)


@pytest.mark.parametrize("name", ["notebook", "self"])
def test_a_parameter_named_like_an_argument_is_just_unknown(name):
    with pytest.raises(KdlibError, match=f"Unknown parameter '{name}'"):
        profiles.parameters("04_student", "smoke", **{name: 1})


def test_an_unknown_notebook_is_refused():
    with pytest.raises(KdlibError, match="Unknown notebook '04_studnet'. Expected one of.*04_student"):
        profiles.parameters("04_studnet", "smoke")


def test_a_notebooks_globals_are_checked_and_imports_ignored():
    others = {"profiles": profiles, "np": types.ModuleType("np"), "f": len, "_i": "typed", "In": [""], "__name__": "a"}
    namespace = profiles.parameters("04_student", "smoke").model_dump() | others
    assert profiles.from_notebook("04_student", namespace) == profiles.parameters("04_student", "smoke")


def test_a_global_that_papermill_added_by_a_misspelt_name_is_refused():
    namespace = {**profiles.parameters("04_student", "smoke").model_dump(), "sead": 3}
    with pytest.raises(KdlibError, match="Unknown parameter 'sead'.*Did you mean 'seed'"):
        profiles.from_notebook("04_student", namespace)


@pytest.mark.parametrize(
    ("notebook", "base", "change", "same"),
    [
        ("04_student", {}, {"compile": True}, True),
        ("04_student", {}, {"kd_weight": 0.5}, False),
        ("04_student", {"objective": "ce"}, {"kd_weight": 0.5, "temperature": 2.0, "teacher": "frozen"}, True),
        ("04_student", {"objective": "ce"}, {"precision": "bfloat16"}, False),
        ("03_targets", {"kind": "sampled"}, {"top_k": 8}, True),
        ("03_targets", {"kind": "sampled"}, {"seed": 8}, False),
        ("03_targets", {"kind": "topk"}, {"draws": 8, "seed": 8}, True),
        ("03_targets", {"kind": "topk"}, {"top_k": 8}, False),
        (
            "02_teacher",
            {"adaptation": "frozen"},
            {"epochs": 9, "learning_rate": 0.1, "lora_rank": 2, "layers": 9, "seed": 3},
            True,
        ),
        ("02_teacher", {"adaptation": "frozen"}, {"precision": "bfloat16"}, False),
        ("02_teacher", {"adaptation": "lora"}, {"layers": 9, "hidden_size": 32, "heads": 1}, True),
        ("02_teacher", {"adaptation": "lora"}, {"lora_rank": 2}, False),
        ("02_teacher", {"adaptation": "full"}, {"lora_rank": 2, "heads": 1}, True),
        ("02_teacher", {"adaptation": "scratch"}, {"source": "elsewhere", "lora_rank": 2}, True),
        ("02_teacher", {"adaptation": "scratch"}, {"layers": 9}, False),
    ],
)
def test_only_what_a_run_reads_is_part_of_its_identity(notebook, base, change, same):
    one = profiles.parameters(notebook, "smoke", **base)
    other = profiles.parameters(notebook, "smoke", **base, **change)
    assert one != other
    assert (one.identity() == other.identity()) is same


def test_every_parameter_has_a_meaning():
    for model, _ in profiles.NOTEBOOKS.values():
        assert [name for name, entry in model.model_fields.items() if not entry.description] == []
