import dataclasses
import json
import socket

import pytest
import yaml

from kdlib.errors import KdlibError
from kdlib.study import design, plan, profiles, revisions, store
from kdlib.study.kinds import kinds


def forget():
    for cached in (design.comparison, design.study, design.cells):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.fixture
def mine(tmp_path):
    """Writes a variant of the smoke profile and returns its path."""

    def write(name="mine", **sections) -> str:
        values = profiles.read_yaml((profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
        for section, changes in sections.items():
            values[section].update(changes)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, "name": name}))
        return str(path)

    return write


def ids(profile: str, *kinds: str) -> set[str]:
    return {step.id for step in design.study(profile) if not kinds or step.kind in kinds}


def test_the_smoke_study_is_the_comparison_it_asks_for():
    labels = {step.label for step in design.study("smoke")}
    wanted = {"corpus", "teacher scratch", "targets sampled", "scores by kl", "2 clusters"}
    wanted |= {f"student {objective} seed {seed}" for objective in ("ce", "kd", "untrained") for seed in (1, 2)}
    wanted |= {f"{name} ensemble 1, {pool} pool" for name in ("CE", "KD") for pool in ("probability", "logit")}
    wanted |= {"untrained ensemble 1, probability pool", "2 students together, coupling 0.25, logit pool"}
    wanted |= {f"member {number} of students trained together" for number in (1, 2)}
    methods = profiles.load("smoke").study.methods
    assert labels == wanted | {f"{name} 1, {pool} pool" for name in methods for pool in ("probability", "logit")}


def test_every_entry_tells_which_part_its_run_plays(mine):
    study = {"members": 2, "repeats": 2, "methods": {"half": {"method": "bagging", "share": 0.5, "student": {"objective": "ce"}}}}
    entries = design.comparison(mine(study=study))
    assert {(one.method, one.role, one.objective, one.pool, one.repeat) for one in entries} == (
        {("teacher (from scratch)", "teacher", None, None, 1)}
        | {(f"{name} student", "single", name.lower(), None, seed) for name in ("CE", "KD") for seed in (1, 2, 3, 4)}
        | {
            (f"{name} ({pool} pool)", "ensemble", objective, pool, repeat)
            for name, objective in (("CE ensemble", "ce"), ("KD ensemble", "kd"), ("half", "ce"))
            for pool in ("probability", "logit")
            for repeat in (1, 2)
        }
        | {("untrained ensemble", "ensemble", "untrained", "probability", 1)}
    )
    assert len({one.step.id for one in entries}) == len(entries)
    singles = {(one.objective, one.repeat): one.step.id for one in entries if one.role == "single"}
    for one in entries:
        members = {name: run.id for name, run in one.step.inputs.items() if name.startswith("member ")}
        assert set(members.values()) == {member.id for member in one.members} and bool(members) is (one.role == "ensemble")
        assert [member.parameters.seed for member in one.members] == [2 * one.repeat - 1, 2 * one.repeat] * bool(members)
        if one.method.startswith(("CE ensemble", "KD ensemble")):
            assert [member.id for member in one.members] == [singles[one.objective, member.parameters.seed] for member in one.members]
    half = [one for one in entries if one.method.startswith("half")]
    assert {str(member.parameters.text) for one in half for member in one.members} == {
        str({"bagged": {"share": 0.5, "seed": seed}}) for seed in (1, 2, 3, 4)
    }


def test_upstream_comes_first_and_nothing_twice():
    seen = set()
    for step in design.study("smoke"):
        assert {upstream.id for upstream in step.inputs.values()} <= seen
        assert step.id not in seen
        seen.add(step.id)


def test_pools_of_repeats_share_no_member(mine):
    found = [one for one in design.comparison(mine(study={"members": 2, "repeats": 2})) if one.method.startswith("KD ensemble")]
    assert [one.step.parameters.seeds for one in found if one.pool == "logit"] == [[1, 2], [3, 4]]


def test_neither_the_profiles_name_nor_speed_settings_make_other_runs(mine):
    assert ids(mine("other", student={"compile": True}, teacher={"compile": True})) == ids("smoke")


def group(step) -> str:
    """Runs that depend on the same things: those that learn from the teacher's targets, and those that do not."""
    if step.kind in ("student", "ensemble"):
        return f"{'kd' if any(one.kind == 'targets' for one in step.upstream()) else 'other'} {step.kind}"
    # Targets of a student, as in a chain, change with it.
    taught_by = step.inputs.get("teacher")
    return "kd student" if step.kind == "targets" and taught_by is not None and taught_by.kind == "student" else step.kind


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
    ],
)
def test_a_changed_setting_remakes_what_depends_on_it_and_nothing_else(mine, section, change, remade):
    # Methods whose members differ in what they rest on: a pool that teaches, or text that a teacher wrote.
    few = {"study": {"methods": {"bagging": {"share": 0.7}, "chain": {}}}}
    before, after = mine("before", **few), ids(mine("after", **few, **{section: change}))
    found = {group(step) for step in design.study(before) if step.id not in after}
    assert found == {name.replace("_", " ") for name in remade.split()}


@pytest.mark.parametrize("kind", kinds())
def test_edited_code_remakes_the_runs_it_shapes_and_what_reads_them(monkeypatch, kind):
    grids = ("targets",)
    before = design.study("smoke", grids)
    monkeypatch.setattr(plan, "code_version", lambda one: "edited" if one == kind else revisions.code_version(one))
    forget()
    after = design.study("smoke", grids)
    assert sorted(step.label for step in before) == sorted(step.label for step in after)
    kept = {step.id for step in before} & {step.id for step in after}
    expected = {step.id for step in before if kind not in {one.kind for one in step.upstream()}}
    assert kept == expected and len(kept) < len(before)


def test_what_a_profile_sets_for_one_objective_does_not_stand_in_the_way_of_the_others(mine):
    student = {"objective": "online_kd", "divergence": {"jsd": {"beta": 0.2}}, "features": {"of": "relation"}}
    # Not every method takes every teacher and target: boosting reads whole distributions, and features one model.
    profile = mine(student=student, targets={"kind": "topk"}, study={"methods": {"bagging": {"share": 0.7}}})
    students, plain = (
        {one.objective: one.step for one in design.comparison(name) if one.role == "single"} for name in (profile, "smoke")
    )
    assert students["ce"].id == plain["ce"].id
    with pytest.raises(KdlibError, match="Targets of divergence jsd must be of kind topk or dense, got sampled"):
        design.study(mine("other", student={"divergence": "jsd"}, study={"methods": {}}))
    with pytest.raises(KdlibError, match="objective must be kd or online_kd for a divergence, got ce with jsd"):
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
        ({}, r"grid must be one of .*grids \(none\), got 'losses'"),
        ({"data": {"seeds": [1], "students": {"a": {}}}}, r"grid must be one of .*grids \(data\), got 'losses'"),
        ({"losses": {"seeds": [1], "students": {"a": {"layers": 2}, "b": {"layers": 2}}}}, "must be different, got 'b' and 'a' alike"),
        ({"losses": {"seeds": [1, 1], "students": {"a": {}}}}, r"seeds must be unique, got \[1, 1\]"),
        ({"losses": {"seeds": [1], "students": {"a": {"layer": 2}}}}, "Unknown parameter 'layer'.*Did you mean 'layers'"),
        ({"losses": {"seeds": [1]}}, "a grid needs students, parameters to vary, or ensembles"),
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
        with pytest.raises(KdlibError, match="must have source dense and kind sampled or topk_sampled, got"):
            student(1, targets=targets)
    with pytest.raises(KdlibError, match="objective must be kd for fresh_draws, got ce"):
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
    with pytest.raises(KdlibError, match="must have kind topk and temperature 1, got sampled"):
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
        ({"objective": "ce", "text": "generated"}, {"corpus", "writer"}),
        ({"objective": "ce", "text": "uniform"}, {"corpus"}),
        ({"objective": "ce", "text": {"bagged": {"share": 0.5, "seed": 1}}}, {"corpus"}),
        ({"objective": "ce", "text": {"selected": {"measure": "nll", "mode": "highest", "share": 0.5}}}, {"corpus", "scores"}),
        ({"objective": "ce", "text": {"selected": {"mode": "random", "share": 0.5}}}, {"corpus"}),
        ({"objective": "online_kd", "features": {"of": "relation"}}, {"corpus", "teacher"}),
    ],
)
def test_a_student_reads_what_its_settings_ask_for(changes, inputs):
    assert plan.step(profiles.parameters("04_student", "smoke", **changes)).inputs.keys() == inputs


def test_what_chooses_text_is_scored_once_for_all_that_choose_by_it():
    def chosen(**changes):
        by = {"measure": "nll", "mode": "highest", "share": 0.5, "by": {"student": {"objective": "ce", "seed": 1}}, **changes}
        return plan.step(profiles.parameters("04_student", "smoke", objective="ce", seed=3, text={"selected": by}))

    one, other = chosen(), chosen(mode="lowest", share=0.4)
    assert one.id != other.id and one.inputs["scores"].id == other.inputs["scores"].id
    assert one.inputs["scores"].inputs["scorer"].label == "student ce seed 1"
    assert chosen(measure="entropy").inputs["scores"].id != one.inputs["scores"].id
    assert chosen(by=None).inputs["scores"].inputs["scorer"].kind == "targets"


def test_dense_targets_to_draw_from_come_from_the_teacher_whatever_the_section_says(mine):
    profile = mine("redrawn", targets={"kind": "topk", "source": "http://here:1#m"})
    redrawn = plan.step(profiles.parameters("03_targets", profile, source="dense"))
    assert redrawn.inputs["dense"].parameters.source == "teacher"


def test_a_schedule_that_cross_entropy_does_not_read_makes_no_other_student():
    schedule = {"shape": "linear", "start": 1, "end": 0}
    plain, scheduled = (
        plan.step(profiles.parameters("04_student", "smoke", objective="ce", kd_weight=one)).id
        for one in (0.9, schedule)
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
        with pytest.raises(KdlibError, match=f"Targets of divergence {divergence} must be of kind .*, got {kind}"):
            plan.step(values)


@pytest.mark.parametrize("objective", ["kd", "ce"])
def test_targets_of_another_temperature_than_the_students_are_refused_before_anything_runs(objective):
    def student(**changes):
        text = {"selected": {"measure": "nll", "mode": "highest", "share": 0.5}}
        return plan.step(
            profiles.parameters("04_student", "smoke", objective=objective, text=text, **changes)
        )

    with pytest.raises(
        KdlibError, match=r"temperature of targets must be the student's \(1.0\), got 2.0. Leave it out, or use kind dense"
    ):
        student(targets={"temperature": 2.0})
    one = student(targets={"temperature": 2.0}, temperature=2.0)
    assert one.inputs["scores"].inputs["scorer"].parameters.temperature == 2
    assert student(targets={"temperature": 2.0, "kind": "dense"}).inputs["scores"].inputs["scorer"].parameters.kind == "dense"


def test_sources_are_part_of_the_corpus_they_make_and_so_of_all_that_reads_it(monkeypatch):
    before = ids("smoke")
    forget()
    monkeypatch.setattr(kinds()["corpus"], "downloads", lambda values: {"speeches": "another file"})
    assert not ids("smoke") & before and ids("smoke")


@pytest.mark.parametrize("profile", profiles.available())
def test_every_planned_run_is_found_by_its_id(profile):
    grids = design.begun(profile, ["all"])
    for step in design.study(profile, grids)[::7]:
        assert design.find(profile, step.id).id == step.id
    shared = [step for step in design.study(profile, grids) if step.label == "corpus"]
    assert design.find(profile, "corpus").id == shared[0].id and len(shared) == 1


def test_a_label_that_several_runs_have_names_none(mine):
    study = {"methods": {"half": {"method": "bagging", "share": 0.5}}}
    with pytest.raises(KdlibError, match="'student kd seed 1' must name one run, got student-.*, student-.*Give the id"):
        design.find(mine(study=study), "student kd seed 1")
    with pytest.raises(KdlibError, match="'student kd seed 99' must be the id or label of a run that profile .*kdlib list --runs"):
        design.find("smoke", "student kd seed 99")


def test_shares_of_a_study_are_all_of_it_and_do_not_overlap(home):
    grids = ["targets"]
    parts = [design.share("smoke", grids, None, f"{part}/3") for part in range(3)]
    found = [step.id for part in parts for step in part]
    assert sorted(found) == sorted(step.id for step in design.study("smoke", ("targets",))) and len(set(found)) == len(found)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert {step.kind for step in design.share("smoke", grids, ["teacher", "corpus"], "0/1")} == {"teacher", "corpus"}
    assert store.grids("smoke") == grids, "the plan is kept beside the results"


@pytest.mark.parametrize("part", ["1/1", "2/2", "1", "a/2", "-1/2", "0/0", "", "1/2/3"])
def test_a_share_that_is_none_is_refused(part, home):
    with pytest.raises(KdlibError, match="--share must be I/N with I from 0 to N - 1"):
        design.share("smoke", [], None, part)
    with pytest.raises(KdlibError, match="--kinds must be among corpus, .*got studnet"):
        design.share("smoke", [], ["studnet"], "0/1")
    assert not (home / "results").exists()


@pytest.mark.parametrize("stages", [False, True])
def test_the_order_of_multipliers_makes_another_student(mine, stages):
    # The profile's file has them in the order of their names.
    orders = {"layers.0": 0.1, "mlp": 1.0}, {"mlp": 1.0, "layers.0": 0.1}

    def student(multipliers):
        staged = {"stages": [{"share": 1.0, "learning_rate_multipliers": multipliers}]}
        return staged if stages else {"learning_rate_multipliers": multipliers}

    profile = mine(student=student(orders[0]))
    one, other = (plan.step(profiles.parameters("04_student", profile, **student(order))) for order in orders)
    assert one.id != other.id
    for step in (one, other):
        assert plan.step(profiles.parameters("04_student", profile, **step.parameters.model_dump(mode="json"))).id == step.id


@pytest.mark.parametrize("profile", profiles.available())
def test_a_study_is_planned_without_network(profile, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "empty"))
    assert design.study(profile, design.begun(profile, ["all"]))


def test_a_mix_of_domains_that_the_corpus_lacks_is_refused_before_anything_runs():
    text = {"selected": {"mode": "random", "share": 0.5, "domains": {"speeches": 1, "poems": 2}}}
    with pytest.raises(KdlibError, match="domains of a selection must be among speeches, country, got poems"):
        plan.step(profiles.parameters("04_student", "smoke", text=text))


def test_a_missing_run_is_told_with_the_command_that_makes_it():
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    with pytest.raises(
        KdlibError,
        match=f"{step.id} .student kd seed 3. has not been made yet. Make it with: kdlib make {step.id} --profile smoke",
    ):
        step.run()


def test_parameters_that_describe_no_run_are_refused():
    with pytest.raises(KdlibError, match="parameters must be of a run .*, got AnalysisParameters"):
        plan.step(profiles.parameters("10_objectives", "smoke"))


def test_the_written_plan_names_every_run_and_stays_untouched_while_true(home):
    design.write("smoke")
    path = home / "results" / "smoke" / "plan.json"
    written = json.loads(path.read_text())
    assert [entry["id"] for entry in written["runs"]] == [step.id for step in design.study("smoke")]
    assert written["entries"] == [entry.record() for entry in design.comparison("smoke")] and "grids" not in written
    before = path.stat()
    design.write("smoke")
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_a_plan_that_is_no_longer_true_is_written_anew(home, monkeypatch):
    design.write("smoke")
    fewer = design.comparison("smoke")[:3]
    monkeypatch.setattr(design, "comparison", lambda profile: fewer)
    design.write("smoke")
    written = store.read_json(home / "results" / "smoke" / "plan.json")
    assert [one["run"] for one in written["entries"]] == [entry.step.id for entry in fewer]
    assert [one["id"] for one in written["runs"]] == [one.id for one in plan.with_upstream([entry.step for entry in fewer])]


def test_a_step_cannot_be_changed_after_its_id_is_known():
    step = design.study("smoke")[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.kind = "teacher"
