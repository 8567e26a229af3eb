"""Several runs trained at once, each for itself: on its own rows in its own order, for its own loss, with its own clipping.

The models are one module with stacked weights (:class:`kdlib.ensemble.packed.PackedMembers`), so that a GPU computes a step of K
small models in little more time than one. Every number of a run is what it would be alone, equal to rounding: the loss is the sum
of the runs' own, each divided by its own tokens, which leaves every model the gradient of its own; AdamW is elementwise.
"""

import copy
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from kdlib import models
from kdlib.ensemble.packed import PackedMembers, unpackable
from kdlib.errors import KdlibError
from kdlib.losses import LossParts
from kdlib.training.batches import CollatorOfEach, RowsOfEach
from kdlib.training.checkpoints import common_step, forget_after
from kdlib.training.compiling import repeatable
from kdlib.training.optimizer import BETAS, WeightDecay
from kdlib.training.trainer import DistillationTrainer, Progress

# Of a GPU's step, reading K runs' rows and targets would be the larger part; processes of their own read ahead.
READERS = 4
MOMENTS = ("exp_avg", "exp_avg_sq")
# What shapes a step and is not kept for each run apart.
SHARED = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "eval_steps",
          "eval_strategy", "save_steps", "max_grad_norm")  # fmt: skip


class PackedTrainer(Trainer):
    """Trains what several trainers would train one after another, at once, and leaves in each one's folder what it would have left
    if it had been killed right after its last step: its log and its checkpoints.

    So ``fit`` of each trainer afterwards, or of one made anew on its folder, reads the weights back and tells of the run. Killed
    on the way, it goes on from the newest step that all runs have a checkpoint of, packed or one by one.

    In the logs, ``seconds`` are the K-th part of those that passed, so that sums over runs stay true (``validation_seconds`` are
    each run's own); memory is that of all runs together.

    Args:
        runs: trainers as each run has by itself. Their models become views of the stacked weights.

    Raises:
        KdlibError: runs that cannot be packed (see :func:`unlike`) or have no step in common to go on from, or (while training) a
            loss or gradient of one of them that is not finite.
    """

    def __init__(self, runs: Sequence[DistillationTrainer]):
        if reason := unlike(runs):
            raise KdlibError(f"Runs must be alike to be trained packed, got {reason}. Train them one by one.")
        self.runs = tuple(runs)
        first = runs[0]
        arguments = copy.copy(first.args)
        arguments.train_sampling_strategy = "sequential"
        if arguments.device.type == "cuda":
            arguments.dataloader_num_workers = READERS
        super().__init__(
            PackedMembers([one.model for one in runs]),
            arguments,
            data_collator=CollatorOfEach([one.data_collator for one in runs]),
            train_dataset=RowsOfEach(
                [one.train_dataset.index for one in runs],
                [one.args.data_seed for one in runs],
                arguments.per_device_train_batch_size,
            ),
            eval_dataset=first.eval_dataset,
        )
        # As in the runs' own: each loss divides by the tokens of the whole step itself.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())
        self.add_callback(WeightDecay(first.weight_decay, first.steps, dimensions=3))
        self._compiled = first._compiled
        self._body = torch.compile(self.model.hidden_of_each, dynamic=False) if self._compiled else self.model.hidden_of_each
        self._norms: Tensor | None = None

    def fit(self) -> None:
        """Train to the end, from the newest step that all runs have a whole checkpoint of."""
        folders = [Path(one.args.output_dir) for one in self.runs]
        step = common_step(folders)
        if step is None:
            raise KdlibError("Runs must have a checkpoint of one step to go on packed, got none in common. Train them one by one.")
        for one, folder in zip(self.runs, folders, strict=True):
            forget_after(folder, step)
            one.state.log_history = _history(folder / f"checkpoint-{step}")
        for one in self.runs:  # only now: the clock of each begins
            one.step_log.resume(step)
            one.step_log.sharing = len(self.runs)
        if step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(folders[0] / f"checkpoint-{step}") if step else None)

    def training_step(self, *arguments, **options):
        """As that of the Trainer: losses and gradients of one micro-batch of each run."""
        with repeatable() if self._compiled and self.args.device.type == "cpu" else nullcontext():
            return super().training_step(*arguments, **options)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        return sum(batch["labels"].ne(-100).sum((1, 2)) for batch in batch_samples).to(device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the runs' losses of one micro-batch, each divided by the tokens of its whole optimisation step."""
        self._follow()
        found = self._losses(inputs, num_items_in_batch)
        # One copy from the device tells of all runs.
        zero = torch.zeros_like(found[0].ce)
        told = torch.stack([torch.stack([one.loss, one.ce, zero if one.kd is None else one.kd]) for one in found]).tolist()
        for run, parts, (loss, ce, kd) in zip(self.runs, found, told, strict=True):
            if not math.isfinite(loss):
                run.refuse("loss", loss, self.state.global_step + 1)
            run.count(ce, kd, parts.tokens)
        return torch.stack([one.loss for one in found]).sum()

    def _losses(self, inputs, normalisers: Tensor) -> list[LossParts]:
        segments, dtype = inputs["segments"], next(self.model.parameters()).dtype
        mask = models.attention_mask(segments.flatten(0, 1), dtype).unflatten(0, segments.shape[:2])
        autocast = self.runs[0].autocast
        with torch.autocast(segments.device.type, dtype=autocast) if autocast else nullcontext():
            hidden = self._body(inputs["input_ids"], mask, inputs["position_ids"])
        # Unbound, not indexed: the gradients of all come back in one piece.
        each = zip(self.runs, hidden.flatten(1, 2).unbind(), *self.model.output_layers(), normalisers, strict=True)
        names = ("labels", "targets", "weights")
        return [
            run.losses(own, (weight, bias), {name: inputs[name][number] for name in names}, normaliser)
            for number, (run, own, weight, bias, normaliser) in enumerate(each)
        ]

    def create_optimizer(self, model=None):
        """One AdamW on the stacked weights; what is a vector in each model is not decayed."""
        if self.optimizer is None:
            matrices = [one for one in self.model.parameters() if one.ndim > 2]
            vectors = [one for one in self.model.parameters() if one.ndim == 2]
            groups = [{"params": matrices, "weight_decay": self.args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, betas=BETAS, fused=True)
        return self.optimizer

    def _clip_grad_norm(self, model) -> Tensor:
        gradients = [one.grad for one in model.parameters()]
        norms = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in gradients])
        self._norms = torch.linalg.vector_norm(norms, dim=0)
        shares = (self.args.max_grad_norm / (self._norms + 1e-6)).clamp(max=1.0)  # as torch clips the gradient of one model
        for one in gradients:
            one.mul_(shares.view(-1, *[1] * (one.ndim - 1)))
        return self._norms.max()

    def log(self, logs: dict, start_time=None) -> None:
        """Write the row of a step to the log of each run."""
        if "loss" not in logs:
            return
        self._follow()
        for run, norm in zip(self.runs, self._norms.tolist(), strict=True):
            run.log(logs | {"grad_norm": norm})
        losses = [run.state.log_history[-1]["loss"] for run in self.runs]
        self.state.log_history = [{"loss": sum(losses) / len(losses)}]  # for the progress bar

    def evaluate(self, *arguments, **options) -> dict:
        """Validate each run, as by itself."""
        for run in self.runs:
            run.evaluate()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}

    def _follow(self) -> None:
        """Tell the runs' own trainers how far they are."""
        for run in self.runs:
            history, run.state = run.state.log_history, copy.copy(self.state)
            run.state.log_history = history

    # Checkpoints: those of each run, with its part of the stacked moments

    def _save_checkpoint(self, model, trial) -> None:
        for number, run in enumerate(self.runs):
            optimizer = run.create_optimizer()
            for parameter, stack, rows in self.model.places(number):
                state = self.optimizer.state[stack]
                # Cloned: of a view, all of the memory behind it would be saved.
                own = {name: state[name][number, rows].clone() for name in MOMENTS}
                optimizer.state[parameter] = {"step": state["step"].clone()} | own
            _copy_settings(self.optimizer, optimizer)
            run.lr_scheduler = self.lr_scheduler
            run._save_checkpoint(run.model, trial)
            optimizer.state.clear()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        for run in self.runs:
            run._load_from_checkpoint(str(Path(run.args.output_dir) / Path(resume_from_checkpoint).name))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        for number, run in enumerate(self.runs):
            optimizer, run.lr_scheduler = run.create_optimizer(), self.lr_scheduler
            run._load_optimizer_and_scheduler(str(Path(run.args.output_dir) / Path(checkpoint).name))
            for parameter, stack, rows in self.model.places(number):
                found, state = optimizer.state[parameter], self.optimizer.state[stack]
                if not state:
                    state.update({"step": found["step"]} | {name: torch.empty_like(stack) for name in MOMENTS})
                for name in MOMENTS:
                    state[name][number, rows] = found[name]
            _copy_settings(optimizer, self.optimizer)
            optimizer.state.clear()


def unlike(runs: Sequence[DistillationTrainer]) -> str | None:
    """Why these runs cannot be trained packed, in words, or None.

    Alike are the models' shape, the steps, batches and rates; text, seeds, targets, objective and its weights may differ.
    """
    first, *others = runs
    for number, one in enumerate(runs):
        objective = one.objective
        looped = {"a teacher in the loop": objective.teacher, "a pool": objective.coupling, "features": objective.features}
        if found := [what for what, there in looped.items() if there is not None]:
            return f"{found[0]} in run {number}"
        if one.multipliers or one.low_precision != "none":
            return f"{'learning-rate multipliers' if one.multipliers else '8-bit states'} in run {number}"
        if any(module.p for module in one.model.modules() if isinstance(module, nn.Dropout)) or getattr(one.model.config, "attention_dropout", 0):
            return f"dropout in run {number}"
        if not one.steps:
            return f"no step to take in run {number}"
    for number, other in enumerate(others, 1):
        if found := [name for name, value in _schedule(first).items() if value != _schedule(other)[name]]:
            return f"another {found[0]} in run {number} than in run 0"
    return unpackable([one.model for one in runs])


def _schedule(run: DistillationTrainer) -> dict:
    rows, length = run.train_dataset.index.shape
    own = {"weight_decay": run.weight_decay, "precision": run.autocast, "compile": run._compiled, "block_length": length}
    batches = {"number of batches": rows // run.args.per_device_train_batch_size}
    return {name: getattr(run.args, name) for name in SHARED} | own | batches


def _copy_settings(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Rates and decay of each group, as they are now; groups are matrices and vectors in both."""
    for own, group in zip(target.param_groups, source.param_groups, strict=True):
        own.update({name: value for name, value in group.items() if name != "params"})


def _history(checkpoint: Path) -> list[dict]:
    path = checkpoint / "trainer_state.json"
    return json.loads(path.read_text(encoding="utf-8"))["log_history"] if path.is_file() else []
