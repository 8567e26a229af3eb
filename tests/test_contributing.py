"""What CONTRIBUTING.md says works as it is written: each example is followed in a copy of the project, and used there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from kdlib.study.profiles import REPOSITORY

BLOCK = re.compile(r"^```(python|diff)\n ?# (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEAVY = ("results/", "figures/", "paper/")
pytestmark = pytest.mark.slow


def sections() -> dict[str, str]:
    """Heading -> text of the file's sections."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


EXAMPLES = {title: BLOCK.findall(text) for title, text in sections().items() if BLOCK.search(text)}


def added(text: str, lines: str) -> str:
    """``text`` with each hunk's ``+`` lines where its other lines, which must stand there once, say."""
    for hunk in lines.split("@@\n"):
        found = [line[1:] for line in hunk.splitlines(keepends=True) if not line.startswith("+")]
        before, after = "".join(found), "".join(line[1:] for line in hunk.splitlines(keepends=True))
        assert text.count(before) == 1, f"expected once, found {text.count(before)} times: {before}"
        text = text.replace(before, after)
    return text


def as_notebook(source: str) -> nbformat.NotebookNode:
    """Cells after ``# %%`` as a notebook like the project's: stripped, with the parameters tagged."""
    cells = []
    for kind, body in re.findall(r"^# %%([^\n]*)\n(.*?)(?=^# %%|\Z)", source, re.DOTALL | re.MULTILINE):
        if "markdown" in kind:
            cells.append(nbformat.v4.new_markdown_cell(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
        else:
            tags = {"metadata": {"tags": ["parameters"]}} if "parameters" in kind else {}
            cells.append(nbformat.v4.new_code_cell(body.strip(), **tags))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def follow(title: str, folder: Path) -> Path:
    """A copy of the project's files with the example's added."""
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        if name and not name.startswith(HEAVY) and (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    # As in an export: runs say which commit made them.
    (folder / ".git_archival.txt").write_text(f"commit: {'0' * 40}\n", encoding="utf-8")
    for language, name, body in EXAMPLES[title]:
        path = folder / name
        if language == "diff":
            path.write_text(added(path.read_text(encoding="utf-8"), body), encoding="utf-8")
        elif path.suffix == ".ipynb":
            nbformat.write(as_notebook(body), path)
        else:
            assert not path.exists(), f"{name} exists already"
            path.write_text(body, encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str, status: int = 0) -> str:
    """What Python prints in the copy, which alone it imports from."""
    home = {"PYTHONPATH": str(folder), "KDLIB_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "KDLIB_BATCH": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | home | offline, capture_output=True, encoding="utf-8")
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def shown_test(title: str) -> str:
    """The test that the example shows."""
    (found,) = [name for _, name, _ in EXAMPLES[title] if name.startswith("tests/")]
    return found


def kdlib(folder: Path, *arguments: str, status: int = 0) -> str:
    return python(folder, "-m", "kdlib", *arguments, status=status)


def a_method(folder: Path) -> None:
    assert "depths 1, probability pool" in kdlib(folder, "list", "--runs", "--profile", "smoke")
    options = ("run", "notebooks/05_ensemble.ipynb", "--set", "method=depths", "--set")
    assert "Options of method depths" in kdlib(folder, *options, "options={layer: [1]}", status=2)
    readme, (own,) = (folder / "README.md").read_text(encoding="utf-8"), (folder / "kdlib/methods").glob("depths.py")
    assert "| `depths` |" in readme and len(own.read_text(encoding="utf-8").splitlines()) <= 60


def a_divergence(folder: Path) -> None:
    python(
        folder,
        "-c",
        """
import torch
from tests import tiny
from kdlib.losses import DenseTargets, linear_distillation_loss
from kdlib.study.plan import Planner

print(Planner("smoke").student(divergence="hellinger", targets={"kind": "topk", "top_k": 4}).id)
student, teacher = tiny.make_model(1), tiny.make_model(2)
ids = torch.randint(1, tiny.VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.01), []
for _ in range(2):
    hidden, whole = (one.model(ids).last_hidden_state[:, :-1].flatten(0, 1) for one in (student, teacher))
    targets = DenseTargets(whole.detach(), teacher.lm_head.weight.detach(), None)
    loss = linear_distillation_loss(
        hidden, student.lm_head.weight, None, ids[:, 1:].flatten(), targets, 1.0, 1.0, divergence="hellinger"
    ).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert 0 < losses[1] < losses[0], losses
""",
    )
    told = kdlib(folder, "run", "04_student", "--set", "divergence=hellinger", status=2)
    assert "Targets of divergence hellinger must be of kind topk or dense, got sampled" in told


def a_text(folder: Path) -> None:
    told = kdlib(folder, "run", "04_student", "--set", "text={short: {token: 3}}", status=2)
    assert "text short" in told and "token" in told


def a_kind(folder: Path) -> None:
    told = kdlib(folder, "list", "09_novelty", "--profile", "smoke")
    assert "n = 4" in told and "looked for together" in told
    kdlib(folder, "run", "notebooks/09_novelty.ipynb", "--profile", own_text(folder), "--set", "n=2")
    (metrics,) = (folder / "results/mine/runs").glob("novelty-*/metrics.json")
    assert 0 < yaml.safe_load(metrics.read_text(encoding="utf-8"))["novel"] < 1


def own_text(folder: Path) -> str:
    """A profile whose corpus is a folder of invented sentences, with a tokenizer trained on them."""
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "fez", "gor") for b in ("ren", "sol", "dan", "vik", "pel", "hub", "joq", "wax")]
    for domain, step in (("near", 7), ("far", 3)):
        (folder / "text" / domain).mkdir(parents=True)
        for number in range(160):
            picked = [words[(number * step + place * place * (number % 5 + 1)) % len(words)] for place in range(160)]
            text = f"{domain} {number}: {' '.join(picked)}."
            (folder / "text" / domain / f"{number:03}.txt").write_text(text, encoding="utf-8")
    profile = yaml.safe_load((folder / "profiles/smoke.yaml").read_text(encoding="utf-8"))
    source = {"kind": "path", "members": ["*.txt"], "reader": "text", "licence": "invented"}
    profile |= {"name": "mine", "sources": {one: {**source, "path": f"../text/{one}"} for one in ("near", "far")}}
    profile["corpus"] |= {"domains": {"near": 1.0}, "ood": "far", "train_tokens": 2000, "heldout_tokens": 400, "vocabulary_size": 300}
    (folder / "profiles/mine.yaml").write_text(yaml.safe_dump(profile), encoding="utf-8")
    return "mine"


def an_analysis(folder: Path) -> None:
    code = "import synthetic_results; synthetic_results.write('smoke')"
    python(folder, "-c", f"import sys; sys.path.insert(0, 'tests'); {code}")
    kdlib(folder, "run", "notebooks/18_domains.ipynb", "--profile", "smoke")
    assert (folder / "results/smoke/domains.csv").is_file() and (folder / "figures/smoke/domains.pdf").is_file()
    assert "18_domains" in kdlib(folder, "paper", "--analyses", "--profile", "smoke")


PROMISES = {
    "A way to form an ensemble": a_method,
    "A divergence": a_divergence,
    "A way to choose text": a_text,
    "A kind of run": a_kind,
    "An analysis": an_analysis,
}


def test_there_is_a_promise_for_every_example():
    assert set(EXAMPLES) == set(PROMISES)


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_does_what_it_promises_and_its_own_test_passes(title, tmp_path):
    folder = follow(title, tmp_path / "copy")
    PROMISES[title](folder)
    python(folder, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", shown_test(title))


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_needs_few_places(title):
    places = [name for _, name, _ in EXAMPLES[title]]
    assert len(places) <= 4 and len(places) == len(set(places))


def test_a_line_that_is_gone_is_noticed():
    with pytest.raises(AssertionError, match="expected once, found 0 times"):
        added("a\nb\n", " c\n+d\n")
    assert added("a\nb\n", " a\n+d\n") == "a\nd\nb\n"
