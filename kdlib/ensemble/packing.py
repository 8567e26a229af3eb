"""Packed or one by one: which way the members of an ensemble compute a forward pass, and the cache that both share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kdlib.ensemble.packed import PackedMembers, unpackable
from kdlib.errors import KdlibError
from kdlib.losses.logits import Streamed

# Positions times hidden size up to which members are packed on a CPU, where they were 1.2 times as fast as the loop and
# more (benchmarks/packing.py). Of large inputs the activations of one member fit the processor's cache, and all do not.
CROSSOVER = 2**15


class EnsembleCache(Cache):
    """The members' caches as one: its layers are theirs, so reordering, cropping and selecting reach all of them."""

    def __init__(self, members: Sequence[Cache]):
        super().__init__(layers=[layer for member in members for layer in member.layers])
        self.members = tuple(members)


class Packing:
    """Computes the members' logits, packed where that is possible and faster, and looks again when the members change.

    ``reason``: why they are computed one by one, None where they can be packed; known after the first forward pass.
    """

    def __init__(self):
        self.reason: str | None = None
        self._packed: PackedMembers | None = None
        self._members: tuple[PreTrainedModel, ...] = ()
        self._seen: list[tuple] = []

    def cache(self, members: Sequence[PreTrainedModel]) -> Cache:
        """An empty cache: one whose layers hold the heads of all members, or one of caches for members unlike."""
        self._look(members)
        if self.reason is None:
            return DynamicCache(config=members[0].config)
        return EnsembleCache([DynamicCache(config=member.config) for member in members])

    def logits(
        self,
        members: Sequence[PreTrainedModel],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor | Streamed:
        """The members' logits [K, batch, positions, V], or streamed; arguments as transformers models take them.

        With gradients or in training mode members compute one by one, since what is trained are their own parameters. Each does so
        where it lies, and its logits come back to where the text is. Raises KdlibError for members unlike with a cache that is not theirs.
        """
        # A module is not replaced between two tokens of one generation, and looking takes a good part of a token's time.
        if past_key_values is None or not past_key_values.get_seq_length():
            self._look(members)
        if not isinstance(past_key_values, EnsembleCache) and self._pays(members, input_ids):
            if self._packed is None:
                self._packed = PackedMembers(members)
                self._seen = list(_state(members))
            return self._packed.logits(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        caches = self._caches(members, past_key_values)

        def one(number: int) -> Tensor:
            member, cache = members[number], caches[number]
            place = input_ids.device if member.device.type == "meta" else member.device  # meta: weights come when they are needed
            options = {"past_key_values": cache, "use_cache": cache is not None, "logits_to_keep": logits_to_keep}
            for name, given in (("input_ids", input_ids), ("attention_mask", attention_mask), ("position_ids", position_ids)):
                options[name] = given.to(place) if isinstance(given, Tensor) else given
            logits = member(**options).logits.to(input_ids.device)
            if number == len(members) - 1 and isinstance(past_key_values, DynamicCache):
                _join(caches, past_key_values)
            return logits

        return Streamed(range(len(members)), one)

    def _pays(self, members: Sequence[PreTrainedModel], input_ids: Tensor) -> bool:
        if self.reason or len(members) == 1 or members[0].training or torch.is_grad_enabled():
            return False
        return input_ids.device.type == "cuda" or input_ids.numel() * members[0].config.hidden_size <= CROSSOVER

    def _caches(self, members: Sequence[PreTrainedModel], cache: Cache | None) -> Sequence[Cache | None]:
        if cache is None:
            return [None] * len(members)
        if isinstance(cache, EnsembleCache):
            return cache.members
        if self.reason or not isinstance(cache, DynamicCache):
            raise KdlibError(
                f"`past_key_values` must be the cache of a forward pass of this ensemble, got a {type(cache).__name__}. Leave it out "
                "and set use_cache."
            )
        return _split(cache, members)

    def _look(self, members: Sequence[PreTrainedModel]) -> None:
        unchanged = tuple(members) == self._members and all(_parts(module) == (*parts,) for module, *parts in self._seen)
        if not unchanged:
            self._packed = None  # first, so that its weights are not held while others are stacked
            self.reason = unpackable(members)
            self._members, self._seen = tuple(members), list(_state(members))


def _state(members: Sequence[PreTrainedModel]) -> Iterable[tuple]:
    for member in members:
        yield from ((module, *_parts(module)) for module in member.modules())


def _parts(module: torch.nn.Module) -> tuple[list, list[int], bool]:
    """What a module consists of: modules, where its parameters lie in memory, and whether something hooks in."""
    pointers = [one.data_ptr() for one in module._parameters.values() if one is not None]
    return list(module._modules.values()), pointers, bool(module._forward_hooks or module._forward_pre_hooks)


def _split(cache: DynamicCache, members: Sequence[PreTrainedModel]) -> list[DynamicCache]:
    """The members' own caches, views of what the cache of all holds."""
    caches = [DynamicCache(config=member.config) for member in members]
    for number, layer in enumerate(cache.layers):
        if layer.is_initialized and layer.get_seq_length():
            parts = zip(layer.keys.chunk(len(members), dim=1), layer.values.chunk(len(members), dim=1), strict=True)
            for own, (keys, values) in zip(caches, parts, strict=True):
                own.layers[number].lazy_initialization(keys, values)
                own.layers[number].keys, own.layers[number].values = keys, values
    return caches


def _join(caches: Sequence[DynamicCache], cache: DynamicCache) -> None:
    """Put what the members' own caches hold into the cache of all, whose heads are theirs side by side."""
    for layer, *parts in zip(cache.layers, *(own.layers for own in caches), strict=True):
        if not layer.is_initialized:
            layer.lazy_initialization(parts[0].keys, parts[0].values)
        layer.keys = torch.cat([part.keys for part in parts], dim=1)
        layer.values = torch.cat([part.values for part in parts], dim=1)
