"""Training of every model: students from text, from cached targets or from a teacher in the loop, and teachers too."""

from kdlib.training.batches import Collator
from kdlib.training.checkpoints import newest_checkpoint
from kdlib.training.joint import JointTrainer
from kdlib.training.log import LOG_COLUMNS, read_log
from kdlib.training.objective import Coupling, Distillation, FeatureTerm, Objective
from kdlib.training.optimizer import parameter_groups, steps
from kdlib.training.packed import PackedTrainer
from kdlib.training.stages import discard_checkpoints, train_model, trainer_of
from kdlib.training.trainer import CHECKPOINTS, DistillationTrainer

__all__ = [
    "CHECKPOINTS",
    "LOG_COLUMNS",
    "Collator",
    "Coupling",
    "Distillation",
    "DistillationTrainer",
    "FeatureTerm",
    "JointTrainer",
    "Objective",
    "PackedTrainer",
    "discard_checkpoints",
    "newest_checkpoint",
    "parameter_groups",
    "read_log",
    "steps",
    "train_model",
    "trainer_of",
]
