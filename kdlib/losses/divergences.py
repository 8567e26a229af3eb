"""The logit losses besides forward KL, as their formulas on dense logits, and on sparse targets where that is exact.

Each is ``f(student_logits, teacher_logits, temperature=1.0, ...)``: two [T, V] in, a loss per token [T] out, in nats
where it has a logarithm, differentiable by autograd. Throughout, s = softmax(z_S / tau) and t = softmax(z_T / tau).

- Half precision is computed in float32; float64 stays float64.
- Divergences that vanish quadratically as s approaches t carry the factor tau^2 of :func:`forward_kl`, so that the size
  of the gradient does not depend on tau; the others say that they do not.
- An id that both rule out (logit -inf: a padded vocabulary) counts for nothing, in value and in gradient. Where only one
  does, the KL towards it is infinite; JSD, skewed KL and TVD stay finite.
- :func:`sinkhorn` and :func:`mutual_information` compare rows within groups of consecutive tokens, the last of which may
  be shorter: chunks of tokens give what the whole gives if their length is a multiple of ``group``.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib.errors import KdlibError
from kdlib.losses.reference import forward_kl, sparse_kl
from kdlib.losses.targets import SparseTargets
from kdlib.study import divergences


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * KL(s || t): the student is to stay where the teacher has mass (Gu et al. 2024, arXiv 2306.08543)."""
    log_s, log_t = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_s, log_t)


def jeffreys(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 * (KL(t || s) + KL(s || t)): their sum, not their mean (Jeffreys 1946)."""
    # In full precision before the two part ways, or each would round its half of the gradient.
    pair = _full(student_logits), _full(teacher_logits)
    return forward_kl(*pair, temperature) + reverse_kl(*pair, temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """tau^2 * (beta * KL(t || m) + (1 - beta) * KL(s || m)), m = beta * t + (1 - beta) * s.

    The generalised Jensen-Shannon divergence of Agarwal et al. 2024 (arXiv 2306.13649, equation 1). Over tau^2 it is at
    most the entropy of (beta, 1 - beta). JSD / beta tends to KL(t || s) as beta -> 0 and JSD / (1 - beta) to KL(s || t)
    as beta -> 1, so its gradient is small near both ends.
    """
    _require(0 < beta < 1, "beta must lie between 0 and 1, both excluded (try forward_kl or reverse_kl there)", beta)
    log_s, log_t = _log_probabilities(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_t, log_s, beta)
    return temperature**2 * (beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m))


def skewed_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """tau^2 * KL(t || alpha * t + (1 - alpha) * s), over tau^2 at most -log alpha (Ko et al. 2024, arXiv 2402.03898)."""
    _require(0 < alpha < 1, "alpha must lie between 0 and 1, both excluded (at 0 it would be forward_kl)", alpha)
    log_s, log_t = _log_probabilities(student_logits, teacher_logits, temperature)
    return temperature**2 * _kl(log_t, _log_mixture(log_t, log_s, alpha))


def skewed_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """tau^2 * KL(s || alpha * s + (1 - alpha) * t): :func:`skewed_kl` with the roles exchanged (same paper)."""
    return skewed_kl(teacher_logits, student_logits, temperature, alpha)


def tvd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Total variation distance, sum |t - s| / 2, in 0..1 at every temperature (Wen et al. 2023, arXiv 2307.15190).

    Without a factor: it is linear in the difference, so its gradient falls as 1 / tau.
    """
    log_s, log_t = _log_probabilities(student_logits, teacher_logits, temperature)
    return (log_t.exp() - log_s.exp()).abs().sum(-1) / 2


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the vocabulary of the squared difference of centred logits (Ba & Caruana 2014, arXiv 1312.6184).

    Centred, because a constant added to all logits of a token leaves its distribution alone and so must cost nothing. It
    is twice the limit of tau^2 * KL(t || s) as tau grows. Temperature cancels: tau^2 * mean((z / tau)^2) = mean(z^2). An
    id that either side rules out (-inf) has no logit to compare and is left out.
    """
    absent = student_logits.isneginf() | teacher_logits.isneginf()
    n = (~absent).sum(-1, keepdim=True)
    difference = (_full(student_logits) - _full(teacher_logits)).masked_fill(absent, 0)
    centred = (difference - difference.sum(-1, keepdim=True) / n).masked_fill(absent, 0)
    return centred.square().sum(-1) / n.squeeze(-1)


def sinkhorn(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: int = 32,
    regularisation: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """Entropic optimal transport between the student's and the teacher's rows of a group of tokens.

    Batch-wise SinKD (Cui et al. 2024, arXiv 2402.17110): the cost of moving row i of the student onto row j of the teacher
    is ||s_i - t_j||_1, both marginals are uniform, and a token's loss is the mean distance its row is moved, so that the
    mean over a group is the cost of its transport. No factor tau^2, as for :func:`tvd`: in a group of one it is 2 * TVD.
    Not a divergence: the entropy term blurs the plan, which leaves identical rows a cost above 0.

    The distances take O(T * group * V) time. Memory is that of the logits, but on a GPU PyTorch's backward of the
    distances takes ``group`` times as much.

    Args:
        group: consecutive tokens compared with one another.
        regularisation: weight of the plan's entropy, in units of the cost, which lies in 0..2.
        iterations: Sinkhorn iterations; a smaller ``regularisation`` needs more. The gradient passes through them. Both
            default to the authors' values.
    """
    _require_count("group", group, 1)
    _require_count("iterations", iterations, 1)
    _require(regularisation > 0, "regularisation must be above 0 (0.01 is close to plain transport)", regularisation)

    def moved(log_s: Tensor, log_t: Tensor) -> Tensor:
        cost = torch.cdist(log_s.exp(), log_t.exp(), p=1)
        log_plan = -cost / regularisation
        for _ in range(iterations):
            # Scaling every column, then every row, to sum to one is a log-softmax along each: nothing can underflow.
            log_plan = log_plan.log_softmax(-2).log_softmax(-1)
        return (log_plan.exp() * cost).sum(-1)

    return _by_group(moved, *_log_probabilities(student_logits, teacher_logits, temperature), group)


def mutual_information(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    group: int = 32,
    critic_temperature: float = 0.07,
) -> Tensor:
    """InfoNCE: cross-entropy of finding a token's teacher row among those of its group from the student's row.

    -log softmax_j(<sqrt s_i, sqrt t_j> / critic_temperature) at j = i. For independent tokens log(group) minus its mean
    is a lower bound on the mutual information of the two rows, never above log(group) (Oord et al. 2018, arXiv 1807.03748,
    section 2.3; Tian et al. 2020, arXiv 1910.10699, distil with it); the loss leaves out the constant log(group). The
    critic needs no projection to learn: square roots of probabilities are unit vectors and their product is the
    Bhattacharyya coefficient, 1 only for equal rows. No factor tau^2.

    Not a divergence: it asks that rows be told apart, not that they be equal, and is best beside another loss.

    Args:
        group: consecutive tokens compared with one another; a last group of one token has loss 0.
    """
    _require_count("group", group, 2)
    _require(critic_temperature > 0, "critic_temperature must be above 0", critic_temperature)

    def not_found(log_s: Tensor, log_t: Tensor) -> Tensor:
        # Autocast would take the product in half precision.
        with torch.autocast(log_s.device.type, enabled=False):
            affinity = (log_s / 2).exp() @ (log_t / 2).exp().mT
        return -(affinity / critic_temperature).log_softmax(-1).diagonal(dim1=-2, dim2=-1)

    return _by_group(not_found, *_log_probabilities(student_logits, teacher_logits, temperature), group)


# The settings know them by the same names, and which need whole logits.
DIVERGENCES = {name: globals()[name] for name in divergences.NAMES}
DENSE_ONLY = tuple(DIVERGENCES[name] for name in divergences.ON_LOGITS)


def divergence_loss(
    name: str, student_logits: Tensor, teacher: Tensor | SparseTargets, temperature: float = 1.0, **options
) -> Tensor:
    """The loss ``name`` of :data:`DIVERGENCES` per token, [T], against a dense or a sparse teacher.

    Args:
        teacher: logits [T, V] as the student's, or sparse targets kept at this ``temperature``.
        options: further arguments of the loss, such as ``beta``.

    Raises:
        KdlibError: an unknown name, an option or temperature out of range, rows that do not match, or sparse targets
            that cannot serve this loss.
    """
    if name not in DIVERGENCES:
        raise KdlibError(f"`name` must be one of {', '.join(DIVERGENCES)}, got {name!r}.")
    loss = DIVERGENCES[name]
    _require(temperature > 0, "`temperature` must be above 0", temperature)
    sparse = isinstance(teacher, SparseTargets)
    shape = (len(teacher), student_logits.shape[-1]) if sparse else tuple(teacher.shape)
    if student_logits.ndim != 2 or student_logits.shape != shape:
        raise KdlibError(
            f"Student and teacher must have the same T tokens and V ids, got {tuple(student_logits.shape)} and {shape}. Flatten a batch "
            "first; cut padding ids off."
        )
    if not sparse:
        return loss(student_logits, teacher, temperature, **options)
    if teacher.temperature != temperature:
        raise KdlibError(
            f"`temperature` must be that of the sparse targets, {teacher.temperature}, got {temperature} for {name}. Write targets "
            f"at {temperature}, or use theirs."
        )
    if loss in DENSE_ONLY:
        raise KdlibError(
            f"Targets for {name} must be dense, since it compares whole rows of logits, got sparse ones. Choose another divergence, or "
            "dense targets."
        )
    if loss is forward_kl:
        return sparse_kl(student_logits, teacher, **options)
    log_s, log_t = coarse(student_logits, teacher, name)
    # The loss divides its logits by the temperature, which gives these log-probabilities back, and knows its own factor.
    return loss(temperature * log_s, temperature * log_t, temperature, **options)


def coarse(student_logits: Tensor, targets: SparseTargets, loss: str = "This loss") -> tuple[Tensor, Tensor]:
    """Student and teacher over the listed ids and "any other id": two log-distributions [T, M + 1].

    A log-softmax leaves log-probabilities as they are, so any divergence here takes them as logits at temperature 1. For
    forward_kl it then gives :func:`sparse_kl`. No divergence gains by merging outcomes (data-processing inequality), so
    the result is at most that on all V ids, and equal to it where at most one id is not listed.

    Args:
        student_logits: [T, V], at temperature 1; both results are at the temperature of the targets.
        targets: with a tail.
        loss: named in the error.
    """
    if targets.tail is None:
        raise KdlibError(
            f"Targets for {loss} must be dense or have a tail, got draws, which bias losses not linear in the teacher. Use forward_kl or "
            "other targets."
        )
    log_s = F.log_softmax(_full(student_logits) / targets.temperature, dim=-1)
    weights, tail = targets.weights.to(log_s.dtype), targets.tail.to(log_s.dtype)
    # Padding repeats an id with weight 0, so membership is read off the summed weights.
    listed = torch.zeros_like(log_s).scatter_add(-1, targets.ids, weights) > 0
    # Ids at -inf are masked too, because the gradient of a logsumexp over nothing is NaN.
    log_rest_s = log_s.masked_fill(listed | log_s.isneginf(), -torch.inf).logsumexp(-1)
    # A tail that underflowed is small, not impossible, which would make KL(s || t) infinite, unless no id is left.
    smallest = torch.finfo(torch.float32).tiny
    log_rest_t = tail.clamp(min=smallest).log().masked_fill((tail == 0) & log_rest_s.isneginf(), -torch.inf)
    log_listed_s = log_s.gather(-1, targets.ids).masked_fill(weights == 0, -torch.inf)
    return torch.cat([log_listed_s, log_rest_s[:, None]], -1), torch.cat([weights.log(), log_rest_t[:, None]], -1)


def _full(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return tuple(F.log_softmax(_full(z) / temperature, dim=-1) for z in (student_logits, teacher_logits))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row, with a gradient for both."""
    # Masked before the product: the gradient of p is the log-ratio, and -inf minus -inf would pass NaN on.
    return (log_p.exp() * (log_p - log_q).masked_fill(log_p.isneginf(), 0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    # Two -inf are masked first, because there the gradient of logaddexp is NaN.
    neither = log_p.isneginf() & log_q.isneginf()
    log_p, log_q = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
    mixture = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    return mixture.masked_fill(neither, -torch.inf)


def _by_group(loss, log_s: Tensor, log_t: Tensor, group: int) -> Tensor:
    """``loss`` ([N, G, V], [N, G, V]) -> [N, G] on the groups of consecutive rows of [T, V], as [T]."""
    rest = len(log_s) % group
    pieces = [x[: len(x) - rest].unflatten(0, (len(x) // group, group)) for x in (log_s, log_t)]
    losses = loss(*pieces).flatten()
    return torch.cat([losses, loss(log_s[None, -rest:], log_t[None, -rest:]).flatten()]) if rest else losses


def _require(holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise KdlibError(f"{expected}, got {found!r}.")


def _require_count(option: str, found: object, least: int) -> None:
    _require(isinstance(found, int) and found >= least, f"{option} must be a whole number, {least} or more", found)
