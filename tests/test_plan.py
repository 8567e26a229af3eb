import dataclasses
import json
import shlex
import socket
import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.errors import KdlibError
from kdlib.study import plan, profiles, runner, store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    for cached in (plan.study, design.cells, plan._identity):
        cached.cache_clear()
    yield tmp_path
    for cached in (plan.study, design.cells, plan._identity):
        cached.cache_clear()


@pytest.fixture
def mine(tmp_path):
    """Writes a variant of the smoke profile and returns its path."""

    def write(name="mine", **sections) -> str:
        values = yaml.safe_load((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text())
        for section, changes in sections.items():
            values[section].update(changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, "name": name}))
        return str(path)

    return write


def ids(profile: str, *kinds: str) -> set[str]:
    return {step.id for step in design.study(profile) if not kinds or step.kind in kinds}


def test_the_smoke_study_is_the_comparison_it_asks_for():
    labels = [step.label for step in plan.comparison("smoke")]
    assert sorted(labels) == sorted(
        ["corpus", "teacher scratch", "targets sampled"]
        + [f"student {objective} seed {seed}" for objective in ("ce", "kd", "untrained") for seed in (1, 2)]
        + [f"{objective} ensemble 1, {pool} pool" for objective in ("ce", "kd") for pool in ("probability", "logit")]
        + ["untrained ensemble"]
    )


def test_upstream_comes_first_and_nothing_twice():
    seen = set()
    for step in plan.comparison("smoke"):
        assert {upstream.id for upstream in step.inputs.values()} <= seen
        assert step.id not in seen
        seen.add(step.id)


def test_pools_of_repeats_share_no_member(mine):
    steps = [
        step
        for step in plan.comparison(mine(study={"members": 2, "repeats": 2}))
        if step.label.startswith("kd ensemble")
    ]
    assert [step.parameters.seeds for step in steps if step.parameters.pool == "logit"] == [[1, 2], [3, 4]]


def test_neither_the_profiles_name_nor_speed_settings_make_other_runs(mine):
    assert ids(mine("other", student={"compile": True}, teacher={"compile": True})) == ids("smoke")


def group(step) -> str:
    """Runs that depend on the same things: those that learn from the teacher's targets, and those that do not."""
    if step.kind in ("student", "ensemble"):
        return f"kd {step.kind}" if " kd " in f" {step.label} " else f"other {step.kind}"
    return step.kind


@pytest.mark.parametrize(
    ("section", "change", "remade"),
    [
        (
            "corpus",
            {"train_tokens": 31000},
            "corpus teacher targets kd_student other_student kd_ensemble other_ensemble",
        ),
        ("teacher", {"learning_rate": 0.004}, "teacher targets kd_student kd_ensemble"),
        ("targets", {"draws": 16}, "targets kd_student kd_ensemble"),
        ("student", {"kd_weight": 0.5}, "kd_student kd_ensemble"),
        ("student", {"layers": 2}, "kd_student other_student kd_ensemble other_ensemble"),
        ("ensemble", {"precision": "bfloat16"}, "kd_ensemble other_ensemble"),
        ("analysis", {"resamples": 500}, ""),
    ],
)
def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(mine, section, change, remade):
    after = ids(mine(**{section: change}))
    found = {group(step) for step in plan.comparison("smoke") if step.id not in after}
    assert found == {name.replace("_", " ") for name in remade.split()}


@pytest.mark.parametrize("module", ["corpus", "models", "training", "cache", "ensemble"])
def test_edited_code_remakes_the_runs_it_shapes_and_what_reads_them(monkeypatch, module):
    before = {step.label: step for step in plan.comparison("smoke")}
    monkeypatch.setattr(
        plan, "code_versions", lambda modules: {one: "edited" if one == module else "r1" for one in modules}
    )
    versions = {step.label: (step.settings["code"], step.id) for step in plan.comparison("smoke")}
    monkeypatch.setattr(plan, "code_versions", lambda modules: dict.fromkeys(modules, "r1"))
    remade = {step.label for step in plan.comparison("smoke") if step.id != versions[step.label][1]}

    def expected(step) -> bool:
        return module in plan.CODE[step.kind] or any(expected(upstream) for upstream in step.inputs.values())

    assert remade == {label for label, step in before.items() if expected(step)} != set()


def test_what_a_profile_sets_for_one_objective_does_not_stand_in_the_way_of_the_others(mine):
    student = {"objective": "online_kd", "divergence": "jsd", "divergence_options": {"beta": 0.2}, "feature": "relation"}
    profile = mine(student=student, targets={"kind": "topk"})
    students = {step.parameters.objective: step for step in plan.comparison(profile) if step.kind == "student"}
    plain = {step.parameters.objective: step for step in plan.comparison("smoke") if step.kind == "student"}
    assert students["ce"].id == plain["ce"].id
    with pytest.raises(KdlibError, match="divergence jsd cannot be computed from targets of kind sampled"):
        plan.comparison(mine("other", student={"divergence": "jsd"}))
    with pytest.raises(KdlibError, match="divergence jsd needs a teacher"):
        profiles.parameters("04_student", profile, objective="ce", divergence="jsd")


def test_a_grid_has_a_run_for_every_cell_and_seed(mine):
    grid = {
        "seeds": [1, 2],
        "base": {"batch_size": 8},
        "students": {"CE": {"objective": "ce"}, "deeper": {"layers": 2, "batch_size": 4}},
        "vary": {"kd_weight": [0.1, 0.5], "temperature": [1.0, 2.0]},
    }
    found = design.cells(mine(study={"grids": {"weights": grid}}), "weights")
    varied = [f"kd_weight {weight}, temperature {temperature}" for weight in (0.1, 0.5) for temperature in (1.0, 2.0)]
    assert list(found) == ["CE", "deeper", *varied]
    assert all([step.parameters.seed for step in steps] == [1, 2] for steps in found.values())
    values = {cell: steps[0].parameters for cell, steps in found.items()}
    assert (values["CE"].objective, values["CE"].batch_size, values["CE"].layers) == ("ce", 8, 1)
    assert (values["deeper"].objective, values["deeper"].batch_size, values["deeper"].layers) == ("kd", 4, 2)
    assert [(values[cell].kd_weight, values[cell].temperature) for cell in varied] == [(0.1, 1), (0.1, 2), (0.5, 1), (0.5, 2)]
    # Each temperature has targets of its own, and all students of one share them.
    assert len({step.inputs["targets"].id for cell in varied for step in found[cell]}) == 2


def test_what_targets_are_worth_is_measured_of_every_student_of_their_grid(mine):
    profile = mine(study={"grids": {"targets": {"seeds": [3], "students": {"few": {"targets": {"draws": 2}}, "as ever": {}}}}})
    found = design.cells(profile, "targets")
    assert [step.kind for (step,) in found.values()] == ["fidelity", "fidelity"]
    assert found["few"][0].inputs["targets"].parameters.draws == 2
    assert found["few"][0].inputs["student"].parameters.seed == 3


def test_a_grid_is_part_of_the_study_once_it_was_asked_for(mine, home):
    grids = {name: {"seeds": [1], "students": {"deep": {"layers": layers}}} for name, layers in (("losses", 2), ("data", 3))}
    profile = mine(study={"grids": grids})
    asked = design.begun(profile, ["data"])
    assert design.begun(profile) == () and asked == ("data",)
    assert {step.id for step in design.study(profile, asked)} - ids(profile) == {design.cells(profile, "data")["deep"][0].id}
    design.write(profile, asked)
    assert design.begun(profile) == ("data",) and design.begun(profile, ["all"]) == ("data", "losses")
    assert design.begun(profile, ["losses"]) == ("data", "losses")
    written = store.read_json(home / "results" / "mine" / "plan.json")["grids"]["data"]
    assert written["cells"] == [["deep", [design.cells(profile, "data")["deep"][0].id]]]
    assert {entry["id"] for entry in written["runs"]} > {one for _, ids in written["cells"] for one in ids}


@pytest.mark.parametrize(
    ("grids", "told"),
    [
        ({}, "has no grid 'losses' under study: grids; found none"),
        ({"data": {"seeds": [1], "students": {"a": {}}}}, "has no grid 'losses' under study: grids; found data"),
        ({"losses": {"seeds": [1], "students": {"a": {"layers": 2}, "b": {"layers": 2}}}}, "'b' and 'a' are one and the same"),
        ({"losses": {"seeds": [1, 1], "students": {"a": {}}}}, "'a' and 'a' are one and the same"),
        ({"losses": {"seeds": [1], "students": {"a": {"layer": 2}}}}, "Unknown parameter 'layer'.*Did you mean 'layers'"),
        ({"losses": {"seeds": [1]}}, "a grid needs students, or parameters to vary"),
        ({"loses": {"seeds": [1], "students": {"a": {}}}}, "loses.*Input should be 'targets'"),
    ],
)
def test_a_grid_that_cannot_be_made_is_refused_before_anything_runs(mine, grids, told):
    with pytest.raises(KdlibError, match=told):
        design.begun(mine(study={"grids": grids}), ["losses"])


def test_redrawn_targets_read_the_dense_ones_of_their_teacher():
    values = profiles.parameters("03_targets", "smoke", source="dense", draws=8)
    assert (
        plan.step(values).inputs["dense"].id == plan.step(profiles.parameters("03_targets", "smoke", kind="dense")).id
    )
    with pytest.raises(KdlibError, match="leave out source"):
        profiles.parameters("03_targets", "smoke", source="dense", kind="dense")
    precise = plan.step(profiles.parameters("03_targets", "smoke", source="dense", precision="bfloat16")).inputs[
        "dense"
    ]
    assert (precise.parameters.kind, precise.parameters.precision) == ("dense", "bfloat16")


def test_fresh_draws_are_one_cache_a_student_and_one_pass_of_the_teacher():
    def student(seed, **changes):
        changes = {"targets": {"source": "dense", "draws": 8}, "fresh_draws": True, **changes}
        return plan.step(profiles.parameters("04_student", "smoke", seed=seed, **changes))

    drawn = [student(seed).inputs["targets"] for seed in (1, 2)]
    assert [one.parameters.seed for one in drawn] == [1, 2] and drawn[0].id != drawn[1].id
    assert drawn[0].inputs["dense"].id == drawn[1].inputs["dense"].id
    shared = [student(seed, fresh_draws=False).inputs["targets"].id for seed in (1, 2)]
    assert shared[0] == shared[1]
    members = profiles.parameters("05_ensemble", "smoke", student={"targets": {"source": "dense"}, "fresh_draws": True})
    assert len({step.inputs["targets"].id for name, step in plan.step(members).inputs.items() if name != "corpus"}) == 2
    for targets in ({}, {"kind": "topk", "source": "dense"}, {"kind": "dense"}):
        with pytest.raises(KdlibError, match="expected targets with source dense and kind sampled or topk_sampled, found"):
            student(1, targets=targets)
    with pytest.raises(KdlibError, match="fresh_draws are of cached targets"):
        student(1, objective="ce", targets={})


def test_targets_from_outside_count_by_what_they_are_and_not_by_where(tmp_path):
    def targets(source):
        return plan.step(profiles.parameters("03_targets", "smoke", kind="topk", source=source))

    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.h5").write_bytes(content)
    files = [targets(str(tmp_path / f"{name}.h5")).id for name in "abc"]
    assert files[0] == files[1] != files[2]
    here, there, other = (targets(source).id for source in ("http://here:1#m", "https://there/v1#m", "http://here:1#n"))
    assert here == there != other
    assert targets("http://here:1#m").inputs.keys() == {"corpus"}
    with pytest.raises(KdlibError, match="expected kind topk and temperature 1, found sampled"):
        profiles.parameters("03_targets", "smoke", source="http://here:1#m")
    with pytest.raises(KdlibError, match="must be one of"):
        assert targets(str(tmp_path / "missing.h5")).id


def test_a_file_of_targets_is_known_by_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.h5").write_bytes(b"one")
    monkeypatch.chdir(tmp_path)
    steps = [
        plan.step(profiles.parameters("03_targets", "smoke", kind="topk", source=source))
        for source in ("~/a.h5", "a.h5", str(tmp_path / "a.h5"))
    ]
    assert {one.parameters.source for one in steps} == {str(tmp_path / "a.h5")}
    assert len({one.id for one in steps}) == 1
    student = {"targets": {"kind": "topk", "source": "a.h5"}}
    assert profiles.parameters("04_student", "smoke", **student).targets["source"] == str(tmp_path / "a.h5")
    for notebook in ("05_ensemble", "06_fidelity"):
        found = profiles.parameters(notebook, "smoke", student=student).student
        assert found["targets"]["source"] == str(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("changes", "inputs"),
    [
        ({"objective": "ce"}, {"corpus"}),
        ({"objective": "kd"}, {"corpus", "targets"}),
        ({"objective": "kd", "initialisation": "embeddings"}, {"corpus", "targets", "teacher"}),
        ({"objective": "ce", "text": "teacher"}, {"corpus", "teacher"}),
        (
            {"objective": "ce", "selection": {"by": "teacher_nll", "mode": "highest", "share": 0.5}},
            {"corpus", "targets"},
        ),
        ({"objective": "ce", "selection": {"by": "student_nll", "mode": "lowest", "share": 0.5}}, {"corpus", "scorer"}),
        ({"objective": "online_kd", "feature": "relation"}, {"corpus", "teacher"}),
    ],
)
def test_a_student_reads_what_its_settings_ask_for(changes, inputs):
    assert plan.step(profiles.parameters("04_student", "smoke", **changes)).inputs.keys() == inputs


def test_what_a_profiles_sections_say_does_not_lead_in_circles(mine):
    by_student = {"by": "student_nll", "mode": "highest", "share": 0.5}
    profile = mine("chosen", student={"selection": {"mode": "random", "share": 0.5}})
    chosen = plan.step(profiles.parameters("04_student", profile, selection=by_student))
    assert chosen.inputs["scorer"].parameters.selection is None
    profile = mine("redrawn", targets={"kind": "topk", "source": "http://here:1#m"})
    redrawn = plan.step(profiles.parameters("03_targets", profile, source="dense"))
    assert redrawn.inputs["dense"].parameters.source == "teacher"


def test_a_schedule_that_cross_entropy_does_not_read_makes_no_other_student():
    schedule = {"shape": "linear", "start": 1, "end": 0}
    plain, scheduled = (
        plan.step(profiles.parameters("04_student", "smoke", objective="ce", kd_weight_schedule=one)).id
        for one in (None, schedule)
    )
    assert plain == scheduled


@pytest.mark.parametrize(
    ("divergence", "kind", "served"),
    [
        ("forward_kl", "sampled", True),
        ("reverse_kl", "sampled", False),
        ("reverse_kl", "topk_sampled", False),
        ("jsd", "topk", True),
        ("sinkhorn", "topk", False),
        ("logit_mse", "dense", True),
    ],
)
def test_targets_that_cannot_serve_a_divergence_are_refused_before_anything_runs(divergence, kind, served):
    values = profiles.parameters("04_student", "smoke", divergence=divergence, targets={"kind": kind})
    if served:
        assert plan.step(values).inputs["targets"].parameters.kind == kind
    else:
        with pytest.raises(KdlibError, match=f"{divergence} cannot be computed from targets of kind {kind}"):
            plan.step(values)


@pytest.mark.parametrize("objective", ["kd", "ce"])
def test_targets_of_another_temperature_than_the_students_are_refused_before_anything_runs(objective):
    def student(**changes):
        selection = {"by": "teacher_nll", "mode": "highest", "share": 0.5}
        return plan.step(
            profiles.parameters("04_student", "smoke", objective=objective, selection=selection, **changes)
        )

    with pytest.raises(
        KdlibError, match="student has temperature 1.0, and its targets would be kept at 2.0.*Leave temperature"
    ):
        student(targets={"temperature": 2.0})
    assert student(targets={"temperature": 2.0}, temperature=2.0).inputs["targets"].parameters.temperature == 2
    assert student(targets={"temperature": 2.0, "kind": "dense"}).inputs["targets"]


def test_sources_are_part_of_the_corpus_they_make(monkeypatch):
    before = {step.kind: step.id for step in design.study("smoke")}
    plan.study.cache_clear()
    plan._identity.cache_clear()
    monkeypatch.setattr(plan.sources, "identity", lambda source: "another file")
    assert {step.kind: step.id for step in design.study("smoke")}["corpus"] != before["corpus"]


@pytest.mark.parametrize("profile", ["smoke", "quick", "laptop", "gpu", "babylm", "paper"])
def test_the_command_of_every_step_makes_that_very_step(profile):
    for step in design.study(profile, design.begun(profile, ["all"])):
        words = shlex.split(plan.command(step))
        assert words[:3] == ["python", "-m", "kdlib.study.runner"]
        options = runner._options(words[3:])
        values = profiles.parameters(
            options.notebook.removeprefix("notebooks/").removesuffix(".ipynb"),
            options.profile,
            **runner.changes(options.set),
        )
        assert plan.step(values).id == step.id


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=6
)


@settings(deadline=None)
@given(VALUES)
def test_a_value_on_a_command_line_is_read_back_as_it_was(value):
    text = plan._yaml(value)
    assert text.isascii()
    # As text, since 1, 1.0 and True are equal, and so are mappings in another order.
    assert repr(runner.changes(shlex.split(shlex.join([f"a={text}"])))["a"]) == repr(value)


def test_small_numbers_and_any_script_pass_through_a_shell(mine):
    student = {
        "learning_rate": 5e-05,
        "learning_rate_multipliers": {"mlp": 3e-05, "é😀'$HOME": 1e22, "on": 1.0, "": 0.5},
    }
    one = plan.step(profiles.parameters("05_ensemble", mine(), student=student))
    printed = plan.command(one).replace("python -m kdlib.study.runner", r"printf '%s\n'", 1)
    passed = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, check=True).stdout
    options = runner._options(passed.splitlines())
    assert runner.changes(options.set) == {"student": student}
    assert plan.step(profiles.parameters("05_ensemble", options.profile, **runner.changes(options.set))).id == one.id


@pytest.mark.parametrize("stages", [False, True])
def test_the_order_of_multipliers_makes_another_student_and_its_command_tells_it(mine, stages):
    # The profile's file has them in the order of their names.
    orders = {"layers.0": 0.1, "mlp": 1.0}, {"mlp": 1.0, "layers.0": 0.1}

    def student(multipliers):
        staged = {"stages": [{"share": 1.0, "learning_rate_multipliers": multipliers}]}
        return staged if stages else {"learning_rate_multipliers": multipliers}

    profile = mine(student=student(orders[0]))
    one, other = (plan.step(profiles.parameters("04_student", profile, **student(order))) for order in orders)
    assert one.id != other.id
    for step in (one, other):
        changes = runner.changes(runner._options(shlex.split(plan.command(step))[3:]).set)
        assert plan.step(profiles.parameters("04_student", profile, **changes)).id == step.id


@pytest.mark.parametrize("profile", profiles.available())
def test_a_study_is_planned_without_network(profile, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "empty"))
    assert design.study(profile, design.begun(profile, ["all"]))


def test_a_mix_of_domains_that_the_corpus_lacks_is_refused_before_anything_runs():
    selection = {"mode": "random", "share": 0.5, "domains": {"speeches": 1, "poems": 2}}
    with pytest.raises(KdlibError, match="names the domains poems.*expected some of speeches, country"):
        plan.step(profiles.parameters("04_student", "smoke", selection=selection))


def test_a_missing_run_is_told_with_the_command_that_makes_it():
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    with pytest.raises(
        KdlibError,
        match=f"{step.id} .student kd seed 3. has not been made yet. Make it with: python -m kdlib.study.runner .*seed=3",
    ):
        step.run()


def test_parameters_that_describe_no_run_are_refused():
    with pytest.raises(KdlibError, match="AnalysisParameters describes no run"):
        plan.step(profiles.parameters("10_objectives", "smoke"))


def test_the_written_plan_names_every_run_and_stays_untouched_while_true(home):
    design.write("smoke")
    path = home / "results" / "smoke" / "plan.json"
    written = json.loads(path.read_text())
    assert [entry["id"] for entry in written["runs"]] == [step.id for step in plan.comparison("smoke")]
    before = path.stat()
    design.write("smoke")
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_a_plan_that_is_no_longer_true_is_written_anew(home, monkeypatch):
    design.write("smoke")
    fewer = plan.comparison("smoke")[:3]
    monkeypatch.setattr(plan, "comparison", lambda profile: fewer)
    design.write("smoke")
    assert [entry["id"] for entry in store.read_json(home / "results" / "smoke" / "plan.json")["runs"]] == [
        step.id for step in fewer
    ]
    monkeypatch.undo()


def test_a_step_cannot_be_changed_after_its_id_is_known():
    step = design.study("smoke")[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.kind = "teacher"
