"""What a model makes of a text that somebody types: what it expects at every token, and how it would go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdlib.cache.kinds import Kind, take
from kdlib.data.corpus import separator_id
from kdlib.ensemble.pooling import log_probs
from kdlib.errors import KdlibError


@dataclass(frozen=True)
class Reading:
    """A text as one model sees it, as the beginning of a document.

    Attributes:
        tokens: [n] pieces of the text.
        surprise: [n] float32, −log p of each token given those before it, nats.
        expected: [n + 1, V] float32 log-probabilities; row i is of token i, the last one of what comes after the text.
    """

    tokens: list[str]
    surprise: Tensor
    expected: Tensor

    def after(self, first: int) -> tuple[list[str], Tensor]:
        """Pieces and their surprise, NaN for the ``first`` ones, which were given."""
        return self.tokens, torch.cat([torch.full((first,), torch.nan), self.surprise[first:]])


@torch.no_grad()
def read(model: nn.Module, tokenizer, text: str | list[int]) -> Reading:
    """One pass of a causal LM or an ensemble over a text, or over its token ids.

    Raises:
        KdlibError: no token, or more than the model can read.
    """
    ids = _ids(model, tokenizer, text)
    found = log_probs(model(input_ids=ids).logits[0]).cpu()
    read = ids[0, 1:].cpu()
    surprise = -found[:-1].gather(1, read[:, None])[:, 0]
    return Reading([tokenizer.decode([one]) for one in read.tolist()], surprise, found)


def likeliest(log_p: Tensor, tokenizer, n: int) -> list[tuple[str, int, float]]:
    """The n most likely tokens of a distribution [V], most likely first: piece of text, id, probability."""
    found = log_p.topk(n)
    pairs = zip(found.indices.tolist(), found.values.exp().tolist(), strict=True)
    return [(tokenizer.decode([one]), one, p) for one, p in pairs]


def kept(log_p: Tensor, kind: Kind, seed: int = 0) -> Tensor:
    """What cached targets of a kind hold of one distribution [V]: weights [V], 0 where they hold nothing."""
    uniforms = torch.rand(1, kind.uniforms, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    entries = take(kind, log_p[None], uniforms)
    weights = torch.zeros(len(log_p))
    weights[torch.from_numpy(entries["ids"])] = torch.from_numpy(kind.weights[entries["codes"]])
    return weights


def disagreement(readings: Sequence[Reading]) -> Tensor:
    """How far the members of a pool disagree about each token of one text: [n] nats, 0 to log K.

    The generalised Jensen-Shannon divergence H(mean p) − mean H(p) of their distributions (Lin 1991, "Divergence measures
    based on the Shannon entropy", equation 5.1).
    """
    members = torch.stack([one.expected[:-1].double().exp() for one in readings])
    return (_entropy(members.mean(0)) - _entropy(members).mean(0)).clamp(min=0).float()


def write(model: nn.Module, tokenizer, text: str, tokens: int, seed: int, temperature: float = 1.0) -> list[int]:
    """Token ids of the text and of up to ``tokens`` more that the model samples; fewer where its context or a document ends.

    Raises:
        KdlibError: no token, or more than the model can read.
    """
    ids = _ids(model, tokenizer, text)
    separator, room = separator_id(tokenizer), _context(model, ids.shape[1] + tokens) - ids.shape[1]
    if room < 1:
        return ids[0, 1:].tolist()
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "eos_token_id": separator, "pad_token_id": separator}
    # A random state apart: what is sampled depends on the seed alone, and nothing else on the sampling.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(tokens, room), **options)
    found = written[0, 1:].tolist()
    return found[:-1] if found[-1] == separator else found


def _ids(model: nn.Module, tokenizer, text: str | list[int]) -> Tensor:
    read = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
    ids = [separator_id(tokenizer), *read]
    most = _context(model, len(ids))
    if not 1 < len(ids) <= most:
        raise KdlibError(f"`text` must have 1 to {most - 1} tokens for this model, got {len(ids) - 1}. Write a shorter or longer one.")
    return torch.tensor([ids], device=next(model.parameters()).device)


def _context(model: nn.Module, otherwise: int) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or otherwise


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)
