"""Losses on hidden states and attention, read from both models while they run.

The losses are per token, in float32 (float64 for float64 input), and keep the windows packed in a row apart. Where the
features are read, and from which layers, is the matter of :mod:`kdlib.losses.layers`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import models
from kdlib.errors import KdlibError
from kdlib.losses.layers import VECTORS, LayerMapName, Model, blocks, capture, layer_map, taps

FEATURES = {
    "hidden_mse": ("hidden",),
    "hidden_cosine": ("hidden",),
    "attention_mse": ("attention",),
    "relation": VECTORS,
}


class FeatureLoss(nn.Module):
    """Distance between what student and teacher compute inside, averaged over layer pairs and features.

    ::

        features = FeatureLoss(student, teacher, "relation", "uniform_consecutive")
        with features.recorded():
            student_body(**batch)
            with torch.no_grad():
                teacher_body(**batch)
        total, tokens = features(segments)

    Each ``with`` serves one call, which forgets what was recorded; sums over micro-batches divided by all their tokens equal
    one batch. The bodies should not be compiled: torch.compile keeps the hooks of its first call only, and where that
    loses a layer the call is an error.

    Args:
        student, teacher: causal language models or their bodies.
        objective: ``hidden_mse`` or ``hidden_cosine``, through a linear projector for each mapped student layer where the
            widths differ (this module's parameters, to be trained along); ``attention_mse``; ``relation``.
        layers, last_k: see :func:`kdlib.losses.layers.layer_map`.
        relations: for ``relation``: of query, key and value, those to compare.
        relation_heads: number of heads that vectors are regrouped to; by default the largest that divides the width of
            both models' vectors and is no more than the attention heads of either.
        seed: of the projectors.

    Raises:
        KdlibError: an unknown objective or relation, an impossible layer map or number of relation heads, a model built
            otherwise, or attention maps that a model does not compute (not eager) or drops out.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model,
        objective: Literal["hidden_mse", "hidden_cosine", "attention_mse", "relation"],
        layers: LayerMapName = "last",
        last_k: int | None = None,
        relations: Sequence[str] = VECTORS,
        relation_heads: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if objective not in FEATURES:
            raise KdlibError(f"`objective` must be one of {', '.join(FEATURES)}, got {objective!r}.")
        if not relations or not set(relations) <= set(VECTORS):
            raise KdlibError(f"`relations` must be one or more of {', '.join(VECTORS)}, got {list(relations)}.")
        self.objective = objective
        self.pairs = layer_map(layers, len(blocks(teacher)), len(blocks(student)), last_k)
        self.features = tuple(relations) if objective == "relation" else FEATURES[objective]
        if objective == "attention_mse":
            _check_attention_maps(student, teacher)
        if objective == "relation":
            self.relation_heads = {name: _relation_heads(student, teacher, name, relation_heads) for name in relations}
        # Plain dictionaries: the models' parameters are not this module's.
        self._student = taps(student, ((name, layer) for layer, _ in self.pairs for name in self.features))
        of_teacher = {layer for _, teachers in self.pairs for layer in teachers}
        self._teacher = taps(teacher, ((name, layer) for layer in sorted(of_teacher) for name in self.features))
        self._recorded = None
        self.projectors = nn.ModuleDict()
        widths = [models.body(model).config.hidden_size for model in (student, teacher)]
        if self.features == ("hidden",) and widths[0] != widths[1]:
            generator = torch.Generator().manual_seed(seed)
            weight = next(student.parameters())
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            for layer, _ in self.pairs:
                projector = nn.utils.skip_init(nn.Linear, *widths, bias=False, dtype=dtype)
                nn.init.orthogonal_(projector.weight, generator=generator)
                self.projectors[str(layer)] = projector.to(weight.device)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records, within the ``with``, what one forward pass of each model computes in the mapped layers."""
        self._recorded = None
        with capture(self._student) as student, capture(self._teacher) as teacher:
            yield
        self._recorded = student, teacher

    def forward(self, segments: Tensor) -> tuple[Tensor, int]:
        """The loss of what was recorded.

        Args:
            segments: int [B, T], the number of the window in its row, −1 at padding: those tokens have no loss and a
                gradient of exactly zero.

        Returns:
            Sum over tokens of the loss, averaged over layer pairs and features; and the number of those tokens.

        Raises:
            KdlibError: the models did not both run within ``recorded()``.
        """
        student, teacher = self._recorded or ({}, {})
        self._recorded = None
        missing = [f"student {key}" for key in self._student.keys() - student.keys()]
        missing += [f"teacher {key}" for key in self._teacher.keys() - teacher.keys()]
        if missing:
            raise KdlibError(
                "Student and teacher, not compiled, must each run forward once within recorded() before a loss, got nothing for "
                f"{missing[0]} and {len(missing) - 1} more."
            )
        seen, losses = segments >= 0, []
        # Products under autocast would be those of half precision.
        with torch.autocast(segments.device.type, enabled=False):
            for layer, teachers in self.pairs:
                for feature in self.features:
                    targets = [teacher[feature, one].detach() for one in teachers]
                    per_token = self._per_token(feature, layer, student[feature, layer], targets, segments)
                    losses.append(per_token[seen].sum())
        return torch.stack(losses).mean(), int(seen.sum())

    def _per_token(self, feature: str, layer: int, student: Tensor, teachers: list[Tensor], segments: Tensor) -> Tensor:
        if feature in VECTORS:
            heads = self.relation_heads[feature]
            target = torch.stack([relation(one, segments, heads) for one in teachers]).mean(0)
            return relation_kl(student, target, segments, heads)
        target = torch.stack([_exact(one) for one in teachers]).mean(0)
        if feature == "attention":
            return attention_mse(student, target)
        if self.projectors:
            student = self.projectors[str(layer)](_exact(student))
        return hidden_mse(student, target) if self.objective == "hidden_mse" else hidden_cosine(student, target)


def hidden_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of hidden states per token: [B, T, D], [B, T, D] -> [B, T]."""
    return (_exact(student) - _exact(teacher)).square().mean(-1)


def hidden_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine of the angle between hidden states per token: [B, T, D], [B, T, D] -> [B, T]."""
    return 1 - F.cosine_similarity(_exact(student), _exact(teacher), dim=-1)


def attention_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between attention distributions per token, averaged over heads: [B, H, T, T] twice -> [B, T].

    Summed over keys, since a mean would depend on how long a row the window is packed in. Head h is compared with head h;
    where the numbers of heads differ, the means over heads are compared.
    """
    student, teacher = _exact(student), _exact(teacher)
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return (student - teacher).square().sum(-1).mean(1)


def relation(vectors: Tensor, segments: Tensor, heads: int) -> Tensor:
    """R = softmax(A·Aᵀ/√d_r), each token's relation to itself and to earlier tokens of its window.

    Wang et al. 2021, "MiniLMv2: multi-head self-attention relation distillation for compressing pretrained transformers"
    (arXiv 2012.15828): the attention heads' vectors are concatenated and cut into ``heads`` parts of width d_r.

    Args:
        vectors: A, queries, keys or values [B, attention heads, T, head width].
        segments: int [B, T], the number of the window in its row, −1 at padding.
        heads: number of relation heads; must divide attention heads · head width.

    Returns:
        [B, heads, T, T]; rows sum to one.
    """
    return _relation_scores(vectors, segments, heads).softmax(-1)


def relation_kl(vectors: Tensor, target: Tensor, segments: Tensor, heads: int) -> Tensor:
    """KL(target || R) per token in nats, averaged over relation heads: [B, T].

    Args:
        vectors: of the student, see :func:`relation`.
        target: the teacher's relation [B, heads, T, T].
    """
    log_r = _relation_scores(vectors, segments, heads).log_softmax(-1)
    return (torch.xlogy(target, target) - target * log_r).sum(-1).mean(1)


def _relation_scores(vectors: Tensor, segments: Tensor, heads: int) -> Tensor:
    batch, _, length, _ = vectors.shape
    if (batch, length) != segments.shape:
        raise KdlibError(
            f"`vectors` [B, heads, T, width] and `segments` [B, T] must have the same tokens, got {tuple(vectors.shape)} "
            f"and {tuple(segments.shape)}."
        )
    regrouped = _exact(vectors).transpose(1, 2).reshape(batch, length, heads, -1).transpose(1, 2)
    scores = regrouped * regrouped.shape[-1] ** -0.5 @ regrouped.transpose(2, 3)
    return scores + models.attention_mask(segments, scores.dtype)


def _relation_heads(student: Model, teacher: Model, feature: str, wanted: int | None) -> int:
    heads, widths = [], []
    for model in (student, teacher):
        config = models.body(model).config
        shared = None if feature == "query" else getattr(config, "num_key_value_heads", None)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads.append(shared or config.num_attention_heads)
        widths.append(heads[-1] * width)
    if wanted is None:
        return max(n for n in range(1, max(heads) + 1) if not any(width % n for width in widths))
    if wanted < 1 or any(width % wanted for width in widths):
        raise KdlibError(
            f"`relation_heads` must divide the width of the {feature} vectors of both models, {widths[0]} (student) and "
            f"{widths[1]} (teacher), got {wanted}."
        )
    return wanted


def _check_attention_maps(student: Model, teacher: Model) -> None:
    for role, model in (("student", student), ("teacher", teacher)):
        config = models.body(model).config
        if config._attn_implementation != "eager":
            raise KdlibError(
                f"Attention of the {role} must be eager for attention maps, got {config._attn_implementation}. "
                'Call set_attn_implementation("eager") on it, or choose the objective relation.'
            )
    config = models.body(student).config
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    if dropout:
        raise KdlibError(
            f"Attention dropout of the student must be 0 for attention maps, got {dropout:g}. Build or load it with "
            "attention_dropout=0 (attn_pdrop=0 for GPT-2)."
        )


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
