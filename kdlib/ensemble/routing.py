"""Routers: weights of an ensemble's members at each position, from the tokens up to it alone.

Both see the *vector of the prefix*, the sum of its tokens' rows in a table of token vectors, scaled to length 1: what a document's
vector is if a document is a bag of words (tf-idf and its projection are linear up to that scale). The sum runs along, so a token
more costs one addition, and a later token changes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from kdlib.errors import KdlibError


class PrefixVectors(nn.Module):
    """The unit vector of every prefix of some texts.

    Args:
        token_vectors: [V, D]; a row of zeros for a token that says nothing.
    """

    def __init__(self, token_vectors: Tensor):
        super().__init__()
        self.register_buffer("token_vectors", token_vectors)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicLayer | None = None,
    ) -> Tensor:
        """Vectors [batch, positions, D] of the text up to and with each token, float32; zero before the first that counts.

        Args:
            attention_mask: [batch, all positions], 0 for padding, which adds nothing; a mask of pairs [batch, 1, n, n] hides no token.
            position_ids: where one is 0, a text begins: rows may hold several, packed.
            cache: sums of the tokens before these, to which those of these are added. They are kept as the keys of a layer, so
                that reordering, cropping and selecting reach them.
        """
        used = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            used = attention_mask[:, -input_ids.shape[1] :].bool()
        sums = (self.token_vectors[input_ids].float() * used[..., None]).cumsum(dim=1)
        if cache is not None and cache.get_seq_length():
            sums = sums + cache.keys[:, 0, -1:]
        if position_ids is not None:
            sums = sums - _before(sums, self.token_vectors[input_ids].float(), used & (position_ids == 0))
        if cache is not None:
            cache.update(sums[:, None], sums.new_empty(*sums[:, None].shape[:-1], 0))
        return functional.normalize(sums, dim=-1)


def _before(sums: Tensor, rows: Tensor, begins: Tensor) -> Tensor:
    """What the running sums [batch, positions, D] held before the text that each position belongs to; 0 where none began."""
    places = torch.where(begins, torch.arange(begins.shape[1], device=begins.device), -1).cummax(dim=1).values
    at = places.clamp(min=0)[..., None].expand_as(sums)
    return torch.where(places[..., None] >= 0, sums.gather(1, at) - rows.gather(1, at), 0.0)


class RoutedCache(Cache):
    """The cache of an ensemble's members with the router's running sums as a layer more: reordering and cropping reach all."""

    def __init__(self, members: Cache):
        self.members, self.sums = members, DynamicLayer()
        super().__init__(layers=[*members.layers, self.sums])


class DistanceRouter(nn.Module):
    """Weights by the distance d of the prefix to each member's centroid: w_k ∝ exp(−d_k^p / T), of the nearest ``top_k``.

    (Gururangan et al. 2023, "Scaling expert language models with unsupervised domain discovery", arXiv 2303.14177, §2.3 has p = 2
    and T = 0.1; the code that was released with it squares the squared distance, p = 4.)

    Args:
        token_vectors: [V, D]; centroids: [K, D] in the same space, in the order of the members.
        exponent: p; temperature: T, → ∞ is the uniform pool and → 0 the nearest member; top_k: members that keep a weight.
    """

    def __init__(self, token_vectors: Tensor, centroids: Tensor, exponent: float = 4, temperature: float = 0.1, top_k: int | None = None):
        super().__init__()
        self.prefix = PrefixVectors(token_vectors)
        self.register_buffer("centroids", centroids)
        self.exponent, self.temperature, self.top_k = exponent, temperature, _checked(top_k, len(centroids))
        if not (0 < temperature < float("inf") and 0 < exponent < float("inf")):
            raise KdlibError(f"`temperature` and `exponent` of a router must be positive and finite, got {temperature} and {exponent}.")

    def describe(self) -> dict[str, Any]:
        """What :func:`empty_router` needs beside the tensors, as plain values."""
        sizes = {"kind": "distance", "members": len(self.centroids), "vectors": list(self.prefix.token_vectors.shape)}
        return sizes | {"exponent": self.exponent, "temperature": self.temperature, "top_k": self.top_k}

    def forward(self, input_ids: Tensor, **given: Any) -> Tensor:
        """Weights [batch, positions, K], float32; keywords as for :meth:`PrefixVectors.forward`."""
        vectors, centroids = self.prefix(input_ids, **given), self.centroids.float()
        # Of differences, not of products: near a centroid those would cancel.
        squared = torch.stack([(vectors - one).square().sum(dim=-1) for one in centroids], dim=-1)
        return _of_largest(-(squared ** (self.exponent / 2)) / self.temperature, self.top_k)


class GateRouter(nn.Module):
    """A small network on the vector of the prefix and the row of its last token: Linear, GELU, Linear, softmax over members.

    The last layer begins at 0, so that an untrained gate is the uniform pool.

    Args:
        token_vectors: [V, D]; members: K; hidden_size: units in between; top_k: members that keep a weight.
    """

    def __init__(self, token_vectors: Tensor, members: int, hidden_size: int = 32, top_k: int | None = None):
        super().__init__()
        self.prefix = PrefixVectors(token_vectors)
        self.hidden = nn.Linear(2 * token_vectors.shape[1], hidden_size)
        self.output = nn.Linear(hidden_size, members)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.top_k = _checked(top_k, members)

    def describe(self) -> dict[str, Any]:
        """What :func:`empty_router` needs beside the tensors, as plain values."""
        sizes = {"kind": "gate", "members": self.output.out_features, "vectors": list(self.prefix.token_vectors.shape)}
        return sizes | {"hidden_size": self.hidden.out_features, "top_k": self.top_k}

    def features(self, input_ids: Tensor, **given: Any) -> Tensor:
        """Input of the network [batch, positions, 2D], float32; keywords as for :meth:`PrefixVectors.forward`."""
        return torch.cat([self.prefix(input_ids, **given), self.prefix.token_vectors[input_ids].float()], dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Log-weights [..., K] from features [..., 2D], but for a constant."""
        return self.output(functional.gelu(self.hidden(features.to(self.hidden.weight.dtype)))).float()

    def flops_per_token(self) -> int:
        """Operations of the network for a token, a multiply-add as two."""
        return 2 * (self.hidden.weight.numel() + self.output.weight.numel())

    def forward(self, input_ids: Tensor, **given: Any) -> Tensor:
        """Weights [batch, positions, K], float32; keywords as for :meth:`PrefixVectors.forward`."""
        return _of_largest(self.logits(self.features(input_ids, **given)), self.top_k)


Router = DistanceRouter | GateRouter


def empty_router(described: dict[str, Any]) -> Router:
    """A router of that description (``describe()``) with tensors yet to be loaded, as a saved ensemble is built."""
    options = {name: value for name, value in described.items() if name not in ("kind", "members", "vectors")}
    vectors = torch.zeros(described["vectors"])
    if described["kind"] == "gate":
        return GateRouter(vectors, described["members"], **options)
    return DistanceRouter(vectors, torch.zeros(described["members"], vectors.shape[1]), **options)


def _checked(top_k: int | None, members: int) -> int | None:
    if top_k is not None and not 1 <= top_k <= members:
        raise KdlibError(f"`top_k` of a router must be 1 to {members}, its members, got {top_k}.")
    return top_k


def _of_largest(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax over the ``top_k`` largest of the last dimension, 0 elsewhere."""
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    return functional.softmax(logits, dim=-1)
