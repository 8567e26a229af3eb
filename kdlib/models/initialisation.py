"""A student's weights before training, taken from its teacher.

A student is first built at random, in the shape that was asked for; ``initialise`` then gives the model to train. Where
layers are copied, its shape must agree with the teacher's, and what a shape does not say (key-value heads, MLP width,
rotary base, longest context) is the teacher's.
"""

import copy
import math

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdlib.errors import KdlibError


def initialise(student: PreTrainedModel, teacher: PreTrainedModel, how: str) -> PreTrainedModel:
    """The student to train, on the device, in the dtype and with the attention implementation of ``student``.

    Args:
        student: as built at random; used up.
        teacher: stays as it is and shares no parameter with the result.
        how: ``random``: the student as it is. ``embeddings``: with the teacher's input embedding, which a tied head
            follows, at the student's own scale; a narrower student gets the rows' coordinates along their leading
            principal directions, which keep as much of the distances between tokens as its width can. ``every_nth``: a
            model of the student's depth made of the teacher's layers of :func:`layer_choice`, and all else of the
            teacher. ``identical``: a copy of the teacher.

    Raises:
        KdlibError: unknown ``how``, different vocabularies, a teacher that is an ensemble or has adapters. For
            embeddings: a student wider than the teacher. For copied layers: another family, width or number of heads, a
            student deeper than the teacher (``every_nth``) or of another depth (``identical``).
    """
    ways = {"embeddings": _embeddings, "every_nth": _every_nth, "identical": _identical}
    if how == "random":
        return student
    if how not in ways:
        raise KdlibError(f"`initialisation` must be one of random, {', '.join(ways)}, got {how!r}.")
    _require_same_vocabulary(student, teacher)
    return ways[how](student, teacher)


def continued(student: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """A model of the student's shape, to be trained on: on the device and with the attention implementation of ``student``.

    Args:
        student: as built at random; used up.
        other: any transformers model; used up.

    Raises:
        KdlibError: another architecture, or parameters of other names or shapes, the vocabulary's among them.
    """
    if _sizes(student) != _sizes(other):
        raise KdlibError(f"start must have the student's shape, {_shape(student)}, got {_shape(other)}. Name a run of the same shape.")
    return _in_place_of(student, other)


def _sizes(model: PreTrainedModel) -> dict:
    # A tied head has no parameter of its own.
    return {name: one.shape for name, one in model.named_parameters()} | {"of": model.config.model_type}


def _shape(model: PreTrainedModel) -> str:
    config, parameters = model.config, sum(one.numel() for one in model.parameters())
    size = f"{config.num_hidden_layers} x {config.hidden_size}, {config.num_attention_heads} heads, {config.vocab_size} tokens"
    return f"{config.model_type} of {size}, {parameters} parameters"


def layer_choice(teacher_layers: int, student_layers: int) -> list[int]:
    """Numbers of the teacher's layers that a shallower student takes: evenly spaced, first and last among them.

    12 layers give 6 as 0, 2, 4, 7, 9, 11, the choice of DistilGPT2. A student of one layer takes the first, which
    reads the embeddings.

    Raises:
        KdlibError: more layers than the teacher has.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise KdlibError(
            f"A student's layers must be 1 to the teacher's {teacher_layers}, got {student_layers}."
        )
    return [round(i * (teacher_layers - 1) / max(1, student_layers - 1)) for i in range(student_layers)]


def perturb(model: PreTrainedModel, scale: float, seed: int) -> PreTrainedModel:
    """Add Gaussian noise to every matrix, in place: its standard deviation is ``scale`` times the matrix's own.

    Norms and biases are left alone. The noise depends on ``seed`` alone, and the global random state stays as it was.

    Raises:
        KdlibError: a scale that is negative or not finite.
    """
    if not 0 <= scale < math.inf:
        raise KdlibError(f"The scale of parameter noise must be finite and at least 0, got {scale}.")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            # Drawn on the CPU, so that every device sees the same noise.
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data += scale * parameter.detach().std(correction=0) * noise
    return model


def _embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    rows, target = (model.get_input_embeddings().weight.detach() for model in (teacher, student))
    if target.shape[1] > rows.shape[1]:
        raise KdlibError(
            f"The student's hidden_size must be at most the teacher's {rows.shape[1]} to transfer embeddings, got {target.shape[1]}. "
            "Choose a narrower student."
        )
    if target.shape[1] < rows.shape[1]:
        rows = _principal_coordinates(rows, target.shape[1])
    # Trained rows are several times as long as random ones: as a tied head they would insist on the token just read, and
    # untrained layers cannot correct it.
    target.copy_(rows * (target.norm() / rows.norm()))
    return student


def _principal_coordinates(rows: Tensor, width: int) -> Tensor:
    """Coordinates of centred ``rows`` along their ``width`` directions of largest variance, largest first; float64."""
    centred = rows.double() - rows.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    # An eigenvector's sign is arbitrary and differs between linear algebra libraries.
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return centred @ (directions * largest.sign())


def _every_nth(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    _require_same(student, teacher, "model_type", "hidden_size", "num_attention_heads")
    config = copy.deepcopy(teacher.config)
    kept = layer_choice(config.num_hidden_layers, student.config.num_hidden_layers)
    prefix = _layer_list(teacher)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[layer] for layer in kept])
    # Were a head of its own called tied, loading it would overwrite the embedding.
    config.tie_word_embeddings = teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
    # Built anew rather than pruned, for whatever depends on a layer's number: its place in the cache, its attention.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model = AutoModelForCausalLM.from_config(config, dtype=student.dtype)
    model.load_state_dict(_renumbered(teacher.state_dict(), prefix, kept))
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return _in_place_of(student, model)


def _identical(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    _require_same(student, teacher, "model_type", "hidden_size", "num_attention_heads", "num_hidden_layers")
    return _in_place_of(student, copy.deepcopy(teacher))


def _in_place_of(student: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """The copy made of a teacher, ready to be trained as the student."""
    model.set_attn_implementation(student.config._attn_implementation)
    # A padding id stops the gradient of that token's embedding, and it is a real token.
    model.config.pad_token_id = model.get_input_embeddings().padding_idx = None
    return model.to(student.device, student.dtype).requires_grad_(True).train(student.training)


def _layer_list(model: PreTrainedModel) -> str:
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name
    raise KdlibError(
        f"The model must be a decoder with a list of its {depth} layers, such as Llama, GPT-2 or Qwen, got {type(model).__name__}. "
        "Choose another."
    )


def _renumbered(state: dict[str, Tensor], prefix: str, kept: list[int]) -> dict[str, Tensor]:
    """The tensors outside the layers, and those of the layers ``kept`` under their new numbers."""
    taken = {name: tensor for name, tensor in state.items() if not name.startswith(f"{prefix}.")}
    for new, old in enumerate(kept):
        layer = f"{prefix}.{old}."
        taken |= {
            f"{prefix}.{new}.{name.removeprefix(layer)}": tensor
            for name, tensor in state.items()
            if name.startswith(layer)
        }
    return taken


def _require_same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    try:
        expected, found = (len(model.get_input_embeddings().weight) for model in (teacher, student))
    except NotImplementedError:  # how transformers says that a model, such as an ensemble, has no one embedding
        expected = None
    if expected is None or not isinstance(teacher, PreTrainedModel):
        raise KdlibError(
            f"The teacher must be one transformers model to copy weights, got {type(teacher).__name__}. Name a single model, and merge "
            "adapters first."
        )
    if expected != found:
        raise KdlibError(
            f"The student's vocabulary must have the teacher's {expected} tokens to copy weights, got {found}. Build it with the "
            "teacher's tokenizer."
        )


def _require_same(student: PreTrainedModel, teacher: PreTrainedModel, *names: str) -> None:
    for name in names:
        expected, found = (getattr(model.config, name, None) for model in (teacher, student))
        if expected != found:
            raise KdlibError(
                f"The student's {name} must be the teacher's, {expected}, to copy layers, got {found}. Change it, or the initialisation."
            )
