"""The trainer of every model: a transformers ``Trainer`` that computes its loss from hidden states.

Logits never exist for more than a chunk of tokens (:mod:`kdlib.losses.fused`). On a CPU a run that is repeated, or killed and
resumed, ends with the same weights bit for bit, compiled or not, with the same number of threads on the same kind of
processor. Compiled and plain training agree to rounding; so do repeats on a GPU.
"""

import math
import os
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlib import models
from kdlib.data import corpus
from kdlib.data.text import TrainingText
from kdlib.errors import KdlibError
from kdlib.losses import LossParts, linear_distillation_loss
from kdlib.losses.balance import backward as balance_gradients
from kdlib.losses.coupled import Member, coupled_distillation_loss
from kdlib.models import low_precision
from kdlib.study.parameters import TrainingParameters
from kdlib.study.progress import bar
from kdlib.study.schedules import as_schedule
from kdlib.training.batches import Collator, Rows
from kdlib.training.checkpoints import last_step, newest_checkpoint
from kdlib.training.compiling import can_compile, repeatable
from kdlib.training.log import StepLog, memory_bytes, peak_memory_bytes, read_log, teacher_tokens
from kdlib.training.objective import BALANCES, Objective
from kdlib.training.optimizer import BETAS, WeightDecay, parameter_groups, progress, steps
from kdlib.training.work import training_work

CHECKPOINTS = 8  # a run is saved, and its validation loss measured, this many times
LARGE, LARGE_CHECKPOINTS = 5e7, 2  # parameters from which writing a checkpoint costs more than it is likely to save


class DistillationTrainer(Trainer):
    """Trains ``model`` on packed rows with the loss of an :class:`~kdlib.training.objective.Objective`.

    Args:
        model: causal LM, possibly wrapped by peft.
        settings: schedule, batch size, precision, seed.
        text, index: what to train on, and the packed rows [rows, block_length] of its split. A token's weight multiplies its
            CE and KD, in the log as well; features and validation text have none.
        folder: for checkpoints and the per-step log; a run interrupted there is taken up again.
        objective: terms of the loss and their signal; None for cross-entropy alone. With features the student's body is not
            compiled.
        multipliers: regular expression on parameter names -> learning-rate multiplier; the first match wins, 0 freezes.
        validation, validation_index: measured a few times along the way; a short run measures only every n-th row.

    Raises:
        KdlibError: a ``low_precision`` this machine has not, nothing to train on, a vocabulary other than the targets' or the
            teacher's, a teacher that shares parameters with the model, a multiplier that matches no parameter, another number of
            weights than positions, several processes that would share one run, or (while training) a non-finite loss or gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingParameters,
        text: TrainingText,
        index: np.ndarray,
        folder: Path,
        objective: Objective | None = None,
        multipliers: dict[str, float] | None = None,
        validation: corpus.Split | None = None,
        validation_index: np.ndarray | None = None,
    ):
        if int(processes := os.environ.get("WORLD_SIZE", "1")) > 1:
            raise KdlibError(
                f"A run must be trained by one process, got WORLD_SIZE={processes}. Start python, not torchrun; kdlib make --all --share 0/2 "
                "makes runs side by side."
            )
        low_precision.require(settings.low_precision)
        if not len(index):
            raise KdlibError(
                f"The split {text.split.name!r} must have rows to train on, got none. Raise train_tokens or lower block_length."
            )
        self.objective = objective = objective or Objective()
        self._check_vocabularies(model, objective)
        teacher = objective.teacher
        if teacher is not None and {id(one) for one in teacher.parameters()} & {id(one) for one in model.parameters()}:
            raise KdlibError(
                "Teacher and student must not share parameters: one's eval mode would be the other's. Give the teacher a copy."
            )
        features = None if objective.features is None else objective.features.loss
        if features is not None and len(features.projectors):
            # As part of the model they are optimised, clipped and kept in checkpoints like the rest.
            model.projectors = features.projectors
        self.multipliers, self.weight_decay = multipliers or {}, as_schedule(settings.weight_decay)
        self.autocast = models.precision(settings.precision)
        self.low_precision = settings.low_precision
        self.step_log = StepLog(folder / "log.csv")
        self.steps = steps(settings, len(index))
        every = max(1, math.ceil(self.steps / CHECKPOINTS))
        if validation is not None:
            # A short run must not spend its time validating: eight times one fortieth of the rows it trains on, at most.
            most = max(1, self.steps * settings.batch_size // 40)
            validation_index = validation_index[:: max(1, -(-len(validation_index) // most))]
        self.validation = (validation, validation_index)
        arguments = TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            max_steps=self.steps,
            per_device_train_batch_size=min(settings.batch_size, len(index)),
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=round(settings.warmup * self.steps),
            weight_decay=self.weight_decay.start,
            seed=settings.seed,
            data_seed=settings.order_seed,
            dataloader_drop_last=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if validation is not None else "no",
            eval_steps=every,
            save_steps=every
            if models.parameters_by_component(model)["total"] < LARGE
            else math.ceil(self.steps / LARGE_CHECKPOINTS),
            # Two, because a process killed while it saves leaves the newest one unusable.
            save_total_limit=2,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        # With every GPU that is visible, the Trainer would wrap the model in DataParallel.
        arguments._n_gpu = 1
        super().__init__(
            model,
            arguments,
            data_collator=Collator(text.split, objective.targets, text.weights),
            train_dataset=Rows(index),
            eval_dataset=None if validation is None else Rows(validation_index),
        )
        # Labels are already those of the next token, and the loss divides by the tokens of the whole step itself.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())
        self.add_callback(WeightDecay(self.weight_decay, self.steps))
        self._compiled = settings.compile and can_compile(self.args.device)
        self._body = models.body(model)
        if self._compiled and features is None:
            self._body = torch.compile(self._body, dynamic=False)
        for frozen in objective.frozen():
            frozen.to(self.args.device).eval().requires_grad_(False)
        self._parts = dict.fromkeys(("loss", "ce", "kd", "feature", "tokens"), 0)

    @staticmethod
    def _check_vocabularies(model, objective: Objective) -> None:
        sizes = {"student": len(models.head(model)[0])} | objective.vocabularies()
        if len(set(sizes.values())) > 1:
            raise KdlibError(
                f"Student and teacher must share one vocabulary, padding included, got {sizes} tokens. Cut the larger one down "
                "(kdlib.data.vocabulary.slice_model)."
            )

    def fit(self) -> dict:
        """Train to the end, from the newest whole checkpoint if there is one.

        Returns:
            tokens, teacher_tokens (for which a teacher in the loop was asked), steps, seconds (up to the last row of the log),
            tokens_per_second, flops, peak_memory_bytes, final_loss, work (see :mod:`kdlib.study.work`).
        """
        checkpoint = newest_checkpoint(Path(self.args.output_dir))
        self.step_log.resume(last_step(checkpoint))
        if last_step(checkpoint) < self.steps:
            eight_bit = self.low_precision == "optimizer_and_backward"
            with low_precision.eight_bit_backward(self.model) if eight_bit else nullcontext():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        elif checkpoint is not None:
            # Killed after its last step; the Trainer would take one more.
            self._load_from_checkpoint(str(checkpoint))
            # Freezes what was not trained, which the FLOPs below depend on.
            self._groups()
        if hasattr(self.model, "projectors"):
            del self.model.projectors
        rows, tokens = read_log(self.step_log.path), self.step_log.tokens
        seconds = float(rows[-1]["seconds"]) if rows else 0.0
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        work = training_work(
            self.model,
            rows,
            self.train_dataset.index,
            self.validation[1],
            self.objective,
        )
        return {
            "tokens": tokens,
            "teacher_tokens": 0 if self.objective.teacher is None else teacher_tokens(rows),
            "steps": self.steps,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if tokens else None,
            "flops": work["train"]["flops"],
            "peak_memory_bytes": max(
                (int(row["peak_memory_bytes"]) for row in rows if row["peak_memory_bytes"]), default=peak_memory_bytes()
            ),
            "final_loss": float(np.mean(losses[-20:])) if losses else None,
            "work": work,
        }

    def training_step(self, *arguments, **options):
        """As that of the Trainer: loss and gradients of one micro-batch."""
        with repeatable() if self._compiled and self.args.device.type == "cpu" else nullcontext():
            return super().training_step(*arguments, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch, divided by the tokens of the whole optimisation step."""
        features, (kd_weight, temperature) = self.objective.features, self._at(self.state.global_step)
        with nullcontext() if features is None else features.loss.recorded():
            parts = self._token_losses(inputs, kd_weight, temperature, num_items_in_batch)
        loss, feature, total = parts.loss, None, 0.0
        if features is not None:
            total, tokens = features.loss(inputs["segments"])
            feature = features.weight * total / (tokens if num_items_in_batch is None else num_items_in_batch)
            loss, total = loss + feature, total.item()
        if not torch.isfinite(loss):
            self.refuse("loss", loss.item(), self.state.global_step + 1)
        if model.training:
            self.count(parts.ce.item(), 0.0 if parts.kd is None else parts.kd.item(), parts.tokens, total)
        if model.training and features is not None and (balanced := BALANCES[features.balance]) is not None:
            balance_gradients(parts.loss, feature, self.model.parameters(), balanced)
            # The gradients are in place; what the Trainer now differentiates must add nothing to them.
            loss = loss.detach().requires_grad_()
        return (loss, parts) if return_outputs else loss

    def _token_losses(self, inputs, kd_weight: float, temperature: float, normaliser) -> LossParts:
        """CE and KD of one micro-batch."""
        hidden, head = self._hidden(self._body, inputs).flatten(0, 1), models.head(self.model)
        if self.objective.coupling is None:
            return self.losses(hidden, head, inputs, normaliser)
        return self._coupled([Member(hidden, *head)], inputs, self._arguments(inputs, kd_weight, temperature, normaliser))

    def losses(self, hidden: torch.Tensor, head: tuple, inputs: dict, normaliser) -> LossParts:
        """CE and KD of a micro-batch with these hidden states [T, D] and this output layer (weight, bias), as weighted in the present step."""
        term, arguments = self.objective.distillation, self._arguments(inputs, *self._at(self.state.global_step), normaliser)
        return linear_distillation_loss(hidden, *head, divergence=term.divergence, options=term.options, **arguments)

    def count(self, ce: float, kd: float, tokens: int, feature: float = 0.0) -> None:
        """Add the losses of a micro-batch, summed over its tokens, to those of the step that the log tells next."""
        (kd_weight, _), features = self._at(self.state.global_step), self.objective.features
        mixed = kd_weight * kd + (1 - kd_weight) * ce + (features.weight * feature if features else 0.0)
        found = {"loss": mixed, "ce": ce, "kd": kd, "feature": feature, "tokens": tokens}
        self._parts = {name: self._parts[name] + value for name, value in found.items()}

    def _coupled(self, members: list[Member], inputs, arguments: dict) -> LossParts:
        coupling, run = self.objective.coupling, partial(self._hidden, inputs=inputs)
        others = self.objective.others(run, self.autocast)
        return coupled_distillation_loss(members, **arguments, coupling=coupling.weight, pool=coupling.pool, others=others)

    def _arguments(self, inputs, kd_weight: float, temperature: float, normaliser) -> dict:
        """What a loss is told beside the hidden states: labels, the teacher's answer, weights."""
        targets, weights, device = inputs.get("targets"), inputs.get("weights"), inputs["labels"].device
        if self.objective.asks_teacher(kd_weight):
            targets = self.objective.ask(partial(self._hidden, inputs=inputs), self.autocast)
        return {
            "labels": inputs["labels"].flatten(),
            "targets": None if targets is None else targets.to(device),
            "kd_weight": kd_weight,
            "temperature": temperature,
            "normaliser": normaliser,
            "matmul_dtype": self.autocast,
            "compiled": self._compiled,
            "token_weights": None if weights is None else weights.flatten(),
        }

    def _at(self, step: int) -> tuple[float, float]:
        """Weight of the KD term and temperature in a step, counted from 0."""
        at = progress(step, self.steps)
        return self.objective.weight.value(at), self.objective.temperature.value(at)

    def refuse(self, what: str, value: float, step: int) -> None:
        """Stop: a loss or a gradient is no number."""
        kept = newest_checkpoint(Path(self.args.output_dir))
        raise KdlibError(
            f"The {what} became {value} at step {step} of {self.steps}; last good checkpoint: {kept or 'none yet'}. "
            "Lower learning_rate, lengthen warmup, or set precision=float32."
        )

    def _hidden(self, body, inputs):
        dtype = next(self.model.parameters()).dtype
        mask = models.attention_mask(inputs["segments"], dtype)
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext():
            return body(
                input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], attention_mask=mask, use_cache=False
            ).last_hidden_state

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean negative log-likelihood of the validation rows, logged as ``validation_nll`` (nats a token)."""
        split, index = self.validation
        collate, total, tokens = Collator(split), 0.0, 0
        started = time.perf_counter()
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(index), self.args.per_device_train_batch_size):
                batch = self._prepare_inputs(
                    collate(list(index[start : start + self.args.per_device_train_batch_size]))
                )
                parts = self._measured(batch)
                total, tokens = total + parts.ce.item(), tokens + parts.tokens
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self._log(
            {
                "validation_nll": total / tokens,
                "validation_seconds": time.perf_counter() - started,
                "validation_memory_bytes": memory_bytes(),
            }
        )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured(self, batch) -> LossParts:
        hidden = self._hidden(models.body(self.model), batch).flatten(0, 1)
        return linear_distillation_loss(hidden, *models.head(self.model), batch["labels"].flatten(), matmul_dtype=self.autocast)

    def create_optimizer(self, model=None):
        """AdamW (Loshchilov & Hutter 2019) with learning-rate multipliers; vectors (norms, biases) are not decayed."""
        if self.optimizer is None:
            groups = self._groups()
            rate = self.args.learning_rate
            if self.low_precision == "none":
                self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)
            else:
                moves = not self.weight_decay.is_constant
                self.optimizer = low_precision.adamw_8bit(groups, rate, BETAS, self._compiled, moving_decay=moves)
        return self.optimizer

    def _groups(self) -> list[dict]:
        return parameter_groups(self.model, self.multipliers, self.args.learning_rate, self.args.weight_decay)

    def log(self, logs: dict, start_time=None) -> None:
        """Write one row of the per-step log."""
        if "loss" not in logs:
            return
        # Rows are logged before checkpoints are saved, so weights ruined by this step never become one.
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            self.refuse("gradient's norm", logs["grad_norm"], self.state.global_step)
        parts, self._parts = self._parts, dict.fromkeys(self._parts, 0)
        self.step_log.tokens += parts["tokens"]
        means = {name: parts[name] / max(1, parts["tokens"]) for name in ("loss", "ce", "kd", "feature")}
        self.state.log_history.append({"step": self.state.global_step, "loss": means["loss"]})
        taken = self.state.global_step - 1  # the step that was just taken
        weight, temperature = self._at(taken)
        decay = "" if self.weight_decay.is_constant else self.weight_decay.value(progress(taken, self.steps))
        distils = self.objective.distils
        self._log(
            {
                "loss": means["loss"],
                "ce": means["ce"],
                "kd": means["kd"] if weight > 0 else "",
                "feature": means["feature"] if self.objective.features is not None else "",
                "kd_weight": weight if distils else "",
                "temperature": temperature if distils else "",
                "learning_rate": logs["learning_rate"],
                "weight_decay": decay,
                "memory_bytes": memory_bytes(),
            }
        )

    def _log(self, values: dict) -> None:
        self.step_log.write(self.state.global_step, self.state.epoch, values)


class Progress(TrainerCallback):
    """The shared progress bar, with the running loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = bar(None, "training", total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if state.log_history:
            self.bar.set_postfix_str(f"loss {state.log_history[-1].get('loss', math.nan):.3f}", refresh=False)
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
