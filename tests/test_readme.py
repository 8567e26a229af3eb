"""What README prints for somebody else's script runs as it is printed."""

import os
import re
import subprocess
import sys

import pytest

from kdlib.study.profiles import REPOSITORY

HEADING = "## Use it from your own script"


def blocks() -> dict[str, str]:
    """Sub-heading -> its block of Python, below ``HEADING``."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.search(rf"^{HEADING}\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    found = {}
    for part in section.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        (found[title],) = re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    assert section.count("```python") == len(found), "each block has a sub-heading of its own"
    return found


BLOCKS = blocks()
# What must hold after a block has run, beside that it ran.
CHECKS = {
    "The fused loss": """
from kdlib.losses.reference import distillation_loss
ids = torch.randint(1000, (3, 20))
with torch.no_grad():
    logits = [one(ids).logits[:, :-1].flatten(0, 1) for one in (student, teacher)]
    found = kd_loss(student, teacher, ids, k=999)
    wanted = distillation_loss(*logits, ids[:, 1:].flatten(), 0.5, 2.0)
assert all(one.grad is not None and one.grad.abs().max() > 0 for one in student.parameters())
assert abs(found - wanted) < 1e-4 * wanted, (found, wanted)
""",
    "A saved ensemble": """
ids = torch.randint(1000, (2, 9))
with torch.no_grad():
    wanted = sum(weight * one.eval()(ids).logits.softmax(-1) for weight, one in zip([0.5, 0.3, 0.2], members))
    assert torch.allclose(ensemble(ids).logits.exp(), wanted, atol=1e-6)
""",
    "Cached targets in any Trainer": """
assert trainer.state.global_step == 2 and trainer.state.log_history[-1]["train_loss"] > 0
assert targets.cache.kind.draws == 32 and targets.cache.positions == 17
""",
}


def run(source: str, folder) -> None:
    """In a process of its own that knows no other folder, no hub and no GPU."""
    home = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | home | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


def test_the_section_has_blocks():
    assert BLOCKS.keys() >= CHECKS.keys()


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_runs_as_it_is_printed(title, tmp_path):
    run(BLOCKS[title] + CHECKS.get(title, ""), tmp_path)


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_is_short_and_fits_the_page(title):
    lines = BLOCKS[title].splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120


def test_a_block_that_fails_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(BLOCKS["The fused loss"] + "\n1 / 0\n", tmp_path)
