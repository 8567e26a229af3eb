"""Students trained packed: of the runs that are to be made, those alike are trained at once, and each is then made as ever.

Training fills each run's working folder with the log and the checkpoints of an attempt that was killed after its last step. Whoever
makes the run finds them there, and evaluates and saves it: the same id and files, with numbers equal to rounding.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.runs import student
from kdlib.study import store
from kdlib.study.plan import Step
from kdlib.study.store import Run
from kdlib.training import DistillationTrainer, PackedTrainer, trainer_of
from kdlib.training.checkpoints import common_step
from kdlib.training.packed import unlike

MOST = 16  # students at once on a GPU, where nobody says how many
ROOM = 0.5  # of a GPU's free memory, which they may take by the estimate of `footprint`
TRAINED = ("student", "joint", "member", "ensemble")  # what students may wait for one another by


class Packer:
    """Trains students ahead of their making, packed where several alike are to be made.

    Args:
        steps: the runs that are to be made, in their order.
        inputs_of: a run -> the runs that it reads, made now unless they exist.
        with_artefact: whether runs of which only the results are here are made again.
        pack: how many are trained at once at most. None: some on a GPU, and one on a CPU, which one keeps busy.
    """

    def __init__(self, steps: Sequence[Step], inputs_of: Callable[[Step], dict[str, Run]], with_artefact: bool = False, pack: int | None = None):
        self.inputs_of, self.with_artefact = inputs_of, with_artefact
        self.most = pack or (MOST if torch.cuda.is_available() else 1)
        students = {one.id: (one, needed) for one, needed in _missing(steps, with_artefact) if one.kind == "student"}
        reasons = {name: why_alone(one) for name, (one, _) in students.items()}
        self.waiting = {name: entry for name, entry in students.items() if self.most > 1 and reasons[name] is None}
        self._batches: dict[str, int] = {}  # in an epoch of each run that was looked at
        if self.most < 2:
            reasons = dict.fromkeys(reasons, "packed training pays on a GPU only") if pack is None and len(students) > 1 else {}
        if told := Counter(reason for reason in reasons.values() if reason):
            print("Students trained one by one:", "; ".join(f"{count} ({reason})" for reason, count in told.items()), flush=True)

    def train(self, step: Step) -> None:
        """Train what is to be made for ``step``, itself included, packed with others that wait; what has none alike is left."""
        for one, _ in list(_missing([step], self.with_artefact)) if self.waiting else ():
            if one.id in self.waiting:
                self._train_with_others(one)

    def _train_with_others(self, first: Step) -> None:
        alike = [first, *(one for one, _ in self.waiting.values() if one.id != first.id and _key(one) == _key(first))]
        outcome = None
        # Claims are given back before the runs are made, by this process or by whoever waits for them.
        with ExitStack() as claims:
            found = self._found(alike, claims) if len(alike) > 1 and self.most > 1 else []
            if len(found) > 1:
                print(f"training {len(found)} students packed: {', '.join(one.id for one, _ in found)}", flush=True)
                outcome = _trained([trainer for _, trainer in found])
        if len(found) > 1 and outcome is not torch.OutOfMemoryError:
            self.waiting = {name: entry for name, entry in self.waiting.items() if name not in {one.id for one, _ in found}}
        elif outcome is torch.OutOfMemoryError:
            self.most = len(found) // 2
        del found
        gc.collect()
        torch.cuda.empty_cache()

    def _found(self, steps: Sequence[Step], claims: ExitStack) -> list[tuple[Step, DistillationTrainer]]:
        """The first run and those that can be packed with it, with their trainers; none where that one is not to be made here."""
        found, room = [], self.most
        for step in steps:
            if len(found) >= room:
                break
            known = {self._batches[one.id] for one in (step, *(one for one, _ in found)) if one.id in self._batches}
            with ExitStack() as own:
                trainer = self._trainer(step, own) if len(known) < 2 and _ready(step) else None
                if trainer is not None and _fit([*(one for _, one in found), trainer]):
                    found.append((step, trainer))
                    claims.push(own.pop_all())
                    room = min(self.most, affordable(trainer))
                elif step is steps[0]:
                    break
        return found

    def _trainer(self, step: Step, claim: ExitStack) -> DistillationTrainer | None:
        """The trainer of a run, which is claimed; None for one that is not to be made here, or cannot be."""
        profile, (_, needed) = step.parameters.profile, self.waiting[step.id]
        if store.find(profile, step.id, needed):
            return None
        try:
            inputs = self.inputs_of(step)  # before the claim, as where one run is made
            work = claim.enter_context(store.claimed(profile, step.id, needed))
            if work is None:
                return None
            _, given, _ = student.begun(step.parameters, inputs, work)
            trainer = trainer_of(**given)
        except KdlibError:
            return None  # told when the run is made
        self._batches[step.id] = len(trainer.train_dataset) // trainer.args.per_device_train_batch_size
        return trainer


def _trained(trainers: Sequence[DistillationTrainer]) -> type[Exception] | None:
    """Train at once. What goes wrong is told and not raised: others are as well as ever, and a run that fails does so in its turn."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # as before a run by itself
    try:
        PackedTrainer(trainers).fit()
    except torch.OutOfMemoryError:
        print(f"{len(trainers)} students at once took more memory than there is; from now on half as many.", flush=True)
        return torch.OutOfMemoryError
    except KdlibError as error:
        print(f"Packed training stopped, and its runs go on one by one. {error}", flush=True)
        return KdlibError
    return None


def why_alone(step: Step) -> str | None:
    """Why a student is never trained packed, in words, or None."""
    values = step.parameters
    reasons = {
        "a teacher in the loop": values.objective == "online_kd",
        "stages": values.stages,
        "learning-rate multipliers": values.learning_rate_multipliers,
        "runs beside it": values.beside,
        "8-bit states": values.low_precision != "none",
        "text that is written for it": "writer" in step.inputs,
        "no training": not values.epochs,
    }
    return next((reason for reason, there in reasons.items() if there), None)


def _key(step: Step) -> tuple:
    """What students must have in common to be worth a look."""
    values = step.parameters
    names = ("profile", "architecture", "layers", "hidden_size", "heads", "epochs", "batch_size", "gradient_accumulation", "learning_rate",
             "warmup", "weight_decay", "precision", "compile")  # fmt: skip
    return (step.inputs["corpus"].id, *(getattr(values, name) for name in names))


def _missing(steps: Sequence[Step], with_artefact: bool) -> Iterator[tuple[Step, bool]]:
    """What is to be made for these runs, upstream first and none twice; with each, whether it is needed with what later runs read."""
    seen: set[str] = set()

    def visit(one: Step, needed: bool) -> Iterator[tuple[Step, bool]]:
        if one.id not in seen and not store.find(one.parameters.profile, one.id, needed):
            seen.add(one.id)
            for upstream in one.inputs.values():
                yield from visit(upstream, True)
            yield one, needed

    for step in steps:
        yield from visit(step, with_artefact)


def _ready(step: Step) -> bool:
    """Whether no student that is still to be made stands before it."""
    return all(one.kind not in TRAINED for one, _ in _missing(list(step.inputs.values()), True))


def _fit(trainers: Sequence[DistillationTrainer]) -> bool:
    """Whether these can be packed, and have come as far as one another."""
    return unlike(trainers) is None and common_step(Path(one.args.output_dir) for one in trainers) is not None


def affordable(trainer: DistillationTrainer) -> int:
    """How many such students a GPU's free memory holds at once; any number where there is no GPU."""
    if not torch.cuda.is_available():
        return 2**31
    free, _ = torch.cuda.mem_get_info()
    return max(1, int(ROOM * free / footprint(trainer)))


def footprint(trainer: DistillationTrainer) -> int:
    """Bytes that training a student takes, by estimate: weights, gradients and moments, and what the backward pass reads."""
    config, length = trainer.model.config, trainer.train_dataset.index.shape[1]
    tokens = trainer.args.per_device_train_batch_size * length
    wide = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    activations = tokens * (config.num_hidden_layers * (16 * config.hidden_size + 6 * wide) + length)
    return 4 * (4 * models.parameters_by_component(trainer.model)["total"] + activations)
