"""Targets of a dataset in somebody else's training loop: each row meets its own, whatever happened to the dataset since."""

import pickle
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from tiny import VOCABULARY, contents, die_at, exit_code, make_model, make_split
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from kdlib.cache import (
    DatasetTargets,
    DenseTeacher,
    Kind,
    ModelTeacher,
    TargetCache,
    TargetCollator,
    TargetLoss,
    cache_targets,
)
from kdlib.cache.dataset import split_from_ids
from kdlib.cache.writer import write_targets
from kdlib.errors import KdlibError
from kdlib.losses.reference import sparse_kl

DENSE, SAMPLED, TOPK = Kind("dense"), Kind("sampled", draws=20), Kind("topk", top_k=5)
W = 0.7


def make_rows(count=8, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in [1, 2, *rng.integers(3, longest, count - 2)]]


ROWS = make_rows()
TEACHER, STUDENT = 0, 1  # seeds


def cached(folder, kind=DENSE, rows=ROWS, teacher=None, **settings):
    return cache_targets(folder, teacher or make_model(TEACHER), rows, kind, shard_tokens=40, **settings)


def dataset(rows=ROWS, **columns):
    return Dataset.from_dict({"input_ids": rows, "number": list(range(len(rows))), **columns})


class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = {name: one.grad.clone() for name, one in model.named_parameters()}


def step(folder, targets, data, batch_size=8, accumulation=1, **loss):
    """Loss and gradients of one optimisation step of a plain Trainer."""
    gradients = _Gradients()
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        per_device_eval_batch_size=batch_size,
        use_cpu=True,
    )
    run = Trainer(
        make_model(STUDENT),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=TargetCollator(targets, pad_token_id=0),
        compute_loss_func=TargetLoss(targets, **{"kd_weight": W, **loss}),
        callbacks=[gradients],
    )
    untrained = run.evaluate()["eval_loss"]
    run.train()
    loss = run.state.log_history[0]["loss"]
    # Of several batches evaluation takes the mean of means.
    assert accumulation > 1 or untrained == pytest.approx(loss, rel=1e-6)
    return loss, gradients.found


def by_hand(rows, temperature=1.0, rounded=True, labels=None):
    """The same, with the teacher in the loop, a row at a time, in the words of torch.nn.functional."""
    teacher, student = make_model(TEACHER), make_model(STUDENT)
    labels = rows if labels is None else labels
    tokens = sum(label != -100 for row in labels for label in row[1:])
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        ids, label = torch.tensor(row)[None], torch.tensor(label)[1:]
        with torch.no_grad():
            hidden = teacher.model(ids).last_hidden_state[0, :-1]
            t = F.linear(hidden.half().float() if rounded else hidden, teacher.lm_head.weight)[label >= 0]
        s = student(ids).logits[0, :-1][label >= 0]
        logs = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
        kd = temperature**2 * F.kl_div(*logs, reduction="sum", log_target=True)
        total = total + W * kd + (1 - W) * F.cross_entropy(s, label[label >= 0], reduction="sum")
    (total / tokens).backward()
    return (total / tokens).item(), {name: one.grad for name, one in student.named_parameters()}


def assert_same(found, wanted, tolerance=1e-5):
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance * gradient.abs().max().item())


# In a plain Trainer


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (3, 3), (1, 8)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_with_cached_dense_targets_is_that_with_the_teacher_in_the_loop(
    tmp_path, temperature, batch_size, accumulation
):
    targets = cached(tmp_path / "targets")
    sizes = {"batch_size": batch_size, "accumulation": accumulation}
    found = step(tmp_path, targets, dataset(), temperature=temperature, **sizes)
    assert_same(found, by_hand(ROWS, temperature))
    # But for half precision, that of the teacher as it is.
    assert_same(found, by_hand(ROWS, temperature, rounded=False), tolerance=5e-3)


def test_only_tokens_with_a_label_are_learnt(tmp_path):
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ROWS]
    labels[5][-1] = -100
    targets = cached(tmp_path / "targets")
    found = step(tmp_path, targets, dataset(labels=labels), batch_size=3, accumulation=3)
    assert_same(found, by_hand(ROWS, labels=labels))


def test_rows_longer_than_a_block_are_windows_to_teacher_and_student(tmp_path):
    rows = make_rows(longest=40)
    targets = cached(tmp_path / "targets", rows=rows, block_length=8)
    windows = [row[low : low + 9] for row in rows for low in range(0, max(1, len(row) - 1), 8)]
    assert len(windows) > len(rows) + 5
    assert_same(step(tmp_path, targets, dataset(rows), batch_size=3, accumulation=3), by_hand(windows))


@pytest.mark.parametrize("kind", [SAMPLED, TOPK], ids=lambda kind: kind.name)
def test_sparse_targets_are_read_at_their_rows_own_positions(tmp_path, kind):
    targets = cached(tmp_path / "targets", kind, temperature=2.0)
    found = step(tmp_path, targets, dataset().shuffle(seed=0), batch_size=2, accumulation=4)
    student, total, first = make_model(STUDENT), 0.0, 0
    for row in ROWS:
        positions = first + np.arange(len(row) - 1)
        logits, first = student(torch.tensor([row])).logits[0, :-1], first + len(row)
        total = total + W * sparse_kl(logits, targets.cache.read(positions)).sum()
        total = total + (1 - W) * F.cross_entropy(logits, torch.tensor(row)[1:], reduction="sum")
    loss = total / sum(len(row) - 1 for row in ROWS)
    loss.backward()
    assert_same(found, (loss.item(), {name: one.grad for name, one in student.named_parameters()}))


def test_cross_entropy_alone_is_the_trainers_own_loss(tmp_path):
    targets = cached(tmp_path / "targets", TOPK)
    plain, gradients = make_model(STUDENT), _Gradients()
    rows = [{"input_ids": row, "labels": row} for row in ROWS[4:5]]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True
    )
    run = Trainer(plain, arguments, train_dataset=rows, callbacks=[gradients])
    run.train()
    wanted = run.state.log_history[0]["loss"], gradients.found
    assert_same(step(tmp_path, targets, rows, batch_size=1, kd_weight=0.0), wanted)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_another_divergence_takes_the_place_of_the_kl(tmp_path, divergence):
    targets = cached(tmp_path / "targets")
    teacher, student, row = make_model(TEACHER), make_model(STUDENT), torch.tensor(ROWS[4])[None]
    with torch.no_grad():
        hidden = teacher.model(row).last_hidden_state[0, :-1].half().float()
        t, s = F.linear(hidden, teacher.lm_head.weight).softmax(-1), student(row).logits[0, :-1].softmax(-1)
    m = 0.3 * t + 0.7 * s
    wanted = {"reverse_kl": s * (s / t).log(), "jsd": 0.3 * t * (t / m).log() + 0.7 * s * (s / m).log()}[divergence]
    loss = TargetLoss(targets, 1.0, divergence=divergence, **({"beta": 0.3} if divergence == "jsd" else {}))
    batch = TargetCollator(targets, 0)([{"input_ids": ROWS[4]}])
    assert loss(student(row), batch["labels"]).item() == pytest.approx(wanted.sum(-1).mean().item(), rel=1e-4)


@pytest.mark.slow
def test_training_resumed_from_a_checkpoint_ends_where_it_would_have(tmp_path):
    targets = cached(tmp_path / "targets", SAMPLED)

    def train(folder, resume=None):
        student = make_model(STUDENT)
        arguments = TrainingArguments(
            str(folder), max_steps=6, per_device_train_batch_size=3, save_steps=2, report_to="none", use_cpu=True
        )
        collator, loss = TargetCollator(targets, 0), TargetLoss(targets, W)
        run = Trainer(student, arguments, train_dataset=dataset(), data_collator=collator, compute_loss_func=loss)
        run.train(resume_from_checkpoint=resume)
        return student.state_dict()

    whole = train(tmp_path / "whole")
    again = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_trl_trains_with_them(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), eos_token="w1")
    tokenizer.pad_token = "w0"
    targets, student, gradients = cached(tmp_path / "targets"), make_model(STUDENT), _Gradients()
    loss = TargetLoss(targets, W)

    class Distillation(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            found = loss(outputs, labels, num_items_in_batch)
            return (found, outputs) if return_outputs else found

    arguments = SFTConfig(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    run = Distillation(
        student,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": ROWS}),
        data_collator=TargetCollator(targets, 0),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    run.train()
    assert_same((run.state.log_history[0]["loss"], gradients.found), by_hand(ROWS))


# A row is known by its tokens


def starts(targets, features):
    """Flat position of each row's first token, as the collator tells the loss."""
    return (-101 - TargetCollator(targets, 0)(features)["labels"][:, 0]).tolist()


def test_every_row_meets_its_own_targets_whatever_happened_to_the_dataset(tmp_path):
    rows = make_rows(40)
    targets = cached(tmp_path, SAMPLED, rows)
    offsets = np.cumsum([0, *map(len, rows)])
    first = {tuple(row): offset for row, offset in reversed(list(zip(rows, offsets.tolist(), strict=False)))}
    data = dataset(rows)
    changed = [
        data,
        data.shuffle(seed=3),
        data.select([7, 3, 30]),
        data.filter(lambda row: len(row["input_ids"]) > 6),
        concatenate_datasets([data.shuffle(seed=1), data.sort("number", reverse=True)]),
        data.with_format("torch"),
        data.with_format("numpy").shuffle(seed=2),
    ]
    for one in changed:
        features = list(one)
        found = starts(targets, features)
        assert found == [first[tuple(rows[int(feature["number"])])] for feature in features]


def test_a_rows_loss_is_the_same_in_any_order_and_company(tmp_path):
    targets, student = cached(tmp_path, SAMPLED), make_model(STUDENT)
    collate, loss = TargetCollator(targets, 0), TargetLoss(targets, W)

    def total(features):
        batch = collate([{"input_ids": row} for row in features])
        labels = batch.pop("labels")
        with torch.no_grad():
            return loss(student(**batch), labels, num_items_in_batch=1).item()

    alone = [total([row]) for row in ROWS]
    for order in (np.arange(8), np.random.default_rng(0).permutation(8), [5, 2], [3, 3, 3]):
        assert total([ROWS[number] for number in order]) == pytest.approx(sum(alone[n] for n in order), rel=1e-5)


def test_padding_contributes_nothing(tmp_path):
    targets, collate = cached(tmp_path), {}
    rows = [{"input_ids": row} for row in ROWS]
    found = []
    for pad in (0, 5):
        batch = TargetCollator(targets, pad)(rows)
        student = make_model(STUDENT)
        labels = batch.pop("labels")
        outputs = student(**batch)
        outputs.logits.retain_grad()
        TargetLoss(targets, W)(outputs, labels).backward()
        gradient = outputs.logits.grad
        for number, row in enumerate(ROWS):
            assert (gradient[number, : len(row) - 1] != 0).any(-1).all()
            assert (gradient[number, len(row) - 1 :] == 0).all()
        found.append([one.grad for one in student.parameters()])
        collate[pad] = batch["input_ids"]
    assert not torch.equal(collate[0], collate[5])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [lambda row: [*row[:-1], (row[-1] + 1) % VOCABULARY], lambda row: row[:-1], lambda row: [0, *row]],
    ids=["a token", "truncated", "a token before"],
)
def test_a_row_with_other_tokens_than_those_cached_is_refused_by_name(tmp_path, change):
    targets, row = cached(tmp_path / "targets", SAMPLED), change(ROWS[4])
    message = rf"Row 1 of the batch must equal a row cached in .*targets, got {len(row)} tokens, \[{row[0]}, {row[1]}"
    with pytest.raises(KdlibError, match=message):
        TargetCollator(targets, 0)([{"input_ids": ROWS[0]}, {"input_ids": row}])
    with pytest.raises(KdlibError, match="must equal a row cached"):
        step(tmp_path, targets, dataset([*ROWS[:4], row]))


def test_padding_that_a_dataset_brings_along_is_no_part_of_its_rows(tmp_path):
    plain = cached(tmp_path / "plain", SAMPLED)
    sides = {"right": lambda row, n: [*row, *[0] * n], "left": lambda row, n: [*[0] * n, *row]}
    for side, pad in sides.items():
        padded = [pad(row, 20 - len(row)) for row in ROWS]
        masks = [pad([1] * len(row), 20 - len(row)) for row in ROWS]
        data = dataset(padded, attention_mask=masks, labels=padded)
        targets = cached(tmp_path / side, SAMPLED, data)
        assert contents(tmp_path / side) == contents(tmp_path / "plain")
        one, other = TargetCollator(targets, 0)(list(data)), TargetCollator(plain, 0)(list(dataset()))
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_collator_takes_along_no_targets(tmp_path):
    targets = cached(tmp_path, rows=make_rows(200, 60))
    packed = pickle.dumps(TargetCollator(targets, 0))
    assert len(packed) < 200 * 40 + 2000
    rows = [{"input_ids": row} for row in make_rows(200, 60)]
    again, whole = pickle.loads(packed)(rows), TargetCollator(targets, 0)(rows)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


# Written as any targets are


@pytest.mark.parametrize(
    "given",
    [
        lambda rows: dataset(rows),
        lambda rows: dataset(rows)["input_ids"],
        lambda rows: dataset(rows).with_format("torch"),
        lambda rows: [np.array(row, np.uint16) for row in rows],
        lambda rows: ({"input_ids": row, "text": "…"} for row in rows),
        lambda rows: dataset(rows).to_iterable_dataset(),
    ],
    ids=["dataset", "column", "tensors", "arrays", "mappings", "stream"],
)
def test_rows_may_come_in_any_form(tmp_path, given):
    cached(tmp_path / "lists", TOPK)
    cached(tmp_path / "other", TOPK, given(ROWS))
    assert contents(tmp_path / "lists") == contents(tmp_path / "other")


def test_they_are_the_targets_of_a_split_with_the_same_documents(tmp_path):
    split, model = make_split(), make_model(TEACHER)
    rows = np.split(split.tokens, split.offsets[1:-1])
    targets = cached(tmp_path / "rows", SAMPLED, rows, model, block_length=16)
    guard = {"any": "guard"}
    write_targets(tmp_path / "split", ModelTeacher(model), split, guard, SAMPLED, block_length=16, shard_tokens=40)
    own = TargetCache(tmp_path / "split", guard, 1.0)
    everywhere = np.arange(len(split.tokens))
    one, other = targets.cache.read(everywhere), own.read(everywhere)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.weights, other.weights)
    assert torch.equal(one.entropy, other.entropy)
    shards = [
        {name: data for name, data in contents(tmp_path / f).items() if name[0] == "0"} for f in ("rows", "split")
    ]
    assert shards[0] == shards[1]


def test_sparse_targets_may_be_drawn_from_dense_ones(tmp_path):
    whole = cached(tmp_path / "dense")
    drawn = cached(tmp_path / "drawn", SAMPLED, teacher=DenseTeacher(whole.cache), temperature=2.0)
    assert starts(drawn, [{"input_ids": row} for row in ROWS]) == starts(whole, [{"input_ids": row} for row in ROWS])
    assert drawn.cache.read(np.arange(4)).temperature == 2.0


def _cache_and_die(folder, event):
    if event:
        die_at(event, folder)
    cached(folder, SAMPLED, rows=make_rows(30))


@pytest.mark.slow
def test_a_killed_writer_goes_on_where_it_stopped_and_a_finished_one_asks_no_teacher(tmp_path):
    assert exit_code(_cache_and_die, tmp_path / "whole", 0) == 0
    for event in (3, 6, 9):
        assert exit_code(_cache_and_die, tmp_path / "killed", event) == -signal.SIGKILL
    assert exit_code(_cache_and_die, tmp_path / "killed", 0) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    teacher = make_model(TEACHER)
    teacher.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    cached(tmp_path / "killed", SAMPLED, make_rows(30), teacher)
    DatasetTargets(tmp_path / "killed", make_rows(30))


# What is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], []], "Row 1 must hold token ids from 0 to 28, got none"),
        ([[1, 2], [3, 29]], "Row 1 must hold token ids from 0 to 28, got 3 to 29"),
        ([[1, -100], [3, 2]], "Row 0 must hold .* got -100 to 1"),
        ([[1, 2**32 + 1]], f"Row 0 must hold .* got 1 to {2**32 + 1}"),
        ([[1], [2]], "must have two tokens.* got 2 rows"),
        ([], "must have two tokens.* got 0 rows"),
        (["some text"], "must be token ids, got <U9"),
        ([[0.5, 1]], "must be token ids, got float64"),
        (Dataset.from_dict({"text": ["some text"]}), "must have a column input_ids, got text"),
    ],
    ids=["empty", "outside", "a label", "beyond int32", "one token each", "no rows", "text", "fractions", "no column"],
)
def test_rows_that_are_none_are_refused_before_the_teacher_runs(tmp_path, rows, message):
    with pytest.raises(KdlibError, match=message):
        cached(tmp_path / "targets", SAMPLED, rows)
    assert not (tmp_path / "targets").exists()


def test_targets_of_other_rows_another_order_or_another_teacher_are_refused(tmp_path):
    cached(tmp_path, SAMPLED)
    for rows in (ROWS[::-1], ROWS[:-1], make_rows(seed=1)):
        with pytest.raises(KdlibError, match="differ in guard"):
            cached(tmp_path, SAMPLED, rows)
        with pytest.raises(KdlibError, match="must be those cached in"):
            DatasetTargets(tmp_path, rows)
    with pytest.raises(KdlibError, match="differ in weights_sha256"):
        cached(tmp_path, SAMPLED, teacher=make_model(STUDENT))
    with pytest.raises(KdlibError, match="differ in guard, block_length"):
        cached(tmp_path, SAMPLED, block_length=8)
    with pytest.raises(KdlibError, match=r"got 2\.0"):
        DatasetTargets(tmp_path, ROWS, 2.0)


def test_a_loss_that_the_targets_cannot_serve_is_refused_at_once(tmp_path):
    targets = cached(tmp_path, SAMPLED)
    for settings, message in [
        ({"kd_weight": 1.5}, r"`kd_weight` must be in 0\.\.1, got 1\.5"),
        ({"temperature": 2.0}, r"`temperature` must be that of the targets, 1\.0, got 2\.0"),
        ({"divergence": "kl"}, "`divergence` must be one of forward_kl.* got 'kl'"),
    ]:
        with pytest.raises(KdlibError, match=message):
            TargetLoss(targets, **{"kd_weight": W, **settings})


def test_labels_of_another_collator_and_logits_of_another_vocabulary_are_refused(tmp_path):
    targets, student = cached(tmp_path, SAMPLED), make_model(STUDENT)
    loss, batch = TargetLoss(targets, W), TargetCollator(targets, 0)([{"input_ids": row} for row in ROWS])
    ids, labels = batch["input_ids"], batch["labels"]
    for other in (ids, torch.where(torch.arange(ids.shape[1]) == 0, -100, ids)):
        with pytest.raises(KdlibError, match="must come from TargetCollator"):
            loss(student(ids), other)
    with pytest.raises(KdlibError, match=r"got \(8, \d+, 31\)"):
        loss(make_model(STUDENT, vocabulary=31)(ids), labels)
    with pytest.raises(KdlibError, match="must have the shape of labels"):
        loss(student(ids[:, :-1]), labels)
    with pytest.raises(KdlibError, match="Row 0 of the batch must have a label for each of its 2 tokens, got 1"):
        TargetCollator(targets, 0)([{"input_ids": ROWS[1], "labels": [1]}])


def test_a_split_of_rows_is_the_rows():
    split = split_from_ids(ROWS, VOCABULARY)
    assert [part.tolist() for part in np.split(split.tokens, split.offsets[1:-1])] == ROWS
    assert split.documents.tokens.tolist() == [len(row) - 1 for row in ROWS]
    assert split.fingerprint() != split_from_ids(ROWS[::-1], VOCABULARY).fingerprint()
