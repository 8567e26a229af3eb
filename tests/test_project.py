"""The repository agrees with itself: locks, notebooks, imports, licence."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdlib import methods
from kdlib.analysis import outputs
from kdlib.study import notebooks, profiles
from kdlib.study.kinds import kinds
from kdlib.study.profiles import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SHIPPED = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# Left never imports right.
ROOMS = (
    "errors",
    "study",
    "data",
    "models",
    "losses",
    "cache",
    "ensemble",
    "training",
    "evaluation",
    "methods",
    "runs",
    "analysis",
)


def pins(name: str) -> dict[str, str]:
    text = (REPOSITORY / name).read_text()
    return {
        canonicalize_name(package): version for package, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M)
    }


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *extras["test"], *extras["lab"], *extras["build"]]]


def test_the_locks_hold_what_the_project_asks_for():
    locked = pins("requirements.lock") | pins("torch.lock")
    for wanted in requirements():
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), f"{wanted}: run make lock"


def test_every_locked_file_has_a_hash():
    blocks = re.split(r"\n(?=\S)", (REPOSITORY / "requirements.lock").read_text())
    packages = [block for block in blocks if not block.startswith("#")]
    assert len(packages) > 100
    assert [block for block in packages if "--hash=sha256:" not in block] == []


def test_what_differs_between_processor_and_gpu_is_left_to_the_torch_lock():
    assert set(pins("torch.lock")) == {"torch"}
    assert [name for name in pins("requirements.lock") if re.match(r"torch$|triton|nvidia-|cuda-", name)] == []


def test_the_conda_environment_has_the_versions_of_the_locks():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {Requirement(text).name: str(Requirement(text).specifier) for text in pip if not text.startswith("--")}
    locked = pins("requirements.lock") | pins("torch.lock")
    build = {Requirement(text).name for text in PROJECT["optional-dependencies"]["build"]}
    wanted = {one.name: f"=={locked[canonicalize_name(one.name)]}" for one in requirements() if one.name not in build}
    assert listed == wanted, "run make lock; a new dependency is first named in environment.yml"
    assert "--editable ." in pip
    assert f"python{PROJECT['requires-python']}" in environment["dependencies"]


def test_makefile_and_project_accept_the_same_pythons():
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "(3, 11) <= v <= (3, 13)" in makefile and PROJECT["requires-python"] == ">=3.11,<3.14"


def test_licence_and_citation_agree_with_the_project():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["license"], citation["version"]) == (PROJECT["license"], PROJECT["version"])
    assert (
        "Apache License\n                           Version 2.0, January 2004" in (REPOSITORY / "LICENSE").read_text()
    )


def test_the_notebooks_are_those_of_the_project():
    assert {path.stem for path in SHIPPED} == set(profiles.notebooks())
    analyses = outputs.analyses(profiles.load("smoke").study.grids).values()
    assert {one.notebook for one in analyses} == {name for name in profiles.notebooks() if name >= "10"}, "the smoke profile has all"
    titles = [json.loads(path.read_text())["cells"][0]["source"][0] for path in SHIPPED]
    assert [title for title in titles if title.startswith("# #")] == []
    assert {kind.NOTEBOOK for kind in kinds().values()} == {name for name in profiles.notebooks() if "01" <= name < "10"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_short_and_starts_with_the_smoke_profile(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code), "clear all outputs"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len(notebook["cells"]) <= 27
    assert sum(len("".join(cell["source"]).splitlines()) for cell in code) <= 150
    assert notebook["cells"][0]["cell_type"] == "markdown" and "".join(notebook["cells"][0]["source"]).startswith("# ")
    nodes = [node for cell in code for node in ast.walk(ast.parse("".join(cell["source"])))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 10] == []
    defaults = profiles.parameters(path.stem, "smoke").model_dump(mode="json")
    assert notebooks.declared(path) == defaults


def imported(module: str) -> set[str]:
    """Modules of the package that ``module`` (or a module of the package ``module``) imports anywhere."""
    path = REPOSITORY / "kdlib" / module
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    found = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("kdlib.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "kdlib":
            found |= {f"kdlib.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdlib."):
            found.add(node.module)
    return {name.split(".")[1] for name in found} - {module}


def test_every_module_is_in_a_room():
    inside = (REPOSITORY / "kdlib").iterdir()
    rooms = {path.stem for path in inside if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(ROOMS)
    assert len(ROOMS) <= 12


def test_the_readme_names_every_module_in_its_room():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    told = re.search(r"^kdlib/\n(.*?)^profiles/", text, re.DOTALL | re.MULTILINE)[1]
    name, rooms = "", {}
    for line in told.splitlines():
        # A room, or none: the room above. Then its modules, then after two spaces what they are about.
        room, modules = re.fullmatch(r" {2}(?:(\w+)/)? *((?:\w+ )*\w+)(?: …)?(?: {2,}.*)?", line).groups()
        name = room or name
        rooms.setdefault(name, set()).update(modules.split())
    there = {path.name: path for path in (REPOSITORY / "kdlib").iterdir() if (path / "__init__.py").exists()}
    assert list(rooms) == list(ROOMS[1:]), "left never imports right"
    rooms["methods"] = set(methods.names())  # which the test below looks for, in a table of their own
    assert rooms == {name: {one.stem for one in path.glob("*.py")} - {"__init__"} for name, path in there.items()}


def test_the_readme_describes_every_method():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Ways to form an ensemble\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == sorted(methods.names(), key=section.index)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    assert imported(room) <= set(ROOMS[: ROOMS.index(room)])


def test_the_command_calls_every_room():
    assert imported("__main__") <= set(ROOMS)


MODULES = sorted((REPOSITORY / "kdlib").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
def test_a_module_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_a_kind_of_run_and_a_method_are_a_module_each():
    files = {path.stem for path in (REPOSITORY / "kdlib" / "runs").glob("*.py")}
    assert set(kinds()) == files - {"__init__", "make", "artefacts", "card", "combiners", "ingredients", "packing"}
    for name, kind in kinds().items():
        parts = ("NOTEBOOK", "LEAVES", "Parameters", "inputs", "downloads", "label", "produce")
        assert [part for part in parts if not hasattr(kind, part)] == [], name
    assert set(methods.names()) == {path.stem for path in (REPOSITORY / "kdlib" / "methods").glob("*.py")} - {"__init__"}


HEAVY = {"torch", "transformers", "papermill"}


def loaded(code: str, heavy: set[str]) -> set[str]:
    """Which of these modules Python has loaded after ``code``."""
    code = f"import sys\n{code}\nprint(*(name for name in {sorted(heavy)} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("room", ["study", "analysis", "methods"])
def test_reading_results_planning_and_running_import_no_torch(room):
    names = [f"kdlib.{room}.{path.stem}" for path in (REPOSITORY / "kdlib" / room).glob("*.py") if path.stem != "__init__"]
    assert loaded(f"import importlib\nfor name in {names}: importlib.import_module(name)", HEAVY) == set()


@pytest.mark.parametrize("kind", kinds())
def test_a_kind_of_run_is_planned_without_torch(kind):
    code = f"from kdlib.study.plan import Planner\nprint(Planner('smoke').run({kind!r}).id)"
    assert loaded(code, HEAVY) == set()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["list"], 0),
        (["list", "04_student"], 0),
        (["--help"], 0),
        (["run", "--help"], 0),
        (["run", "04_student", "--set", "seed=-1"], 2),
        (["run", "04_student", "--set", "sead=1"], 2),
        (["run", "04_student", "--profile", "quik"], 2),
        (["make"], 2),
    ],
)
def test_what_can_be_answered_at_once_loads_neither_torch_nor_pandas(arguments, status):
    code = (
        "from kdlib.__main__ import main\n"
        f"try:\n    status = main({arguments})\nexcept SystemExit as ended:\n    status = ended.code or 0\n"
        f"assert status == {status}, status"
    )
    assert loaded(code, HEAVY | {"pandas", "numpy", "nbformat"}) == set()


def tracked() -> list[str]:
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_no_file_knows_the_machine_it_was_written_on():
    # The path of this checkout, home folders, and temporary ones with a name.
    private = re.compile(rf"{re.escape(str(REPOSITORY))}/|/home/\w|/root/|/Users/\w|/tmp/\w".encode())
    found = {}
    for name in tracked():
        path = REPOSITORY / name
        if path.is_file() and path.suffix not in {".parquet", ".npz", ".png", ".pdf"}:  # compressed: hits are chance
            found[name] = private.findall(path.read_bytes())
    found.pop("tests/test_project.py", None)  # holds the pattern
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_what_a_run_leaves_that_is_large_is_not_tracked():
    heavy = re.compile(
        r"^results/[^/]+/(runs/[^/]+/(model|data|targets)|work|executed)/|^results/(smoke|quick)/|\.safetensors$"
    )
    assert [name for name in tracked() if heavy.search(name)] == []
