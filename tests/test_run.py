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

from kdlib.errors import KdlibError
from kdlib.study import plan, profiles, runner, store

ANALYSIS = 'profile = "smoke"'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kdlib.study.runner", *map(str, arguments)]


def ran(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["04_student", "--profile", "quik"], "Unknown profile 'quik'. Expected one of"),
        (["04_studnet"], "Unknown notebook '04_studnet'. Expected one of"),
        (
            ["04_student", "--set", "kd_wieght=0.5"],
            "Unknown parameter 'kd_wieght' of 04_student. Did you mean 'kd_weight'?",
        ),
        (
            ["04_student", "--set", "kd_weight=1.5"],
            "Bad notebook 04_student. kd_weight: Input should be less than or equal to 1 (found 1.5)",
        ),
        (
            ["04_student", "--set", "objective=dpo"],
            "objective: Input should be 'ce', 'kd' or 'online_kd' (found 'dpo')",
        ),
        (["04_student", "--set", "seed"], "Expected --set NAME=VALUE, found 'seed'"),
        (["04_student", "--set", "=1"], "Expected --set NAME=VALUE, found '=1'"),
        (["04_student", "--set", "seed=1", "--set", "seed=2"], "Parameter 'seed' is set twice"),
        (["04_student", "--set", "profile=quick"], "The profile is chosen with --profile"),
        (["05_ensemble", "--set", "seeds=[1, 2"], "The value in --set seeds=[1, 2 is not YAML"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(capsys, monkeypatch, arguments, told):
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a kernel was started"))
    assert runner.main(arguments) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and "Traceback" not in err and not out


def test_bad_input_is_answered_before_anything_heavy_is_imported():
    code = (
        "import sys\nfrom kdlib.study.runner import main\nstatus = main(['04_student', '--set', 'seed=-1'])\n"
        "print(status, sorted({'torch', 'papermill', 'nbformat', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 []\n"


def test_values_are_yaml():
    found = runner.changes(
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
    values = profiles.parameters("04_student", "smoke", **runner.changes(["learning_rate=3e-3"]))
    assert values.learning_rate == 0.003


def test_the_list_shows_every_parameter_with_default_and_meaning(capsys):
    assert runner.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for notebook, (model, _) in profiles.NOTEBOOKS.items():
        section = shown.split(f"\n{notebook}\n" if notebook in shown.splitlines()[1:] else f"{notebook}\n", 1)[1]
        for name, entry in model.model_fields.items():
            default = getattr(profiles.parameters(notebook, "smoke"), name)
            assert f"  {name} = {default!r}\n      {entry.description}" in section


def test_a_call_without_a_notebook_says_how_to_call():
    done = ran()
    assert done.returncode == 2 and "name a notebook, as in notebooks/04_student.ipynb" in done.stderr


def test_a_run_that_exists_starts_no_kernel(capsys, monkeypatch, home):
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    made = store.make("smoke", step.id, step.settings, lambda work: {})
    monkeypatch.setattr(runner, "execute", lambda *_: pytest.fail("a kernel was started"))
    assert runner.main(["notebooks/04_student.ipynb", "--set", "seed=3"]) == 0
    assert capsys.readouterr().out == f"{step.id} (student kd seed 3) exists: {made.path}\n"


def test_an_executed_producer_is_kept_under_the_id_of_its_run(monkeypatch, home):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append((path, output, values)) or 0)
    step = plan.step(profiles.parameters("04_student", "smoke", seed=3))
    assert runner.main(["04_student", "--set", "seed=3"]) == 0
    path, output, values = seen[0]
    assert path == profiles.REPOSITORY / "notebooks" / "04_student.ipynb"
    assert output == home / "results" / "smoke" / "executed" / f"04_student-{step.id.removeprefix('student-')}.ipynb"
    assert values == step.parameters.model_dump(mode="json")


def test_a_profile_given_by_path_is_found_from_the_kernels_folder_too(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "execute", lambda path, output, values: seen.append(values) or 0)
    (tmp_path / "mine.yaml").write_text(
        (profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text().replace("name: smoke", "name: mine")
    )
    monkeypatch.chdir(tmp_path)
    assert runner.main(["04_student", "--profile", "mine.yaml"]) == 0
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
    done = ran(path)
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
        command(path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_heed_interrupts
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
    assert "counting" not in ran(path).stderr
    ours, theirs = pty.openpty()
    runner = subprocess.Popen(command(path), stdout=subprocess.DEVNULL, stderr=theirs)
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
            command(path, "--profile", name, "--output", tmp_path / f"{name}.ipynb"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    assert [process.communicate(timeout=120)[0].split()[0] for process in together] == names


def test_a_value_that_is_no_pair_names_the_right_form():
    with pytest.raises(KdlibError, match="For example: --set seed=1"):
        runner.changes(["kd weight=1"])
