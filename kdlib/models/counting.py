"""How large a model is, component by component, and how many operations it takes.

Counted are the matrix products that the mathematics needs, a multiply-add as two operations (Kaplan et al. 2020, "Scaling
laws for neural language models", §2.1):

- Attention is causal and within its window: a token sees itself and what came before it in the same window. A program
  that masks a dense product over the whole row computes more, and so does one that pads.
- A mixture of experts takes the experts that a token is sent to, and not the others.
- What a program computes twice to save memory counts once, as in model FLOPs utilisation (Chowdhery et al. 2022, "PaLM",
  appendix B).
- Embedding look-ups, norms, biases, activations, softmax and the optimiser are left out: a few operations per number,
  against one per row of a matrix. Sliding windows and other sparse attention are counted as full.
"""

import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from kdlib.models.parts import plain_model

INNER = ("attention", "mlp", "norms", "other")  # components that are neither embedding nor output head


def parameters_by_component(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """Parameters in embedding (tokens and positions), attention, mlp, norms, head and other; non_embedding and total.

    A weight tied to the input embedding counts there and not in the head. ``non_embedding`` leaves out embedding and
    head, as N of Kaplan et al. 2020. All experts of a mixture count, for this is what is stored; of an ensemble all members.
    """
    if members := getattr(plain_model(model), "members", None):
        found = [parameters_by_component(one) for one in members]
        return {name: sum(one[name] for one in found) for name in found[0]}
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "other"), 0)
    for _, component, parameter in _components(model):
        counts[component] += parameter.numel()
    inner = sum(counts[name] for name in INNER)
    return counts | {"non_embedding": inner, "total": sum(counts.values())}


@dataclass(frozen=True)
class Operations:
    """Operations of a model's matrix products, forward and backward.

    Attributes:
        body, body_backward: per token, in all that lies between embedding and output layer but attention's two products.
        attention, attention_backward: per pair of a token and a token that it sees, in all layers.
        head, head_backward: per token whose successor is predicted.
    """

    body: int = 0
    attention: int = 0
    head: int = 0
    body_backward: int = 0
    attention_backward: int = 0
    head_backward: int = 0

    def forward(self, tokens: float, pairs: float) -> int:
        """A forward pass over ``tokens`` that see ``pairs``, each predicting its successor (see :func:`extent`)."""
        return round((self.body + self.head) * tokens + self.attention * pairs)

    def backward(self, tokens: float, pairs: float) -> int:
        """The backward pass that belongs to :meth:`forward`."""
        return round((self.body_backward + self.head_backward) * tokens + self.attention_backward * pairs)

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def operations(model: nn.Module) -> Operations:
    """What a model takes, with its parameters as frozen as they are; an ensemble takes the sum of its members.

    The backward pass is twice the forward: the gradient that a matrix hands down, and its own (Hoffmann et al. 2022,
    "Training compute-optimal large language models", appendix F). A frozen matrix, as under adapters (Hu et al. 2022,
    §4.2), has none of its own. Blocks below everything that is trained take no backward pass. In the lowest block that
    takes one, each matrix is counted as handing a gradient down: with adapters alone trained, the products that read the
    block's input need not, so that the query, key and value matrices of one block are counted once too often.
    """
    members = getattr(plain_model(model), "members", [model])
    return sum((_of_one(member) for member in members), Operations())


def extent(lengths: ArrayLike) -> tuple[int, int]:
    """Tokens of windows of these ``lengths``, and pairs of a token and a token that it sees: Σ n, Σ n(n + 1)/2."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())


def window_lengths(index: np.ndarray) -> np.ndarray:
    """Lengths of the windows in packed rows (:func:`kdlib.data.corpus.pack`), [windows]."""
    begins = np.ones(index.shape, dtype=bool)
    begins[:, 1:] = index[:, 1:] != index[:, :-1] + 1
    used = index.reshape(-1) >= 0
    lengths = np.bincount(np.cumsum(begins.reshape(-1))[used])
    return lengths[lengths > 0]


def _components(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, component and values of each parameter."""
    plain = plain_model(model)
    embeddings = {id(plain.get_input_embeddings().weight)}
    outputs = {id(parameter) for parameter in plain.get_output_embeddings().parameters()} - embeddings
    for name, parameter in plain.named_parameters():  # shared parameters come once
        if id(parameter) in embeddings or ".wpe." in name:
            component = "embedding"
        elif id(parameter) in outputs:
            component = "head"
        elif "norm" in name or ".ln_" in name:
            component = "norms"
        elif "attn" in name or "attention" in name:
            component = "attention"
        else:
            component = "mlp" if ".mlp." in name else "other"
        yield name, component, parameter


def _of_one(model: PreTrainedModel | PeftModel) -> Operations:
    plain = plain_model(model)
    config, output = plain.config.get_text_config(), plain.get_output_embeddings().weight
    layers = config.num_hidden_layers
    found = [(_depth(name, component, layers), component, name, one) for name, component, one in _components(model)]
    lowest = min((depth for depth, _, _, one in found if one.requires_grad), default=layers + 2)
    body = body_backward = 0
    for depth, component, name, parameter in found:
        if component in INNER and parameter.ndim >= 2:  # vectors scale and shift
            used, experts = _experts(name, config)
            forward = 2 * parameter.numel() * used // experts
            body += forward
            body_backward += forward * (1 + parameter.requires_grad) * (depth >= lowest)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    head = 2 * output.numel()
    # Scores and weighted sum, over the query heads: those of grouped queries share keys and values, not products.
    return Operations(
        body=body,
        attention=4 * width * layers,
        head=head,
        body_backward=body_backward,
        attention_backward=8 * width * max(0, layers - max(0, lowest)),
        head_backward=head * ((lowest <= layers) + output.requires_grad),
    )


def _depth(name: str, component: str, layers: int) -> int:
    """Where in the model a parameter takes part: −1 the embedding, then the blocks, the final norm and the head."""
    if component in ("embedding", "head"):
        return -1 if component == "embedding" else layers + 1
    block = re.search(r"\.(\d+)\.", name)
    return int(block.group(1)) if block else layers


def _experts(name: str, config) -> tuple[int, int]:
    """How many of how many experts a token meets; a matrix outside a mixture is the one of one."""
    numbers = (getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    used, experts = getattr(config, "num_experts_per_tok", None), next(filter(None, numbers), None)
    return (used, experts) if ".experts." in name and used and experts else (1, 1)
