import types

import pytest
import yaml

from kdlib.errors import KdlibError
from kdlib.study import design, profiles
from kdlib.study.kinds import kinds


def smoke() -> dict:
    return profiles.read_yaml((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))


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
        ("corpus", "domains", {"speeches": 1, "recipes": 1}, "ood must be a domain that is not trained on, got 'recipes'"),
        ("corpus", "domains", {"speeches": 0}, "corpus.domains.speeches"),
        ("corpus", "block_length", 4, "corpus.block_length"),
        ("teacher", "adaptation", "lorra", "teacher.adaptation.*'frozen', 'lora', 'full' or 'scratch'.*found 'lorra'"),
        ("teacher", "epochs", -1, "teacher.epochs"),
        ("targets", "draws", 256, "targets.draws.*less than or equal to 255"),
        ("targets", "temperature", 0, "targets.temperature"),
        ("student", "kd_weight", 1.5, "student.kd_weight"),
        ("student", "heads", 3, "hidden_size must be an even multiple of heads .3., got 32"),
        ("student", "objective", "dpo", "student.objective"),
        ("student", "learning_rate", "fast", "student.learning_rate.*valid number.*found 'fast'"),
        ("student", "learning_rate_multipliers", {"embed": -1}, "student.learning_rate_multipliers.embed"),
        ("student", "kd_wieght", 0.5, "student.kd_wieght"),
        ("ensemble", "seeds", [], "ensemble.seeds"),
        ("study", "members", 0, "study.members"),
        ("study", "pools", ["mean"], "study.pools"),
        ("study", "objectives", ["kd"], "objectives must include ce and kd.*got .'kd'. and .*add what is missing"),
        ("study", "objectives", ["ce", "online_kd"], "objectives must include ce and kd"),
        ("study", "pools", ["logit"], "pools probability, .*got .*'logit'"),
        ("corpus", "domains", {"speeches": float("inf")}, "corpus.domains.speeches.*finite number"),
        ("student", "warmup", float("nan"), "student.warmup.*finite number"),
        ("ensemble", "seeds", [1, 2, 1], "ensemble.seeds: seeds must be unique, got .1, 2, 1."),
    ],
)
def test_a_bad_value_in_a_profile_is_named_with_what_was_expected(tmp_path, section, name, value, told):
    values = smoke()
    values[section][name] = value
    with pytest.raises(KdlibError, match=told):
        profiles.load(saved(tmp_path, values))


@pytest.mark.parametrize(
    ("section", "name"),
    [("teacher", "adaptation"), ("targets", "teacher"), ("student", "teacher"), ("study", "teachers")],
)
def test_a_profile_whose_sections_name_several_teachers_is_refused_in_a_few_words(tmp_path, section, name):
    values = smoke()
    values[section][name] = ["frozen"] if section == "study" else "full"
    told = "teacher.adaptation, targets.teacher and student.teacher must name one teacher that .*, got .*write the same adaptation"
    with pytest.raises(KdlibError, match=told) as refused:
        profiles.load(saved(tmp_path, values))
    assert len(str(refused.value)) < 500


def test_a_profile_may_name_any_one_teacher(tmp_path):
    values = smoke()
    for section, name in (("teacher", "adaptation"), ("targets", "teacher"), ("student", "teacher")):
        values[section][name] = "lora"
    values["study"]["teachers"] = ["frozen", "lora"]
    assert profiles.load(saved(tmp_path, values)).student.teacher == "lora"


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("student", {"targets": {"source": "dense"}}),
        ("targets", {"source": "dense"}),
        ("student", {"fresh_draws": True}),
        ("student", {"fresh_draws": True, "targets": {"source": "dense"}}),
    ],
)
def test_students_that_do_not_share_their_targets_belong_in_a_grid(tmp_path, section, change):
    values = smoke()
    values[section] |= change
    told = "students of a comparison must share one run of targets, got fresh_draws or targets of source dense; set these in a grid"
    with pytest.raises(KdlibError, match=told):
        profiles.load(saved(tmp_path, values))
    values = smoke()
    cell = {"targets": change} if section == "targets" else change
    values["study"]["grids"] = {"data": {"seeds": [1], "students": {"one": cell}}}
    assert profiles.load(saved(tmp_path, values))


@pytest.mark.parametrize("name", ["on", "off", "yes", "no", "y", "n"])
def test_only_true_and_false_are_truth_values(tmp_path, name):
    assert profiles.read_yaml(f"{{{name}: {name}, truth: [true, False]}}") == {name: name, "truth": [True, False]}


def test_features_of_something_are_written_as_they_are_said(tmp_path):
    text = (profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8").replace("name: smoke", "name: mine")
    text = text.replace("student:\n  objective: kd", "student:\n  objective: online_kd\n  features: {of: relation, layers: last}", 1)
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    found = profiles.load(str(path)).student.features
    assert (found.of, found.layers) == ("relation", "last")


def test_a_section_whose_settings_all_have_defaults_may_be_left_out(tmp_path):
    values = smoke()
    values.pop("scores", None)
    assert profiles.load(saved(tmp_path, values)).scores is None
    plain = profiles.parameters("07_scores", saved(tmp_path, values))
    assert (plain.measure, plain.scorer) == ("nll", {"targets": {}})
    chosen = profiles.parameters("07_scores", saved(tmp_path, values | {"scores": {"measure": "entropy"}}))
    assert chosen.measure == "entropy"
    with pytest.raises(KdlibError, match="scores.measure.*'nll', 'entropy' or 'kl'"):
        profiles.load(saved(tmp_path, values | {"scores": {"measure": "loss"}}))


def test_every_kind_of_run_has_a_section_and_a_notebook():
    assert set(kinds()) <= set(profiles.profile_model().model_fields)
    found = profiles.notebooks()
    assert list(found) == sorted(found)
    assert {section: model for model, section in found.values() if section in kinds()} == {
        name: kind.Parameters for name, kind in kinds().items()
    }


@pytest.mark.parametrize("name", profiles.available())
def test_every_shipped_profile_can_be_planned_with_all_of_its_grids(name):
    grids = tuple(profiles.load(name).study.grids)
    assert len(design.study(name, grids)) >= len(design.study(name)) > 10


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


def test_a_profile_elsewhere_cannot_have_the_name_of_one_that_ships(tmp_path):
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(smoke()))
    with pytest.raises(KdlibError, match="must not be called .*smoke.*Rename it"):
        profiles.load(str(path))
    shipped = profiles.REPOSITORY / "profiles" / "smoke.yaml"
    assert profiles.load(str(shipped)).name == "smoke"


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
    with pytest.raises(KdlibError, match="notebook must be one of .*04_student.*, got '04_studnet'"):
        profiles.parameters("04_studnet", "smoke")


@pytest.fixture
def kernel(monkeypatch):
    """A process in which no notebook has run."""
    monkeypatch.setattr(profiles, "_seen", set())


def test_a_notebooks_globals_are_checked_and_imports_ignored(kernel):
    others = {"profiles": profiles, "np": types.ModuleType("np"), "f": len, "_i": "typed", "In": [""], "__name__": "a"}
    namespace = profiles.parameters("04_student", "smoke").model_dump() | others
    assert profiles.from_notebook("04_student", namespace) == profiles.parameters("04_student", "smoke")


def test_a_global_that_papermill_added_by_a_misspelt_name_is_refused(kernel):
    namespace = {**profiles.parameters("04_student", "smoke").model_dump(), "sead": 3}
    for _ in range(2):
        with pytest.raises(KdlibError, match="Unknown parameter 'sead'.*Did you mean 'seed'"):
            profiles.from_notebook("04_student", namespace)


def test_a_notebook_runs_again_in_the_same_kernel_among_the_globals_of_its_own_cells(kernel):
    namespace = profiles.parameters("04_student", "smoke").model_dump()
    first = profiles.from_notebook("04_student", namespace)
    assert profiles.from_notebook("04_student", {**namespace, "test": {"nll": 4.2}, "names": ["a"]}) == first
    again = profiles.from_notebook("04_student", {**namespace, "test": {"nll": 4.2}, "seed": 7})
    assert again == profiles.parameters("04_student", "smoke", seed=7)
    with pytest.raises(KdlibError, match="seed: .*found -1"):
        profiles.from_notebook("04_student", {**namespace, "seed": -1})
    with pytest.raises(KdlibError, match="Unknown parameter 'names' of 05_ensemble"):
        profiles.from_notebook("05_ensemble", {**profiles.parameters("05_ensemble", "smoke").model_dump(), "names": []})


@pytest.mark.parametrize(
    ("notebook", "base", "change", "same"),
    [
        ("04_student", {}, {"compile": True}, True),
        ("04_student", {}, {"kd_weight": 0.5}, False),
        ("04_student", {"objective": "ce"}, {"kd_weight": 0.5, "temperature": 2.0, "teacher": "frozen"}, True),
        ("04_student", {"objective": "ce"}, {"kd_weight": {"shape": "linear", "start": 0, "end": 1}}, True),
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
    for model, _ in profiles.notebooks().values():
        assert [name for name, entry in model.model_fields.items() if not entry.description] == []


def test_meanings_say_whose_precision_it_is():
    fields = {name: kind.Parameters.model_fields for name, kind in kinds().items()}
    meanings = {name: found["precision"].description for name, found in fields.items() if "precision" in found}
    assert set(fields) - set(meanings) == {"corpus", "clusters", "joint", "member"}
    assert meanings["fidelity"] == meanings["targets"] == "autocast of the teacher's forward pass"
    assert meanings["scores"] == "autocast of the scorer's forward pass"
