"""The smoke study from raw text to the PDF, through Snakemake and papermill: killed, resumed, called again, edited."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_notebooks
import forked
import pytest

from kdlib.__main__ import main
from kdlib.analysis import outputs
from kdlib.study import design, notebooks, store
from kdlib.study.kinds import kinds
from kdlib.study.profiles import REPOSITORY, available

GRIDS = ("targets", "weights")
# What a run measures about the machine, not about the model.
MEASURED = {"cost", "seconds", "tokens_per_second", "peak_memory_bytes", "peak_device_bytes"}
ASKED = f"grids={' '.join(GRIDS)}"


# What every call of Snakemake starts with; none of it depends on where results lie.
PREPARED = """
import pandas, snakemake.api, snakemake.cli, snakemake.report.html_reporter
from kdlib.analysis import outputs
from kdlib.study import closure, design, kinds, revisions, runner
snakemake.cli.get_argument_parser()
for kind in kinds.kinds():
    revisions.code_version(kind)
"""


@pytest.fixture(scope="module")
def interpreter():
    """Runs what only plans, which takes less time than its imports."""
    with forked.server(PREPARED) as server:
        yield server


def command(*arguments: str, profile: str = "smoke", cores: int = 1) -> list[str]:
    """Snakemake as ``make paper`` calls it, but with one core: the others have tests of their own."""
    # Arguments may begin with settings: what follows --config is one, up to the next option.
    return ["-m", "snakemake", "--cores", str(cores), "--config", f"profile={profile}", *arguments]


def environment(home: Path) -> dict[str, str]:
    """That of a command which writes to ``home``, with the threads that Snakemake gives its jobs: others would round otherwise."""
    return {**os.environ, "KDLIB_HOME": str(home), "OMP_NUM_THREADS": "1"}


def started(home: Path, *arguments: str) -> subprocess.Popen:
    """Snakemake in a session of its own, with results and notebooks under ``home``."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *command(*arguments)], cwd=REPOSITORY, env=environment(home), start_new_session=True, **streams
    )


def finished(process: subprocess.Popen) -> str:
    """The output of a command that succeeds."""
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    return out


def told(interpreter: forked.Server, home: Path, *arguments: str, **options) -> str:
    """The output of a call that succeeds, and starts no job."""
    status, out = interpreter.run(*command(*arguments, **options), cwd=REPOSITORY, env=environment(home))
    assert status == 0, out
    return out


def jobs(interpreter: forked.Server, home: Path) -> set[str]:
    """Rules that a call would run now."""
    out = told(interpreter, home, "--dry-run", "--quiet", "rules")
    if "Nothing to be done" in out:
        return set()
    table = out.split("Job stats:")[1].split("total")[0]
    return {line.split()[0] for line in table.splitlines()[3:] if line.strip()} - {"all"}


def files(home: Path) -> dict[str, int]:
    """Everything a study has written, with the time it was written."""
    folders = [home / "results", home / "figures", home / "paper"]
    return {str(path.relative_to(home)): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def what_was_learned(metrics):
    """Metrics without what the machine's speed decides."""
    if isinstance(metrics, dict):
        return {name: what_was_learned(value) for name, value in metrics.items() if name not in MEASURED}
    return [what_was_learned(value) for value in metrics] if isinstance(metrics, list) else metrics


@pytest.fixture(scope="module")
def study(tmp_path_factory, one_thread):
    """A smoke study, killed while it trained a student, then resumed: (home, what was finished, the student)."""
    # A name that a shell would read as something else.
    home = tmp_path_factory.mktemp("home") / "user's $tudies"
    shutil.copytree(REPOSITORY / "notebooks", home / "notebooks")
    results = home / "results" / "smoke"
    planned = design.study("smoke", GRIDS)
    read = {upstream.id for step in planned for upstream in step.inputs.values()}
    # A student that learns from the teacher, and that no other run would make.
    killed = next(step for step in planned if step.kind == "student" and "targets" in step.inputs and step.id not in read)
    first = started(home, ASKED, "--prioritize", f"results/smoke/runs/{killed.id}/metrics.json")
    deadline = time.monotonic() + 600
    while not list((results / "work").glob(f"{killed.id}/*")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    time.sleep(random.uniform(0, 1.5))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    time.sleep(2)  # the kernel notices within a second that its runner is gone
    done = {path: path.stat().st_mtime_ns for path in (results / "runs").glob("*/metrics.json")}
    cut = {path.name for path in (results / "work").iterdir() if path.is_dir()}
    # Most of the rest is made in this process, in a fraction of the time; one run of each kind is left to the pipeline.
    last = {step.kind: step.id for step in planned if step.kind in ("ensemble", "fidelity")}
    left = {*cut, killed.id, *last.values()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        assert main(["make", *(step.id for step in planned if step.id not in left), "--profile", "smoke"]) == 0
        # Students were made of these; once more, each in its notebook as the pipeline makes it.
        again = {step.kind: step.id for step in planned if step.kind in ("scores", "clusters", "joint", "member")}.values()
        for one in again:
            shutil.rmtree(results / "runs" / one)
        assert main(["make", *again, "--profile", "smoke", "--notebooks"]) == 0
    assert len(left - set(os.listdir(results / "runs"))) >= 2, "nothing is left to the pipeline"
    finished(started(home))
    return home, done, killed


@pytest.mark.slow
def test_a_killed_study_is_finished_when_it_is_called_again(study, monkeypatch):
    home, done, _ = study
    monkeypatch.setenv("KDLIB_HOME", str(home))
    planned = design.study("smoke", GRIDS)
    assert set(os.listdir(home / "results" / "smoke" / "runs")) == {step.id for step in planned}
    executed = {path.stem.split("-")[0] for path in (home / "results" / "smoke" / "executed").iterdir()}
    assert executed == {kinds()[step.kind].NOTEBOOK for step in planned} | set(outputs.analyses(GRIDS))
    assert list((home / "results" / "smoke" / "work").iterdir()) == []
    assert (home / "paper" / "kdlib-smoke.pdf").read_bytes().startswith(b"%PDF")
    assert {path.stem for path in (home / "results" / "smoke" / "numbers").iterdir()} == set(outputs.analyses(GRIDS))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished run was made again"


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_numbers_of_one_that_was_not(study, tmp_path, monkeypatch):
    home, _, killed = study
    monkeypatch.setenv("KDLIB_HOME", str(home))
    resumed = killed.run().metrics
    assert (home / "results" / "smoke" / "executed" / f"04_student-{killed.id.partition('-')[2]}.ipynb").is_file()
    upstream = tmp_path / "results" / "smoke" / "runs"
    for needed in killed.inputs.values():
        shutil.copytree(needed.run().path, upstream / needed.id)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    assert main(["make", killed.id, "--profile", "smoke"]) == 0
    assert killed.run().path.is_relative_to(tmp_path)
    assert what_was_learned(killed.run().metrics) == what_was_learned(resumed)


@pytest.mark.slow
def test_where_only_results_are_left_what_a_missing_run_reads_is_a_job_of_its_own(study, interpreter, tmp_path, monkeypatch):
    home, _, _ = study
    shutil.copytree(home / "results", tmp_path / "results")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    step = next(step for step in design.study("smoke") if step.kind == "student" and step.parameters.objective == "kd")
    lost = step.run()
    learned = what_was_learned(lost.metrics)
    shutil.rmtree(lost.path)
    folder = tmp_path / "results" / "smoke" / "runs"
    for run in folder.iterdir():
        for artefact in {kind.LEAVES for kind in kinds().values() if kind.LEAVES}:
            shutil.rmtree(run / artefact, ignore_errors=True)
    before = {path: path.read_bytes() for path in folder.glob("*/*") if path.is_file()}
    read = {f"artefact_{one.id.replace('-', '_')}" for one in step.upstream()[:-1]}
    assert {job for job in jobs(interpreter, tmp_path) if job.startswith("artefact")} == read, "no student makes its teacher behind a lock"
    shutil.rmtree(tmp_path / "results" / "smoke" / "executed")
    finished(started(tmp_path, "--", f"results/smoke/runs/{step.id}/metrics.json"))
    (path,) = (tmp_path / "results" / "smoke" / "executed").iterdir()
    assert re.findall(r"making (\w+)", path.read_text(encoding="utf-8")) == ["student"]
    assert what_was_learned(step.run().metrics) == learned and step.run().artefact.is_dir()
    assert {path: path.read_bytes() for path in before} == before, "results that were there stay"
    again = [json.loads(path.read_text()) for path in folder.glob("*/again.json")]
    assert len(again) == len(read) and all(one["times"][0]["largest_difference"] == 0 for one in again)


def test_side_by_side_shares_are_checked_and_errors_told(capsys):
    assert main(["make", "--all", "--profile", "smoke", "--share", "2/2"]) == 2
    assert "--share must be I/N with I from 0 to N - 1" in capsys.readouterr().err
    assert main(["make", "--all", "--profile", "smok"]) == 2
    assert "smok" in capsys.readouterr().err


@pytest.mark.slow
def test_every_run_is_one_command_that_a_person_could_type(interpreter, tmp_path):
    out = told(interpreter, tmp_path, ASKED, "--dry-run", "--printshellcmds")
    typed = re.findall(r"^Shell command: (python -m kdlib make .*)$", out, re.MULTILINE)
    planned = [f"python -m kdlib make {step.id} --notebooks --profile smoke" for step in design.study("smoke", GRIDS)]
    assert sorted(typed) == sorted(planned)


@pytest.mark.slow
def test_a_second_call_does_nothing(study, interpreter):
    home, _, _ = study
    before = files(home)
    assert "Nothing to be done" in told(interpreter, home)
    assert files(home) == before


@pytest.mark.slow
def test_only_an_edit_of_a_notebooks_code_reruns_it_and_the_paper(study, interpreter):
    home, _, _ = study
    path = home / "notebooks" / "12_methods.ipynb"
    shipped = path.read_bytes()
    fake_notebooks.save_as_jupyter_does(path)
    assert jobs(interpreter, home) == set()
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[-1]["source"] += "\n1 + 1"
    path.write_text(json.dumps(notebook))
    assert jobs(interpreter, home) == {"analysis_12_methods", "paper"}
    path.write_bytes(shipped)
    assert jobs(interpreter, home) == set()


@pytest.mark.slow
def test_a_deleted_file_is_made_again_with_what_was_made_from_it(study, interpreter):
    home, _, _ = study
    table = home / "results" / "smoke" / "methods.csv"
    kept = table.rename(table.with_suffix(".kept"))
    assert jobs(interpreter, home) == {"analysis_12_methods", "paper"}
    kept.rename(table)
    student = next((home / "results" / "smoke" / "runs").glob("student-*"))
    kept = student.rename(home / student.name)
    # Not the ensembles it is a member of: the same id means the same numbers.
    assert jobs(interpreter, home) == {"run", "paper"} | {f"analysis_{name}" for name in outputs.analyses(GRIDS)}
    kept.rename(student)
    assert jobs(interpreter, home) == set()


@pytest.mark.slow
@pytest.mark.parametrize("profile", available())
def test_every_profile_is_planned_without_network_or_results(profile, interpreter, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path / "cache"))
    out = told(interpreter, tmp_path, "--dry-run", profile=profile)
    jobs = len(design.study(profile)) + len(outputs.analyses(())) + 2
    assert re.search(rf"^total +{jobs}$", out, re.MULTILINE)
    assert not (tmp_path / "results").exists() or list((tmp_path / "results").rglob("*.json")) == []


@pytest.mark.slow
def test_the_slurm_profile_asks_for_a_gpu_and_its_cores(interpreter, tmp_path):
    # The executor is a plug-in of its own; the other settings are read here. Without messages Snakemake shows them.
    verbose = tmp_path / "Snakefile"
    lines = (REPOSITORY / "Snakefile").read_text().splitlines(keepends=True)
    verbose.write_text("".join(line for line in lines if not line.strip().startswith("message:")))
    arguments = ["--snakefile", str(verbose), "--workflow-profile", "profiles/slurm", "--executor", "local"]
    out = told(interpreter, tmp_path, *arguments, "--dry-run", cores=64)
    blocks = [block for block in out.split("\nrule ") if "resources:" in block]
    made = [block for block in blocks if block.startswith("run:")]
    assert len(made) == len(design.study("smoke"))
    assert all("gres=gpu:1" in block and "threads: 16" in block and "runtime=720" in block for block in made)
    assert not any("gres" in block or "threads" in block for block in blocks if block.startswith("analysis"))


@pytest.mark.slow
def test_an_unknown_profile_is_one_paragraph_and_no_success(interpreter, tmp_path):
    status, out = interpreter.run(*command(profile="quik"), cwd=REPOSITORY, env=environment(tmp_path))
    assert status != 0
    assert "Unknown profile 'quik'. Expected one of" in out and "Traceback" not in out


def test_the_notebooks_of_the_results_folder_come_first(tmp_path, monkeypatch):
    mine = fake_notebooks.write(tmp_path / "notebooks" / "12_methods.ipynb", 'profile = "smoke"')
    monkeypatch.chdir(tmp_path)
    assert notebooks.find("notebooks/12_methods.ipynb") == mine.resolve()
    assert store.home() == REPOSITORY
