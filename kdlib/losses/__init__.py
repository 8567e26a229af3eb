"""Token-level distillation losses: dense definitions, and the same losses fused with the output layer.

``kd_weight`` (w) is always the weight of the distillation term::

    loss = w * tau^2 * KL(t || s) + (1 - w) * CE(labels, s)        t, s: teacher and student at temperature tau

(Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2). The literature also calls the weight of the *other* term
alpha.
"""

from kdlib.losses.fused import LossParts, linear_distillation_loss
from kdlib.losses.targets import DenseTargets, PooledTargets, SparseTargets

__all__ = ["DenseTargets", "LossParts", "PooledTargets", "SparseTargets", "linear_distillation_loss"]
