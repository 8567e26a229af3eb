"""The layers of two models: which learns from which, and how to read what a layer computes.

Layer l, counted from 1, is decoder block l and its output. Where a student layer has several teacher layers, its target is
their mean: for a squared error or a KL divergence that has the same gradient as the mean of one loss per teacher layer.
Such maps are compared in Udagawa et al. 2023, "A comparative analysis of task-agnostic distillation methods for compressing
transformer language models" (arXiv 2310.08797); here they are defined for any pair of depths they can serve.

Forward hooks read the layers, so the code of the models stays as it is; transformers decoders like Llama, GPT-2 and Qwen
are understood, plain or wrapped by peft. Queries and keys are read before the rotary embedding. It turns the vectors of
two tokens against each other by an angle that depends on their distance and the head's width, not on anything learnt:
products of turned queries would ask a student with other heads to undo its own angles. Qwen3's norms of queries and keys
are learnt, and part of what is read.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib import models
from kdlib.errors import KdlibError

Model = PreTrainedModel | PeftModel
# A key is a feature (hidden, attention, query, key or value) and a layer; a tap the module whose output holds it, and how
# to take it from there.
Key = tuple[str, int]
Taps = dict[Key, tuple[nn.Module, Callable[..., Tensor]]]
VECTORS = ("query", "key", "value")
LayerMapName = Literal["last", "last_k", "all", "uniform_consecutive", "uniform_last"]


def layer_map(
    name: LayerMapName, teacher_layers: int, student_layers: int, last_k: int | None = None
) -> list[tuple[int, tuple[int, ...]]]:
    """Pairs (student layer, its teacher layers), by student layer.

    With T and S for the depths of teacher and student:

    - ``last``: S learns from T.
    - ``last_k``: the last k layers of the student learn from the last k of the teacher, one from one, with equal weight.
    - ``all``: each layer learns from its namesake; T = S only.
    - ``uniform_consecutive``: i learns from floor(T(i-1)/S)+1 .. floor(T·i/S), so every teacher layer serves exactly once.
    - ``uniform_last``: i learns from floor(T·i/S) and from T.

    Raises:
        KdlibError: an unknown name, depths the map is impossible for, or a ``last_k`` missing, too large or not asked for.
    """
    depths = f"{teacher_layers} teacher and {student_layers} student layers"
    if min(teacher_layers, student_layers) < 1:
        raise KdlibError(f"Both models must have at least one layer, got {depths}.")
    if (last_k is not None) != (name == "last_k"):
        raise KdlibError(
            f"`last_k` must be given with the layer map last_k and no other, got the map {name!r} with last_k = {last_k}."
        )
    students = range(1, student_layers + 1)
    match name:
        case "last":
            return [(student_layers, (teacher_layers,))]
        case "last_k":
            if not 1 <= last_k <= min(teacher_layers, student_layers):
                raise KdlibError(f"`last_k` must be between 1 and the smaller depth, got {last_k} for {depths}.")
            return [(i, (i - student_layers + teacher_layers,)) for i in students[-last_k:]]
        case "all":
            if teacher_layers != student_layers:
                raise KdlibError(
                    f"Depths must be equal for the layer map all, got {depths}. Choose uniform_consecutive, or change the student's depth."
                )
            return [(i, (i,)) for i in students]
        case "uniform_consecutive" | "uniform_last":
            if student_layers > teacher_layers:
                raise KdlibError(
                    f"The student must be no deeper than the teacher for the layer map {name}, got {depths}. Choose last or last_k."
                )
            ends = {i: teacher_layers * i // student_layers for i in (0, *students)}
            if name == "uniform_consecutive":
                return [(i, tuple(range(ends[i - 1] + 1, ends[i] + 1))) for i in students]
            return [(i, tuple(sorted({ends[i], teacher_layers}))) for i in students]
        case _:
            raise KdlibError(
                f"`layers` must be last, last_k, all, uniform_consecutive or uniform_last, got {name!r}."
            )


def blocks(model: Model) -> nn.ModuleList:
    """The decoder blocks, first to last.

    Raises:
        KdlibError: they are not where Llama, Qwen or GPT-2 have them.
    """
    body = models.body(model)
    found = getattr(body, "layers", getattr(body, "h", None))
    if found is None:
        raise KdlibError(
            f"Blocks must be in `layers`, as in Llama and Qwen, or in `h`, as in GPT-2, got neither in {type(body).__name__}."
        )
    return found


def taps(model: Model, wanted: Iterable[Key]) -> Taps:
    """Where the wanted (feature, layer) of a model are computed; layer 1 is the first block.

    ``hidden`` is what a block returns [B, T, D], ``attention`` the weights of eager attention [B, heads, T, T], ``query``,
    ``key`` and ``value`` the vectors [B, heads, T, head width] before the rotary embedding.

    Raises:
        KdlibError: the model is built otherwise.
    """
    return {(feature, layer): _tap(model, feature, layer) for feature, layer in wanted}


def _tap(model: Model, feature: str, layer: int) -> tuple[nn.Module, Callable[..., Tensor]]:
    block = blocks(model)[layer - 1]
    if feature == "hidden":
        return block, lambda output: output if isinstance(output, Tensor) else output[0]
    attention = getattr(block, "self_attn", getattr(block, "attn", None))
    if attention is not None and feature == "attention":
        return attention, lambda output: output[1]

    def by_head(output: Tensor) -> Tensor:
        return output.reshape(*output.shape[:2], -1, attention.head_dim).transpose(1, 2)

    if models.body(model).config.model_type == "gpt2":
        part = VECTORS.index(feature)
        return attention.c_attn, lambda output: by_head(output.chunk(3, -1)[part])
    for name in (f"{feature[0]}_norm", f"{feature[0]}_proj"):
        if hasattr(attention, name):
            return getattr(attention, name), by_head
    raise KdlibError(
        f"The {feature} of layer {layer} must be found as in Llama, Qwen or GPT-2 (self_attn with q_proj, k_proj, v_proj, or attn), got "
        f"{type(models.body(model)).__name__}."
    )


@contextmanager
def capture(where: Taps) -> Iterator[dict[Key, Tensor]]:
    """A dictionary that the next forward pass within the ``with`` fills: (feature, layer) -> tensor.

    Raises:
        KdlibError: a second pass through the same layer, which would replace the first.
    """
    found = {}

    def record(key, take):
        def hook(_module, _inputs, output):
            if key in found:
                raise KdlibError(
                    f"Each model must run forward once and share no layers, got the {key[0]} of layer {key[1]} twice. Run anything else "
                    "outside recorded()."
                )
            found[key] = take(output)

        return hook

    handles = [module.register_forward_hook(record(key, take)) for key, (module, take) in where.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
