"""A saved ensemble in a fresh process: it writes text, and lm-eval's own ``hf`` class scores it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from test_ensemble_model import VOCABULARY, unlike_members
from test_routing import gate
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from kdlib import models
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.study.profiles import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [
    {"question": "w3 w14 w15 w9", "choices": ["w26 w5", "w35", "w8 w9 w7"], "answer": 0},
    {"question": "w2 w7", "choices": ["w18", "w28 w18 w28", "w45 w9"], "answer": 2},
    {"question": "w11 w12 w13 w14 w15", "choices": ["w16 w17", "w18 w19", "w20"], "answer": 1},
]
TASK = {
    "task": "tiny_choice", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip
WRITES = """
import json, sys
import torch
import kdlib.ensemble.model
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder = sys.argv[1]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
found = {"text": tokenizer.decode(model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=-1)[0])}
"""
SCORES = """
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
options = {"backend": "causal", "batch_size": 2, "device": "cpu"}
for name, lm in {
    "model": HFLM(pretrained=model, tokenizer=tokenizer, **options),
    "folder": HFLM(pretrained=folder, **options),
}.items():
    told = simple_evaluate(lm, tasks=["tiny_choice"], task_manager=tasks, log_samples=True, bootstrap_iters=0)
    samples = sorted(told["samples"]["tiny_choice"], key=lambda one: one["doc_id"])
    found[name] = {
        "scores": [[float(choice[0]) for choice in one["filtered_resps"]] for one in samples],
        "accuracy": told["results"]["tiny_choice"]["acc,none"],
    }
"""


@pytest.fixture(scope="module")
def ensemble():
    return EnsembleForCausalLM.from_members(unlike_members(), router=gate(), temperature=1.3)


@pytest.fixture(scope="module")
def saved(ensemble, tmp_path_factory):
    words = Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    folder = tmp_path_factory.mktemp("saved") / "ensemble"
    models.save(ensemble, tokenizer, folder, {})
    return folder


def fresh(source, *arguments):
    """What ``found`` is in the end, in a process that knows no hub."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(arguments[-1]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", source + "\nprint('found', json.dumps(found))", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("found ")[2])


@torch.no_grad()
def by_hand(model, question, choice):
    """Sum of the log-probabilities of a choice's words, one forward pass over the whole."""
    context, words = ([int(word[1:]) for word in text.split()] for text in (question, choice))
    log_p = torch.log_softmax(model(torch.tensor([context + words])).logits[0].double(), -1)
    return sum(log_p[len(context) + i - 1, word].item() for i, word in enumerate(words))


def test_a_saved_ensemble_writes_text_in_a_fresh_process(ensemble, saved, tmp_path):
    written = ensemble.generate(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3), max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert fresh(WRITES, saved, tmp_path)["text"] == " ".join(f"w{i}" for i in written[0].tolist())


def test_the_stock_class_of_lm_eval_scores_an_ensemble(ensemble, saved, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS), encoding="utf-8")
    data = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(TASK | data), encoding="utf-8")
    expected = [[by_hand(ensemble, one["question"], choice) for choice in one["choices"]] for one in DOCUMENTS]
    right = [max(range(3), key=scores.__getitem__) == one["answer"] for scores, one in zip(expected, DOCUMENTS, strict=True)]
    found = fresh(WRITES + SCORES, saved, tmp_path)
    for way in ("model", "folder"):
        assert torch.allclose(torch.tensor(found[way]["scores"]), torch.tensor(expected), atol=1e-4)
        assert found[way]["accuracy"] == pytest.approx(sum(right) / 3)
