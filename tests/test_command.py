import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import fake_notebooks
import psutil
import pytest

from kdlib.__main__ import main
from kdlib.errors import KdlibError
from kdlib.study import design, plan, profiles, runner, store

ANALYSIS = 'profile = "smoke"'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kdlib", *map(str, arguments)]


def ran(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "04_student", "--profile", "quik"], "Unknown profile 'quik'. Expected one of"),
        (["run", "04_studnet"], "notebook must be one of 00_tour, "),
        (
            ["run", "04_student", "--set", "kd_wieght=0.5"],
            "Unknown parameter 'kd_wieght' of 04_student. Did you mean 'kd_weight'?",
        ),
        (
            ["run", "04_student", "--set", "kd_weight=1.5"],
            "Bad notebook 04_student. kd_weight: Input should be less than or equal to 1 (found 1.5)",
        ),
        (
            ["run", "04_student", "--set", "objective=dpo"],
            "objective: Input should be 'ce', 'kd' or 'online_kd' (found 'dpo')",
        ),
        (["run", "04_student", "--set", "seed"], "--set must be NAME=VALUE, as in --set seed=1, got 'seed'"),
        (["run", "04_student", "--set", "=1"], "--set must be NAME=VALUE, as in --set seed=1, got '=1'"),
        (["run", "04_student", "--set", "seed=1", "--set", "seed=2"], "Parameter 'seed' must be set once, got it twice"),
        (["run", "04_student", "--set", "profile=quick"], "The profile must be chosen with --profile"),
        (["run", "05_ensemble", "--set", "seeds=[1, 2"], "The value in --set seeds=[1, 2 must be YAML"),
        (["run", "04_student", "--profile", "absent.yaml"], "Unknown profile"),
        (["make"], "make must be given ids or labels of runs, or --all"),
        (["make", "corpus", "--all"], "make must be given ids or labels of runs, or --all"),
        (["make", "student kd seed 77"], "'student kd seed 77' must be the id or label of a run"),
        (["make", "--all", "--share", "2/2"], "--share must be I/N"),
        (["make", "--all", "--pack", "0"], "--pack must be 1 or more, and stand without --notebooks, got 0"),
        (["make", "--all", "--pack", "2", "--notebooks"], "--pack must be 1 or more, and stand without --notebooks, got 2"),
        (["make", "--all", "--kinds", "studnet"], "--kinds must be among corpus"),
        (["make", "--all", "--grids", "loses"], "grid must be one of profile 'smoke'"),
        (["list", "04_studnet"], "notebook must be one of 00_tour, "),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(capsys, monkeypatch, arguments, told):
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a kernel was started"))
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and "Traceback" not in err and not out


def test_bad_input_is_answered_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom kdlib.__main__ import main\nstatus = main(['run', '04_student', '--set', 'seed=-1'])\n"
        "print(status, sorted({'torch', 'papermill', 'nbformat', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 []\n"


@pytest.mark.parametrize(
    ("module", "apart"),
    [
        ("kdlib.analysis.paper", {"torch", "pandas", "numpy", "matplotlib"}),  # reads what analyses wrote
        ("kdlib.analysis.panels, kdlib.analysis.studies", {"torch", "seaborn", "scipy.stats"}),  # each analysis is a process
    ],
)
def test_what_takes_long_to_import_is_imported_where_it_is_needed(module, apart):
    code = f"import sys\nimport {module}\nprint(sorted({apart} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_values_are_yaml():
    found = runner.assignments(
        [
            "seed=1",
            "objective=kd",
            "seeds=[1, 2]",
            'student={"objective": "ce", "epochs": 0}',
            "compile=true",
            "learning_rate=1.0e-3",
        ]
    )
    assert found == {
        "seed": 1,
        "objective": "kd",
        "seeds": [1, 2],
        "student": {"objective": "ce", "epochs": 0},
        "compile": True,
        "learning_rate": 0.001,
    }


def test_a_number_as_people_write_it_is_a_number():
    values = profiles.parameters("04_student", "smoke", **runner.assignments(["learning_rate=3e-3"]))
    assert values.learning_rate == 0.003


@pytest.mark.parametrize("notebook", profiles.notebooks())
def test_the_list_shows_every_parameter_with_default_and_meaning(capsys, notebook):
    assert main(["list", f"notebooks/{notebook}.ipynb"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == notebook
    model, _ = profiles.notebooks()[notebook]
    words = " ".join(shown.split())
    for name, entry in model.model_fields.items():
        default = getattr(profiles.parameters(notebook, "smoke"), name)
        assert f"  {name} = {default!r}   [" in shown and " ".join(entry.description.split()) in words


def test_the_list_tells_what_is_allowed(capsys):
    assert main(["list", "04_student"]) == 0
    shown = capsys.readouterr().out
    assert "objective = 'kd'   [ce, kd, online_kd]" in shown
    assert "kd_weight = 0.9   [number ≥ 0 and ≤ 1 or {shape, start, end, at}]" in shown
    assert main(["list"]) == 0
    every = capsys.readouterr().out
    assert [line for line in every.splitlines() if line in profiles.notebooks()] == list(profiles.notebooks())


def test_the_runs_of_a_profile_are_listed_with_whether_they_are_there(capsys):
    step = design.study("smoke")[0]
    store.make("smoke", step.id, step.settings, lambda work: {})
    assert main(["list", "--runs"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    planned = design.study("smoke", design.begun("smoke", ["all"]))
    assert lines == [[one.id, "made" if one is planned[0] else "-", one.label] for one in planned]


def test_what_a_terminal_cannot_show_is_told_by_its_code():
    done = ran("list", "04_student", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0 and "number \\u2265 0" in done.stdout and done.stderr == ""


def test_runs_are_made_by_label_and_id_in_the_order_given(monkeypatch):
    made = []
    monkeypatch.setattr("kdlib.runs.make.make_all", lambda steps, *options: made.append(([one.label for one in steps], options)))
    teacher = plan.Planner("smoke").teacher()
    assert main(["make", teacher.id, "corpus", "--with-artefact"]) == 0
    assert main(["make", "--all", "--kinds", "teacher", "targets"]) == 0
    targets = ["targets sampled"] * 3  # the teacher's, and those of a student and a pool that teach
    assert main(["make", "--all", "--kinds", "teacher", "--pack", "8"]) == 0
    assert made[:2] == [(["teacher scratch", "corpus"], (True, None)), (["teacher scratch", *targets], (False, None))]
    assert made[2] == (["teacher scratch"], (False, 8))


def test_runs_are_made_in_their_notebooks_where_that_is_asked_for(monkeypatch, home, capsys):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append((path.stem, output.name, values)) or 0)
    corpus, teacher = plan.Planner("smoke").corpus(), plan.Planner("smoke").teacher()
    store.make("smoke", corpus.id, corpus.settings, lambda work: {})
    assert main(["make", "corpus", teacher.id, "--notebooks"]) == 0
    name = f"02_teacher-{teacher.id.removeprefix('teacher-')}.ipynb"
    assert seen == [("02_teacher", name, teacher.parameters.model_dump(mode="json"))]
    assert f"{corpus.id} (corpus) exists: " in capsys.readouterr().out
    monkeypatch.setattr(runner, "execute", lambda *_: 1)
    assert main(["make", teacher.id, "--notebooks"]) == 1


@pytest.mark.parametrize("arguments", [[], ["run"], ["04_student"]])
def test_a_call_without_what_it_needs_says_how_to_call(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: kdlib" in capsys.readouterr().err


def test_a_run_that_exists_starts_no_kernel(capsys, monkeypatch, home):
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    made = store.make("smoke", step.id, step.settings, lambda work: {})
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a kernel was started"))
    assert main(["run", "notebooks/04_student.ipynb", "--set", "seed=3"]) == 0
    assert capsys.readouterr().out == f"{step.id} (student kd seed 3) exists: {made.path}\n"


def test_an_executed_producer_is_kept_under_the_id_of_its_run(monkeypatch, home):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append((path, output, values)) or 0)
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    assert main(["run", "04_student", "--set", "seed=3"]) == 0
    path, output, values = seen[0]
    assert path == profiles.REPOSITORY / "notebooks" / "04_student.ipynb"
    assert output == home / "results" / "smoke" / "executed" / f"04_student-{step.id.removeprefix('student-')}.ipynb"
    assert values == step.parameters.model_dump(mode="json")


def test_a_profile_given_by_path_is_found_from_the_kernels_folder_too(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append(values) or 0)
    (tmp_path / "mine.yaml").write_text(
        (profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8").replace("name: smoke", "name: mine")
    )
    monkeypatch.chdir(tmp_path)
    assert main(["run", "04_student", "--profile", "mine.yaml"]) == 0
    assert seen[0]["profile"] == str(tmp_path / "mine.yaml")


@pytest.mark.slow
def test_a_notebook_runs_with_its_parameters_in_this_interpreter_at_the_repository(tmp_path, home):
    # A kernel of the same name that the user installed elsewhere must not be taken.
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/such/python"], "display_name": "other", "language": "python"}))
    report = (
        "import json, os, sys\nfrom ipykernel import get_connection_info\n"
        "transport = get_connection_info(unpack=True)['transport']\n"
        "batch = os.environ.get('KDLIB_BATCH')\n"
        "print(json.dumps([profile, os.getcwd(), sys.executable, batch, transport]))"
    )
    fake_notebooks.write(
        tmp_path / "10_objectives.ipynb",
        ANALYSIS,
        report,
        kernelspec={"name": "elsewhere", "display_name": "", "language": "python"},
    )
    done = ran(
        "run",
        "10_objectives.ipynb",
        "--profile",
        "quick",
        cwd=tmp_path,
        env={**os.environ, "JUPYTER_PATH": str(tmp_path / "jupyter")},
    )
    assert done.returncode == 0, done.stderr
    found, told = done.stdout.splitlines()
    assert json.loads(found) == ["quick", str(profiles.REPOSITORY), sys.executable, "1", "ipc"]
    executed = home / "results" / "quick" / "executed" / "10_objectives.ipynb"
    assert told == f"Executed notebook: {executed}"
    assert 'profile = \\"quick\\"' in executed.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "status", "told", "hidden"),
    [
        (
            "from kdlib.errors import KdlibError\nraise KdlibError('The text is empty. Give it some.')",
            2,
            "The text is empty. Give it some.\n",
            "Traceback",
        ),
        ("1 / 0", 1, "ZeroDivisionError: division by zero", "\x1b["),
        ("import os\nos._exit(9)", 1, "The kernel of 10_objectives died", "Traceback"),
    ],
)
def test_a_failed_notebook_is_kept_as_far_as_it_got(tmp_path, home, last, status, told, hidden):
    path = fake_notebooks.write(
        tmp_path / "10_objectives.ipynb", ANALYSIS, "print('got so far')", last, "print('never')"
    )
    done = ran("run", path)
    assert done.returncode == status
    assert told in done.stderr and hidden not in done.stderr
    kept = json.loads((home / "results" / "smoke" / "executed" / "10_objectives.ipynb").read_text())
    outputs = ["".join(output.get("text", "")) for cell in kept["cells"] for output in cell.get("outputs", [])]
    assert "got so far\n" in outputs and "never\n" not in outputs


def _heed_interrupts():
    # A test run started in the background of a script inherits an ignored SIGINT, and so would the runner.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_runner_leaves_no_kernel_behind(tmp_path, home, stop):
    # The cell is busy outside Python's interpreter loop, as in a long matrix product.
    busy = "import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    path = fake_notebooks.write(tmp_path / "10_objectives.ipynb", ANALYSIS, busy)
    runner = subprocess.Popen(
        command("run", path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_interrupts
    )
    kernel = psutil.Process(int(runner.stdout.readline()))
    os.killpg(runner.pid, stop)
    _, err = runner.communicate(timeout=30)
    assert runner.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[stop]
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()
    if stop is signal.SIGINT:
        assert err == "Stopped. The same command goes on from here.\n"


@pytest.mark.slow
def test_bars_are_drawn_on_a_terminal_and_not_in_a_log(tmp_path):
    work = (
        "import time\nfrom kdlib.study.progress import bar\n"
        "for _ in bar(range(3), description='counting', mininterval=0):\n    time.sleep(0.2)"
    )
    path = fake_notebooks.write(tmp_path / "10_objectives.ipynb", ANALYSIS, work)
    assert "counting" not in ran("run", path).stderr
    ours, theirs = pty.openpty()
    runner = subprocess.Popen(command("run", path), stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the terminal's other end was closed
        pass
    os.close(ours)
    assert runner.wait(timeout=60) == 0
    assert b"counting:" in shown and b"2/3" in shown


@pytest.mark.slow
def test_notebooks_that_start_together_do_not_meet(tmp_path):
    path = fake_notebooks.write(tmp_path / "10_objectives.ipynb", ANALYSIS, "print(profile)")
    names = ["smoke", "quick", "laptop", "paper"]
    together = [
        subprocess.Popen(
            command("run", path, "--profile", name, "--output", tmp_path / f"{name}.ipynb"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    assert [process.communicate(timeout=120)[0].split()[0] for process in together] == names


def test_a_value_that_is_no_pair_names_the_right_form():
    with pytest.raises(KdlibError, match="as in --set seed=1"):
        runner.assignments(["kd weight=1"])
