"""Members of one shape as one module: weights stacked, one forward pass for all of them, no loop over members.

Every matrix product is a batched one over members, and their heads share one attention call. Of one text for all, the mask and
the positions are the same for all, and a cache of K·heads heads is reordered, cropped and selected as any other; where each
member has a text of its own, as in training, members are rows of the batch in that call. Matrices that read the same input
(query, key and value; gate and up) are one product. Dropout is left out, as in evaluation mode.
"""

import copy
import ctypes
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep

from kdlib.errors import KdlibError
from kdlib.losses.logits import Streamed

STACKED = 64  # positions up to which the output layers of all members are one product, whose result holds K sets of logits

_LLAMA = {
    "attention_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "wide": ("mlp.gate_proj", "mlp.up_proj"),
    "narrow": ("mlp.down_proj",),
}
_GPT2 = {
    "attention_norm": ("ln_1",),
    "qkv": ("attn.c_attn",),
    "out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "wide": ("mlp.c_fc",),
    "narrow": ("mlp.c_proj",),
}
_QWEN3 = _LLAMA | {"q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",)}
# The modules whose weights and biases a block stacks.
_BLOCKS = {LlamaForCausalLM: _LLAMA, Qwen3ForCausalLM: _QWEN3, GPT2LMHeadModel: _GPT2}


class PackedMembers(nn.Module):
    """K causal language models of one shape (Llama, Qwen3 or GPT-2) that compute as one.

    The parameters of this module are the stacked weights, members first. Those of the models become views of them:
    nothing is held twice, and what trains one trains the other. Only gradients differ: they belong to the stacked
    weights. Raises KdlibError for members that cannot be packed (see :func:`unpackable`).
    """

    def __init__(self, members: Sequence[PreTrainedModel]):
        members = tuple(members)
        if reason := unpackable(members):
            raise KdlibError(f"Members must be alike to be packed, got {reason}. Run them one by one.")
        super().__init__()
        self.models = members  # a tuple: they are no submodules, since their parameters are this module's
        self.config = members[0].config
        self.gpt2 = isinstance(members[0], GPT2LMHeadModel)
        self._views: list[tuple[nn.Parameter, list[list[nn.Parameter]]]] = []
        bodies = [member.base_model for member in members]
        first = _blocks(members[0])
        self.blocks = nn.ModuleList(
            self._stacked([_blocks(member)[number] for member in members], _BLOCKS[type(members[0])])
            for number in range(len(first))
        )
        ends = {"embedding": ("wte",), "positions": ("wpe",), "norm": ("ln_f",)}
        ends = ends if self.gpt2 else {"embedding": ("embed_tokens",), "norm": ("norm",)}
        self.ends = self._stacked(bodies, ends)
        self.tied = _tied(members[0])
        self.head = self._stacked(members, {} if self.tied else {"head": ("lm_head",)})
        if self.gpt2:
            self.rotary, self.act = None, first[0].mlp.act
            self.scales = [block.attn.scaling for block in first]
            self.head_dim = first[0].attn.head_dim
        else:
            self.rotary, self.act = copy.deepcopy(bodies[0].rotary_emb), first[0].mlp.act_fn
            self.scales = [block.self_attn.scaling for block in first]
            self.head_dim = first[0].self_attn.head_dim
        self.heads = self.config.num_attention_heads
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or self.heads

    def __len__(self) -> int:
        return len(self.models)

    def member(self, number: int) -> PreTrainedModel:
        """The model itself: its parameters show what the stacked ones hold, bit for bit, also after training."""
        return self.models[number]

    def places(self, number: int) -> Iterator[tuple[nn.Parameter, nn.Parameter, slice]]:
        """Each parameter of a member, the stacked one that it is a view of, and the rows there: ``stacked[number, rows]``."""
        for stack, values in self._views:
            start = 0
            for part in values[number]:
                yield part, stack, slice(start, start + len(part))
                start += len(part)

    def output_layers(self) -> tuple[Sequence[Tensor], Sequence[None]]:
        """Weights [V, hidden] and biases (None: the models packed have none) of the members' output layers."""
        return self._head_weight().unbind(), (None,) * len(self)

    def _head_weight(self) -> Tensor:
        return self.ends["embedding_weight"] if self.tied else self.head["head_weight"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """Logits [K, batch, positions, V] of one text for all members; arguments as transformers models take them.

        ``past_key_values``: a ``DynamicCache`` that holds the heads of all members side by side
        [batch, K·heads, positions, width].
        """
        logits = self.logits(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        return torch.stack(list(logits)) if isinstance(logits, Streamed) else logits

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor | Streamed:
        """As :meth:`forward`, but streamed where a member has positions enough for a product of its own to be as fast."""
        hidden = self.hidden(input_ids, attention_mask, position_ids, past_key_values)
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, :, -logits_to_keep:]
        else:  # chosen by row of the batch, so that members go behind the positions meanwhile
            kept = slice_logits_to_keep(hidden.permute(1, 2, 0, 3).flatten(2), logits_to_keep)
            hidden = kept.unflatten(-1, (len(self), -1)).movedim(-2, 0)
        weight = self._head_weight()
        if hidden[0, ..., 0].numel() > STACKED:
            return Streamed(range(len(self)), lambda number: hidden[number] @ weight[number].T)
        logits = torch.bmm(hidden.reshape(len(self), -1, hidden.shape[-1]), weight.transpose(1, 2))
        return logits.view(*hidden.shape[:-1], weight.shape[1])

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [K, batch, positions, hidden]; arguments as transformers models take them."""
        batch, length = input_ids.shape
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        x = self._embedded("embedding", input_ids)
        if self.gpt2:
            x = x + self._embedded("positions", position_ids)
        mask = create_causal_mask(self.config, x[0], attention_mask, past_key_values, position_ids)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.repeat(1, len(self), 1, 1)  # one for each head of a member
        rotation = None if self.gpt2 else _rotation(*self.rotary(x[0], position_ids))
        return self._through(x, rotation, mask, past_key_values, 1)

    def hidden_of_each(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states after the final norm, [K, batch, positions, hidden], of a text of its own for each member.

        Args:
            input_ids, position_ids: [K, batch, positions].
            attention_mask: [K, batch, 1, positions, positions], additive, see :func:`kdlib.models.attention_mask`.
        """
        x = self._embedded("embedding", input_ids)
        if self.gpt2:
            x = x + self._embedded("positions", position_ids)
            rotation = None
        else:
            found = _rotation(*self.rotary(x[0], position_ids.flatten(0, 1)))
            rotation = tuple(one.unflatten(0, input_ids.shape[:2]) for one in found)
        return self._through(x, rotation, attention_mask.flatten(0, 1), None, 0)

    def _through(self, x: Tensor, rotation, mask: Tensor | None, cache: Cache | None, side: int) -> Tensor:
        """What the blocks and the final norm make of embeddings [K, batch, positions, hidden].

        ``side``: the dimension of [batch, heads] in which members lie side by side for the attention: 1 with one text for all, so that
        a cache and a mask are those of the batch; 0 with a text of its own for each.
        """
        shape = x.shape[:3]
        x = x.flatten(1, 2)
        for number, block in enumerate(self.blocks):
            normed = self._norm(x, block, "attention_norm").view(*shape, -1)
            x = x + self._attention(normed, block, number, rotation, mask, cache, side)
            x = x + self._mlp(self._norm(x, block, "mlp_norm"), block)
        return self._norm(x, self.ends, "norm").view(*shape, -1)

    def _embedded(self, name: str, ids: Tensor) -> Tensor:
        table = self.ends[f"{name}_weight"]
        offsets = torch.arange(len(self), device=ids.device)[:, None, None] * table.shape[1]
        return functional.embedding(ids + offsets, table.flatten(0, 1))

    def _attention(self, x, block, number, rotation, mask, cache, side) -> Tensor:
        members, batch, length = x.shape[:3]
        found = self._linear(x.flatten(1, 2), block, "qkv").view(members, batch, length, -1, self.head_dim)
        rotated, value = found.split([self.heads + self.kv_heads, self.kv_heads], dim=3)
        if "q_norm_weight" in block:
            q_norm, k_norm = block["q_norm_weight"], block["k_norm_weight"]
            weight = torch.cat([q_norm[:, None].expand(-1, self.heads, -1), k_norm[:, None].expand(-1, self.kv_heads, -1)], 1)
            rotated = weight[:, None, None] * _rms(rotated, self.config.rms_norm_eps)
        if rotation is not None:
            cos, sin = rotation
            rotated = torch.addcmul(rotated * cos, rotated.roll(self.head_dim // 2, -1), sin)
        query, key = rotated.split([self.heads, self.kv_heads], dim=3)
        # [K, batch, positions, heads, width] -> [batch, K·heads, positions, width] or [K·batch, heads, positions, width]
        order = (1, 0, 3, 2, 4) if side else (0, 1, 3, 2, 4)
        query, key, value = (one.permute(order).flatten(side, side + 1) for one in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, number)
        if self.heads > self.kv_heads:
            key, value = (one.repeat_interleave(self.heads // self.kv_heads, dim=1) for one in (key, value))
        causal = mask is None and length > 1
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=self.scales[number])
        mixed = mixed.unflatten(side, (members, -1)).permute(order)  # which is its own inverse
        return self._linear(mixed.reshape(members, batch * length, -1), block, "out")

    def _mlp(self, x: Tensor, block: nn.ParameterDict) -> Tensor:
        wide = self._linear(x, block, "wide")
        if self.gpt2:
            return self._linear(self.act(wide), block, "narrow")
        gate, up = wide.chunk(2, dim=-1)
        return self._linear(self.act(gate) * up, block, "narrow")

    def _linear(self, x: Tensor, block: nn.ParameterDict, name: str) -> Tensor:
        weight = block[f"{name}_weight"]
        weight = weight if self.gpt2 else weight.transpose(1, 2)  # GPT-2 keeps its matrices transposed
        if f"{name}_bias" in block:
            return torch.baddbmm(block[f"{name}_bias"].unsqueeze(1), x, weight)
        return torch.bmm(x, weight)

    def _norm(self, x: Tensor, block: nn.ParameterDict, name: str) -> Tensor:
        weight = block[f"{name}_weight"].unsqueeze(1)
        if self.gpt2:
            normed = functional.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_epsilon)
            return torch.addcmul(block[f"{name}_bias"].unsqueeze(1), normed, weight)
        return weight * _rms(x, self.config.rms_norm_eps)

    def _stacked(self, modules: Sequence[nn.Module], parts: dict[str, tuple[str, ...]]) -> nn.ParameterDict:
        """Weights and biases below each of ``modules`` (one for each member), stacked under the names of ``parts``."""
        found = nn.ParameterDict()
        for name, paths in parts.items():
            for kind in ("weight", "bias"):
                values = [[getattr(module.get_submodule(path), kind, None) for path in paths] for module in modules]
                if values[0][0] is not None:
                    found[f"{name}_{kind}"] = stack = _stack(values)
                    self._views.append((stack, values))
        return found

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for model in self.models:
            model._apply(fn, recurse)
        for stack, values in self._views:
            _share(stack, values)
        return self


def unpackable(members: Sequence[PreTrainedModel]) -> str | None:
    """Why these models cannot be packed, or None: packed are Llama, Qwen3 and GPT-2 models of one configuration with
    nothing replaced, hooked or shared among them.
    """
    first = members[0]
    if type(first) not in _BLOCKS:
        return f"a {type(first).__name__}, where {', '.join(kind.__name__ for kind in _BLOCKS)} are known"
    for number, member in enumerate(members):
        if type(member) is not type(first) or _settings(member) != _settings(first):
            return f"another configuration in member {number} than in member 0"
        if any(module._forward_hooks or module._forward_pre_hooks for module in member.modules()):
            return f"hooks in member {number}, which would not be called"
    config = first.config
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"{config._attn_implementation} attention, where eager and sdpa are known"
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "add_cross_attention", False):
        return "attention that is cross or upcast"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return "attention with a sliding window"
    expected = _outline(_blank(first))
    for number, member in enumerate(members):
        if _outline(member) != expected or _tied(member) != _tied(first):
            return f"parts in member {number} that its configuration does not give"
        if {(one.dtype, one.device) for one in member.parameters()} != {(first.dtype, first.device)}:
            return f"another precision or device in member {number} than in member 0"
    parameters = [one for member in members for one in member.parameters()]
    return "members that share parameters" if len(set(map(id, parameters))) < len(parameters) else None


# What a configuration says besides the computation.
_ASIDE = {"architectures", "dtype", "transformers_version", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"}


def _settings(member: PreTrainedModel) -> dict:
    values = {key: value for key, value in member.config.to_dict().items() if key not in _ASIDE and key[0] != "_"}
    return values | {"attention": member.config._attn_implementation}


def _blank(member: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(member)(copy.deepcopy(member.config))


def _outline(member: PreTrainedModel) -> tuple[dict, dict]:
    kinds = {name: type(module) for name, module in member.named_modules()}
    return kinds, {name: one.shape for name, one in member.named_parameters(remove_duplicate=False)}


def _tied(member: PreTrainedModel) -> bool:
    return member.get_output_embeddings().weight is member.get_input_embeddings().weight


def _blocks(member: PreTrainedModel) -> nn.ModuleList:
    return member.base_model.h if isinstance(member, GPT2LMHeadModel) else member.base_model.layers


def _stack(values: list[list[nn.Parameter]]) -> nn.Parameter:
    """One parameter [K, rows, ...] of what each member holds in one or several parts, which become views of it."""
    like = values[0][0]
    rows = sum(len(part) for part in values[0])
    device = like.device
    # Also inside generate and evaluation, parameters must stay such that they can be trained later.
    with torch.inference_mode(False), torch.no_grad():
        # Filled on the host, where untouched memory takes none, and freed member by member: no second copy anywhere.
        stack = torch.empty(len(values), rows, *like.shape[1:], dtype=like.dtype)
        for row, parts in zip(stack, values, strict=True):
            for place, part in zip(row.split([len(part) for part in parts]), parts, strict=True):
                place.copy_(part)
                part.data = place
            if row.nbytes > 2**20:
                _release()
        _release()
        stack = nn.Parameter(stack.to(device))
        _share(stack, values)
    return stack


def _share(stack: Tensor, values: list[list[nn.Parameter]]) -> None:
    for row, parts in zip(stack.detach(), values, strict=True):
        for place, part in zip(row.split([len(part) for part in parts]), parts, strict=True):
            part.data = place


def _release() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB, and a second copy's worth of them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _rms(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square, in float32 as the models do it."""
    return functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def _rotation(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [batch, positions, 1, width]: x·cos + roll(x)·sin rotates both halves of a head."""
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(2), torch.cat([-first, second], dim=-1).unsqueeze(2)

