"""A study of two tiny domains whose runs are made in seconds; the fixture ``profile`` is the path of its profile."""

import json
import random

import yaml
from safetensors.torch import load_file

from kdlib.data.corpus import load_split
from kdlib.data.sources import PathSource
from kdlib.runs.make import make as make_run
from kdlib.study import plan, profiles
from kdlib.training import read_log

BLOCK_LENGTH, VOCABULARY_SIZE = 32, 300
TEACHER = {"layers": 2, "hidden_size": 32, "heads": 2}


def write(home):
    """Write the profile and its text below ``home``; returns the profile's path and its carriers."""
    words = ["".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=5)) for number in range(40)]
    domains = {name: jsonl(home, name, words[:size]) for name, size in (("few", 8), ("many", 40), ("other", 20))}
    smoke = (profiles.REPOSITORY / "profiles" / "smoke.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(smoke) | {"name": "tiny"}
    shares = {"domains": {"few": 0.5, "many": 0.5}, "ood": "other"}
    sizes = {"train_tokens": 4000, "heldout_tokens": 300}
    sizes |= {"block_length": BLOCK_LENGTH, "vocabulary_size": VOCABULARY_SIZE}
    values["corpus"] |= shares | sizes
    values["teacher"] |= TEACHER | {"epochs": 16}
    values["student"] |= {"epochs": 1}
    (home / "tiny.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(home / "tiny.yaml"), domains


def jsonl(folder, name, words, count=250):
    """A domain of documents of 60 words each, drawn from ``words``."""
    texts = (" ".join(random.Random(f"{name} {number}").choices(words, k=60)) for number in range(count))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / name).mkdir()
    (folder / name / "all.jsonl").write_text(lines, encoding="utf-8")
    return PathSource(path=folder / name, members=("*.jsonl",), reader="text", licence="none")


def step(profile, notebook="04_student", **changes):
    return plan.step(profiles.parameters(notebook, profile, **changes))


def make(profile, notebook="04_student", **changes):
    return make_run(step(profile, notebook, **changes))


def saved(run):
    return load_file(run.path / "model" / "model.safetensors")


def log(run):
    return [row for row in read_log(run.path / "log.csv") if row["loss"]]


def train_split(profile):
    return load_split(make(profile, "01_corpus").path / "data", "train")
