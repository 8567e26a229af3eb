"""Vocabularies: prune a teacher's byte-level BPE tokenizer, or train one, and slice models to match.

Assumes byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen): text is split by a pre-tokenizer, spelled in 256 byte
characters, and those are joined by *merges*, the highest-ranked first (Sennrich et al. 2016, "Neural machine
translation of rare words with subword units"; Radford et al. 2019). A subset of the tokens is again such a tokenizer
if it is closed under merges.
"""

import hashlib
import json
from collections.abc import Iterable
from itertools import islice, zip_longest

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdlib.data.documents import CHATML
from kdlib.errors import KdlibError

SEPARATOR = "<|endoftext|>"
BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
# 13 of the 256 bytes never occur in UTF-8, and some vocabularies lack them. This text holds every byte that does occur:
# ASCII, the continuation bytes, then the first bytes of two-, three- and four-byte characters.
_FIRST_BYTES = [*range(0xC0, 0x800, 0x40), 0x800, *range(0x1000, 0xD800, 0x1000), 0xE000, 0xF000]
_EVERY_BYTE = "".join(map(chr, [*range(0xC0), *_FIRST_BYTES, *range(0x10000, 0x110000, 0x10000)]))


def prune(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int
) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Keep the ``size`` most useful tokens of a byte-level BPE tokenizer, closed under merges.

    A token is as useful as the number of times it would be produced in ``texts`` if nothing longer were built from it:
    its own count plus that of every token merged from it. Kept first: the bytes, and the special tokens that the named
    roles (eos, bos, pad, unk, …), the chat template, the post-processor or the separator of documents need. Other
    special tokens are dropped, as are the merges of which a part or the result is.

    The result encodes any text without loss, up to the tokenizer's own normaliser. If the vocabulary lacks a byte that
    UTF-8 uses (SmolLM2's lacks eight), a dropped special token gives that byte its id and so its embedding row: every
    id stays the teacher's. At ``size`` ≥ the full size nothing is dropped and no encoding changes.

    Args:
        tokenizer: fast byte-level BPE tokenizer.
        texts: what tokens are counted in; an iterable, read once.
        size: number of tokens to keep; fewer are kept only if dropping special tokens leaves fewer.

    Returns:
        The pruned tokenizer and ``kept``, int64 [tokens], ascending: its token ``i`` is the old token ``kept[i]``.

    Raises:
        KdlibError: not byte-level BPE; ``size`` below bytes and needed special tokens; bytes without a stand-in.
    """
    state = _state(tokenizer)
    ids = tokenizer.get_vocab()
    token = {i: text for text, i in ids.items()}
    if size >= len(ids):
        return _rebuild(tokenizer, state, [token[i] for i in sorted(token)]), np.array(sorted(token), np.int64)

    needed = _needed_specials(tokenizer, state)
    specials = {added["content"] for added in state["added_tokens"] if added["special"]}
    spare = sorted(ids[text] for text in specials - needed)
    missing = sorted(_spelling(_EVERY_BYTE) - ids.keys())
    if len(missing) > len(spare):
        raise KdlibError(
            f"The tokenizer must have all bytes of UTF-8, got {len(missing)} missing and {len(spare)} unused special tokens to replace "
            "them. Choose a teacher whose vocabulary has all bytes."
        )
    token.update(zip(spare, missing, strict=False))
    required = {ids[text] for text in needed | (BYTES & ids.keys())} | set(spare[: len(missing)])
    if size < len(required):
        raise KdlibError(
            f"`size` must be at least {len(required)}: {len(required) - len(needed)} bytes and {len(needed)} special tokens in use "
            f"({', '.join(sorted(needed))}), got {size}."
        )
    # Reversed, so that of several merges with one result the highest-ranked, the one BPE tries first, stays.
    parts = {ids[left + right]: (ids[left], ids[right]) for left, right in reversed(state["model"]["merges"])}
    usefulness = _count(tokenizer, texts, max(token) + 1)
    for longer in sorted(parts, key=lambda i: (-len(token[i]), i)):
        for part in parts[longer]:
            usefulness[part] += usefulness[longer]
    kept = np.array(sorted(_closed(required, set(token) - set(spare), usefulness, parts, size)), np.int64)
    return _rebuild(tokenizer, state, [token[i] for i in kept.tolist()]), kept


def _state(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The tokenizer's JSON, if it is byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model, splitter = state.get("model", {}), state.get("pre_tokenizer") or {}
    steps = {step["type"] for step in splitter.get("pretokenizers", [splitter] if splitter else [])}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or "ByteLevel" not in steps or affixes:
        raise KdlibError(
            f"`tokenizer` must be fast byte-level BPE, such as SmolLM2's, got {type(tokenizer).__name__} with model "
            f"{model.get('type')}, pre-tokenizer {', '.join(sorted(steps)) or 'none'}"
            f"{' and word affixes' if affixes else ''}. Choose another teacher."
        )
    return state


def _spelling(text: str) -> set[str]:
    """The byte characters that spell a text."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return set("".join(piece for piece, _ in splitter.pre_tokenize_str(text)))


def _needed_specials(tokenizer: PreTrainedTokenizerBase, state: dict) -> set[str]:
    added = {token["content"] for token in state["added_tokens"]}
    named = {SEPARATOR, state["model"].get("unk_token"), *tokenizer.special_tokens_map.values()}
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    inserted = json.dumps(state["post_processor"], ensure_ascii=False)
    return {text for text in added if text in named or text in template or f'"{text}"' in inserted}


def _count(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], size: int) -> np.ndarray:
    """How often each token id occurs in the texts: int64 [size]."""
    counts, texts = np.zeros(size, np.int64), iter(texts)
    while batch := list(islice(texts, 256)):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        counts += np.bincount([i for encoding in encodings for i in encoding.ids], minlength=size)
    return counts


def _closed(required: set[int], candidates: set[int], usefulness: np.ndarray, parts: dict, size: int) -> set[int]:
    """``size`` tokens with all their parts, the most useful first, ties by id."""
    kept = set(required)

    def lacking(token: int) -> set[int]:
        return set() if token in kept else {token}.union(*map(lacking, parts.get(token, ())))

    for token in sorted(candidates, key=lambda i: (-usefulness[i], i)):
        new = lacking(token)
        if len(kept) + len(new) <= size:
            kept |= new
    return kept


def _rebuild(tokenizer: PreTrainedTokenizerBase, state: dict, tokens: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer restricted to ``tokens``, token ``i`` with id ``i``."""
    ids = {text: i for i, text in enumerate(tokens)}
    model = state["model"]
    model["vocab"] = ids
    model["merges"] = [[left, right] for left, right in model["merges"] if {left, right, left + right} <= ids.keys()]
    state["added_tokens"] = [
        added | {"id": ids[added["content"]]} for added in state["added_tokens"] if added["content"] in ids
    ]
    state["padding"] = state["truncation"] = None
    _renumber(state["post_processor"], ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )


def _renumber(processor: dict | None, ids: dict[str, int]) -> None:
    """Give the special tokens that a post-processor inserts their new ids."""
    if processor is None or processor["type"] == "ByteLevel":
        return
    if processor["type"] == "Sequence":
        for step in processor["processors"]:
            _renumber(step, ids)
    elif processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [ids[text] for text in special["tokens"]]
    else:
        raise KdlibError(
            "The post-processor must be TemplateProcessing or ByteLevel, as in causal models, got "
            f"{processor['type']}. Choose another teacher, or remove it."
        )


def train(texts: Iterable[str], size: int, chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained from scratch, digits split one by one; the same texts give the same tokenizer.

    Special tokens: ``<|endoftext|>`` (bos, eos, pad), ``<|im_start|>``, ``<|im_end|>``; ids 0 to 2.

    Raises:
        KdlibError: ``size`` is below the bytes and special tokens, or above what the texts yield.
    """
    specials = [SEPARATOR, "<|im_start|>", "<|im_end|>"]
    least = len(BYTES) + len(specials)
    if size < least:
        raise KdlibError(
            f"`size` must be at least {least}: {len(BYTES)} bytes and {len(specials)} special tokens, got {size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=sorted(BYTES), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < size:
        raise KdlibError(
            f"`size` must be at most the {tokenizer.get_vocab_size()} tokens that the texts yield, got {size}. Add text or lower it."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        chat_template=chat_template,
    )


def slice_model(model, kept: np.ndarray):
    """Keep rows ``kept`` of a causal model's input embedding and output head (weight and bias), in place.

    Its logits become the old ones at the kept columns. Tied weights stay tied, untied ones apart; vocabulary size and
    special ids in ``config`` and ``generation_config`` follow.

    Args:
        model: any transformers causal language model with an input embedding and a linear output head.
        kept: int64 [tokens], distinct old ids.

    Raises:
        KdlibError: an id beyond the embedding.
    """
    import torch

    rows = torch.as_tensor(np.asarray(kept), dtype=torch.int64)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if rows.max() >= len(embedding.weight):
        raise KdlibError(
            f"`kept` must be below the embedding's {len(embedding.weight)} rows, got {int(rows.max())}. Slice a model with the ids of "
            "its own tokenizer."
        )

    def sliced(parameter):
        return torch.nn.Parameter(parameter.detach()[rows.to(parameter.device)], requires_grad=parameter.requires_grad)

    tied = head.weight is embedding.weight
    embedding.weight = sliced(embedding.weight)
    # Slicing a tied head by itself would leave two matrices that drift apart in training.
    head.weight = embedding.weight if tied else sliced(head.weight)
    if head.bias is not None:
        head.bias = sliced(head.bias)
    embedding.num_embeddings = head.out_features = len(rows)
    model.config.get_text_config().vocab_size = model.vocab_size = len(rows)

    new = {int(old): i for i, old in enumerate(rows)}
    if embedding.padding_idx is not None:
        embedding.padding_idx = new.get(embedding.padding_idx)
    for config in (model.config, model.generation_config):
        for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            if isinstance(old := getattr(config, role, None), list):
                setattr(config, role, [new[i] for i in old if i in new] or None)
            elif old is not None:
                setattr(config, role, new.get(old))
    return model


def _content(tokenizer: PreTrainedTokenizerBase) -> dict:
    """What decides how the tokenizer turns text into ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        "size": len(tokenizer),
        "tokens": [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])],
        "ids": sorted(tokenizer.get_vocab().values()),
        "merges": state["model"].get("merges"),
        "special tokens": tokenizer.special_tokens_map,
        "added tokens": sorted(token["content"] for token in state["added_tokens"]),
        "normaliser": state["normalizer"],
        "pre-tokenizer": state["pre_tokenizer"],
    }


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, as hex, of vocabulary, merges, special tokens, normaliser and pre-tokenizer."""
    return hashlib.sha256(json.dumps(_content(tokenizer), sort_keys=True).encode()).hexdigest()


def require_same(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Check that two tokenizers encode alike, so that token ids of one mean the same in the other.

    Raises:
        KdlibError: they differ; names the first difference of each kind.
    """
    differences = []
    for name, left, right in ((name, left, _content(b)[name]) for name, left in _content(a).items()):
        if left == right:
            continue
        if isinstance(left, list) and isinstance(right, list):
            at, left, right = next((i, x, y) for i, (x, y) in enumerate(zip_longest(left, right)) if x != y)
            name = f"{name} at {at}"
        differences.append(f"{name}: {left!r} against {right!r}")
    if differences:
        raise KdlibError(
            f"Teacher, students and targets must share a tokenizer, got two that differ in {'; '.join(differences)}. Make them from "
            "the same corpus."
        )
