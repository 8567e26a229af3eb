"""How large a model is, component by component, and how many operations it takes."""

from collections.abc import Iterator

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from kdlib.models.parts import plain_model

INNER = ("attention", "mlp", "norms", "other")  # components that are neither embedding nor output head


def parameters_by_component(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """Parameters in embedding (tokens and positions), attention, mlp, norms, head and other; non_embedding and total.

    A weight tied to the input embedding counts there and not in the head. ``non_embedding`` leaves out embedding and
    head, as N of Kaplan et al. 2020, "Scaling laws for neural language models".
    """
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "other"), 0)
    for component, parameter in _components(model):
        counts[component] += parameter.numel()
    inner = sum(counts[name] for name in INNER)
    return counts | {"non_embedding": inner, "total": sum(counts.values())}


def _components(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
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
        yield component, parameter


def flops_per_token(model: PreTrainedModel | PeftModel, context: int) -> int:
    """Floating-point operations of a forward pass, per token; training takes :func:`training_flops_per_token`.

    An ensemble takes the sum of its members.

    A multiply-add is two operations, so the matrices cost 2 per non-embedding parameter (Kaplan et al. 2020, §2.1), the
    head 2·V·hidden, and attention's two products with ``context`` keys 4·context·width in each layer, masked or not
    (Hoffmann et al. 2022, "Training compute-optimal large language models", appendix F).
    """
    plain = plain_model(model)
    if members := getattr(plain, "members", None):
        return sum(flops_per_token(member, context) for member in members)
    config = plain.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    matrices = parameters_by_component(model)["non_embedding"] + plain.get_output_embeddings().weight.numel()
    return 2 * matrices + 4 * config.num_hidden_layers * context * width


def training_flops_per_token(model: PreTrainedModel | PeftModel, context: int) -> int:
    """Floating-point operations of a forward and a backward pass, per token, with the model's parameters as frozen as they are.

    The backward pass costs twice the forward (Hoffmann et al. 2022, appendix F): half of it is the gradient that a layer
    hands down, half that of its weights. A frozen matrix, as under adapters (Hu et al. 2022, §4.2), needs no gradient of
    its own: 2 less per parameter. Each layer is taken to hand a gradient down, so parameters frozen below all trained ones
    cost a little less than counted.
    """
    counted = [parameter for component, parameter in _components(model) if component in INNER]
    counted.append(plain_model(model).get_output_embeddings().weight)
    frozen = sum(parameter.numel() for parameter in counted if not parameter.requires_grad)
    return 3 * flops_per_token(model, context) - 2 * frozen
