"""An ensemble as one Hugging Face causal language model: load, save, generate and evaluate it as any other.

Importing this module registers the ``kdlib_ensemble`` type with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kdlib.ensemble.packing import Packing
from kdlib.ensemble.pooling import POOLS, Members, log_probs, pool_of
from kdlib.ensemble.routing import RoutedCache, Router, empty_router
from kdlib.errors import KdlibError


class EnsembleConfig(PreTrainedConfig):
    """``members``: the members' own configurations as dictionaries; ``pool``: "probability" or "logit".

    ``exponent``: of a power mean, in place of ``pool``. ``weights``: one a member, None for equal ones. ``router``: description of a
    router (``describe()``), whose tensors are saved with the members', None for none.

    ``calibration_temperature`` divides the pooled log-probabilities (1 leaves the pool bit for bit). It is not called
    ``temperature``: that name is the sampling temperature of ``generate``, and transformers would apply it a second
    time.
    """

    model_type = "kdlib_ensemble"

    members: list[dict[str, Any]] | tuple = ()
    pool: str = "probability"
    exponent: float | None = None
    weights: list[float] | tuple | None = None
    router: dict[str, Any] | None = None
    calibration_temperature: float = 1.0
    vocab_size: int = 0
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """K causal language models of any kind over one vocabulary; ``logits`` are the log of their pooled distribution."""

    config_class = EnsembleConfig
    # Every member checks the requested attention for itself; the ensemble has none of its own.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: EnsembleConfig):
        attention = config._attn_implementation  # what was asked for, before the base class fills in its own default
        super().__init__(config)
        self.members = nn.ModuleList()
        self.packing = Packing()
        for member in config.members:
            member_config = AutoConfig.for_model(**member)
            member_config.dtype = torch.get_default_dtype()
            self.members.append(AutoModelForCausalLM.from_config(member_config, attn_implementation=attention))
        self.router = empty_router(config.router) if config.router else None
        self.post_init()
        # post_init collects tied weights from direct children only, and the members are the children of a list.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    @classmethod
    def from_members(
        cls,
        members: Sequence[PreTrainedModel],
        pool: str = "probability",
        temperature: float = 1.0,
        tokenizers: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        exponent: float | None = None,
        router: Router | None = None,
    ) -> "EnsembleForCausalLM":
        """An ensemble that holds these very models (not copies) and is, as they then are, in evaluation mode.

        ``temperature``: calibration temperature of the pool. ``tokenizers``: the members' own (fast) tokenizers,
        compared if given. ``weights``: of the members, default equal; ``router``: weights at each position, in their place.
        ``exponent``: of a power mean, in place of ``pool``. Raises KdlibError for members that differ in vocabulary, special
        tokens, tokenizer or precision, and for a way to combine them that does not fit them.
        """
        members = list(members)
        _refuse_unlike(members, tokenizers)
        _refuse_unfit(members, pool, weights, exponent, router)
        if not 0 < temperature < float("inf"):
            raise KdlibError(f"`temperature` of a pool must be positive and finite, got {temperature}. 1 changes nothing.")
        configs = [member.config.to_dict() for member in members]
        lengths = [getattr(member.config, "max_position_embeddings", None) for member in members]
        config = cls.config_class(
            members=[{key: value for key, value in config.items() if key != "_name_or_path"} for config in configs],
            pool=pool,
            exponent=exponent,
            weights=None if weights is None else [float(one) for one in weights],
            router=None if router is None else router.describe(),
            calibration_temperature=float(temperature),
            max_position_embeddings=min(filter(None, lengths), default=None),
            dtype=members[0].dtype,
            **{name: configs[0].get(name) for name in VOCABULARY},
        )
        with torch.device("meta"):
            ensemble = cls(config)
        ensemble.members = nn.ModuleList(members)
        ensemble.router = router
        ensemble.generation_config = copy.deepcopy(members[0].generation_config)
        return ensemble.eval()

    @property
    def pool(self) -> Callable[..., Tensor]:
        """Log-probabilities of the members, [K, ..., V] or streamed -> those of the pool, uncalibrated; a router's weights go with them."""
        return pool_of(self.config.pool, self.config.exponent, self.config.weights)

    def _pooled(self, log_probs: Members, input_ids: Tensor, weights: Tensor | None = None) -> Tensor:
        """Log-probabilities of the pool, uncalibrated; ``weights`` [K, batch, positions]: a router's."""
        return self.pool(log_probs) if weights is None else self.pool(log_probs, weights=weights)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate would make one cache for one model; forward makes the members' own

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Pooled log-probabilities [batch, positions, V] in float32 as ``logits``; with ``labels`` also the mean
        next-token cross-entropy in the Hugging Face convention (labels are shifted here, -100 is ignored; other
        keywords go to that loss).
        """
        if past_key_values is None and use_cache:
            past_key_values = self.packing.cache(self.members)
            if self.router is not None:
                past_key_values = RoutedCache(past_key_values)
        cache, weights = past_key_values, None
        if self.router is not None:
            cache, sums = (None, None) if cache is None else (cache.members, cache.sums)
            routed = self.router(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=sums)
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            weights = routed[:, kept].movedim(-1, 0)
        logits = self.packing.logits(self.members, input_ids, attention_mask, position_ids, cache, logits_to_keep)
        pooled = self._pooled(log_probs(logits), input_ids, weights)
        if self.config.calibration_temperature != 1:
            pooled = log_probs(pooled / self.config.calibration_temperature)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=pooled, past_key_values=past_key_values)


VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def _refuse_unfit(members: list, pool: str, weights: Sequence[float] | None, exponent: float | None, router: Router | None) -> None:
    """A pool there is, and weights or a router for just these members."""
    if pool not in POOLS:
        raise KdlibError(f"`pool` must be one of {sorted(POOLS)}, got {pool!r}.")
    if weights is not None and router is not None:
        raise KdlibError("An ensemble must have weights or a router, got both. Leave out `weights`.")
    # Tried on one token that all members agree about: what does not fit is told now, and not by a pass over a text.
    pool_of(pool, exponent, weights)(torch.zeros(len(members), 1))
    if router is not None:
        found, vocabulary = router.describe(), members[0].config.vocab_size
        if (found["members"], found["vectors"][0]) != (len(members), vocabulary):
            raise KdlibError(
                f"`router` must be of {len(members)} members and {vocabulary} tokens, got one of {found['members']} and "
                f"{found['vectors'][0]}. Make it for these members."
            )


def _refuse_unlike(members: list[PreTrainedModel], tokenizers: Sequence[Any] | None) -> None:
    """One vocabulary, one precision, and models that transformers can load again by their configuration."""
    for number, member in enumerate(members):
        if not isinstance(member, PreTrainedModel):
            raise KdlibError(
                f"Members of an ensemble must be transformers models, got {type(member).__name__} as member {number}. "
                "Merge an adapter into its base first (merge_and_unload)."
            )
    if not members:
        raise KdlibError("An ensemble must have at least one member, got none. Check that the member runs exist.")
    traits = {name: [getattr(member.config, name, None) for member in members] for name in VOCABULARY}
    traits["dtype"] = [member.dtype for member in members]
    for name, values in traits.items():
        if any(value != values[0] for value in values):
            raise KdlibError(
                f"Members of an ensemble must share vocabulary and precision, got different {name}: {values}. Use members trained with one "
                "tokenizer."
            )
    if tokenizers is not None:
        states = [tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers]
        unlike = [number for number, state in enumerate(states) if state != states[0]]
        if len(states) != len(members) or unlike:
            raise KdlibError(
                f"Members of an ensemble must share one tokenizer, got {len(states)} for {len(members)} members, where {unlike} differ "
                "from the first. Use members trained with one."
            )


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig, exist_ok=True)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
