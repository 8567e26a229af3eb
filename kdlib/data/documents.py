"""From sources to documents: cut, assigned to splits, and free of duplicates across splits.

A *source* (a speech, an article, a chat, a recipe, a chapter, a section of a file of your own) is the unit that is held out
and resampled (:mod:`kdlib.data.splits` says where it goes); it is cut into *documents* small enough to train on. A document's
id is ``<domain>/<name>#<nn>``, its source's the part before ``#``.
"""

import hashlib
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.data import sources, splits
from kdlib.data.readers import READERS, Messages, cut
from kdlib.data.splits import MIN_CHARACTERS, SALT, SHARES, SPLITS, fraction
from kdlib.errors import KdlibError

# Held-out splits in the order in which they keep a text that two of them hold.
HELD_OUT = ("test", "ood", "calibration", "validation")
MAX_CHARACTERS = 4000
SHINGLE_WORDS = 8
NEAR_DUPLICATE = 0.5
CONTAINED = 0.8

# ChatML, for tokenizers that bring no chat template of their own.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_documents(
    domains: Sequence[str],
    ood: str,
    tokenizer=None,
    *,
    catalogue: Mapping[str, sources.Source] | None = None,
    max_characters: int = MAX_CHARACTERS,
    salt: str = SALT,
    cache: Path | None = None,
) -> tuple[pd.DataFrame, dict]:
    """All documents of ``domains`` and of the out-of-domain set, split and free of duplicates.

    Args:
        domains: names of text sources of the catalogue; each must fill train, validation, calibration and test.
        ood: the text source that goes wholly to the split ``ood``.
        tokenizer: its chat template renders chats (:data:`CHATML` where it has none).
        catalogue: named sources; by default ``profiles/sources.yaml``.
        max_characters: longest document.
        salt: another salt makes other splits.
        cache: folder of downloads.

    Returns:
        A table [document, source, domain, split, text, bytes] in the order of the documents' hashes, so that any
        beginning of it is a random sample; and a report of licences and of what was left out, for the data card.

    Raises:
        KdlibError: unknown domain, a source that is not available, text that is not UTF-8, or a split left empty.
    """
    catalogue = sources.catalogue() if catalogue is None else catalogue
    chosen = {name: _text_source(name, catalogue) for name in [*domains, ood]}
    if ood in domains:
        raise KdlibError(
            f"`ood` must not be one of `domains`, got {ood!r} in {', '.join(domains)}. Remove it from one of them."
        )
    paths = {name: sources.fetch(source, cache) for name, source in chosen.items()}
    rows, short, long, division = [], Counter(), Counter(), {}
    for domain, source in chosen.items():
        if source.opt_in:
            warnings.warn(f"The terms of {domain!r} are restrictive: {source.licence}.", stacklevel=2)
        parts, division[domain] = _divided(domain, source, paths[domain], domain == ood, salt)
        for identity, split, content in parts:
            pieces = (
                cut(content, max_characters) if isinstance(content, str) else _chats(content, tokenizer, max_characters)
            )
            for number, text in enumerate(pieces):
                short[domain] += len(text) < MIN_CHARACTERS
                long[domain] += len(text) > max_characters
                if MIN_CHARACTERS <= len(text) <= max_characters:
                    rows.append((f"{identity}#{number:02d}", identity, domain, split, text, len(text.encode())))
    table = pd.DataFrame(rows, columns=["document", "source", "domain", "split", "text", "bytes"])
    _check_splits(table, domains, ood)
    table = table.iloc[np.argsort([fraction(f"{salt}/{document}") for document in table.document])].reset_index(
        drop=True
    )
    table, duplicates = without_duplicates(table)
    _check_splits(table, domains, ood)
    report = {
        "domains": {
            name: {
                "licence": source.licence,
                "content": sources.identity(source),
                "out_of_domain": name == ood,
                "too_short": short[name],
                "too_long": long[name],
                **duplicates[name],
                "division": division[name] | {"got": _shares(table[table.domain == name])},
            }
            for name, source in chosen.items()
        },
        "max_characters": max_characters,
        "salt": salt,
        "note": "The unit that is held out is the source. A chapter of a book is one, so for books the test measures new "
        "chapters of known books. Of your own files a section may be one, so the test measures new passages of known files.",
    }
    return table, report


def _divided(domain: str, source: sources.Source, path: Path, ood: bool, salt: str) -> tuple[list[splits.Part], dict]:
    """The domain's texts under their full names, divided into sources of one split each."""
    found = [(name, text) for name, text in READERS[source.reader](path, source)]
    texts = {}
    for name, content in found:
        # '#' separates a source from the number of its document.
        identity = f"{domain}/{_plain(name).replace('#', '＃')}"
        if identity in texts:
            raise KdlibError(
                f"Names of texts of {domain!r} must be unique, since splits depend on them, got {name!r} twice. Rename one."
            )
        texts[identity] = _plain(content) if isinstance(content, str) else content
    own = source.reader == "text"
    says = splits.named([name for name, _ in found], getattr(source, "splits", None)) if own and not ood else {}
    says = {identity: says[name] for identity, (name, _) in zip(texts, found, strict=True)} if says else None
    return splits.divide(domain, texts, own=own, ood=ood, says=says, salt=salt)


def _shares(table: pd.DataFrame) -> dict[str, float]:
    """Each split's share of a domain's bytes, before budgets choose among them."""
    found = table.groupby("split").bytes.sum() / table.bytes.sum()
    return {split: round(float(found[split]), 4) for split in SPLITS if split in found}


def _text_source(name: str, catalogue: Mapping[str, sources.Source]) -> sources.Source:
    readable = [known for known, source in catalogue.items() if source.reader]
    if name not in readable:
        raise KdlibError(
            f"A domain must be one of {', '.join(readable)}, got {name!r}. Add your own under `sources` of your profile, or in "
            "profiles/sources.yaml."
        )
    if catalogue[name].reader not in READERS:
        raise KdlibError(
            f"`reader` of source {name!r} must be one of {', '.join(READERS)}, got {catalogue[name].reader!r}."
        )
    return catalogue[name]


def _check_splits(table: pd.DataFrame, domains: Sequence[str], ood: str) -> None:
    wanted = [(domain, split) for domain in domains for split in SHARES] + [(ood, "ood")]
    held = set(zip(table.domain, table.split, strict=True))
    for domain, split in wanted:
        if (domain, split) not in held:
            count = table.source[table.domain == domain].nunique()
            raise KdlibError(
                f"Every split must have text of domain {domain!r}, got none for {split!r} from {count} sources without short and "
                "repeated texts. Add sources or other text."
            )


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip()


def _chats(messages: Messages, tokenizer, limit: int) -> Iterator[str]:
    """A chat rendered with the chat template; too long a one is halved before a user's turn, as often as needed."""
    messages = [{**message, "content": _plain(message["content"])} for message in messages]
    head = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    text = _render(head, turns, tokenizer)
    starts = [number for number, turn in enumerate(turns) if turn["role"] == "user" and number > 0]
    if len(text) <= limit or not starts:
        yield text
        return
    spoken = np.cumsum([len(turn["content"]) for turn in turns])
    middle = min(starts, key=lambda start: abs(spoken[start - 1] - spoken[-1] / 2))
    yield from _chats(head + turns[:middle], tokenizer, limit)
    yield from _chats(head + turns[middle:], tokenizer, limit)


def _render(head: Messages, turns: Messages, tokenizer) -> str:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def apply(messages: Messages) -> str:
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(messages, tokenize=False)
        return render_jinja_template(conversations=[messages], chat_template=CHATML)[0][0]

    try:
        return apply(head + turns).strip()
    except TemplateError:
        if not head:
            raise
        return apply(turns).strip()  # some templates refuse a system message


def without_duplicates(documents: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, dict[str, int]]]]:
    """``documents`` without repeated texts within a split and without near-duplicates across splits.

    A document is a near-duplicate if at least half of its shingles (runs of :data:`SHINGLE_WORDS` words in lower case)
    occur in splits before it in the order test, ood, calibration, validation, train; or if at least :data:`CONTAINED`
    of them occur in a split after it, as those of a text that stands whole inside a longer one do.
    Containment of exact shingle sets, computed in full rather than estimated by minhash (Broder 1997; Lee et al. 2022).
    Digits count: with digits folded, tables that share nothing but their form (one country's figures and another's)
    would be taken for copies.

    Returns:
        The documents kept, and how many were removed: ``{domain: {"duplicates": {split: number}, "near_duplicates":
        {split: number}}}``.
    """
    repeated = documents.duplicated(["split", "text"])
    kept = documents[~repeated]
    shingles, owner = _shingles(kept.text)
    near, before = np.zeros((2, len(kept)), dtype=bool)
    size = np.maximum(np.bincount(owner, minlength=len(kept)), 1)
    earlier: list[np.ndarray] = []
    for split in (*HELD_OUT, "train"):
        inside = (kept.split == split).to_numpy()
        found = inside[owner]
        found[found] = _occur(shingles[found], earlier)
        near |= inside & (np.bincount(owner[found], minlength=len(kept)) >= NEAR_DUPLICATE * size)
        # What is left of this split can still hold a whole document of a split before it.
        held = before[owner]
        held[held] = _occur(shingles[held], [shingles[found & ~near[owner]]])
        near |= before & (np.bincount(owner[held], minlength=len(kept)) >= CONTAINED * size)
        before |= inside
        earlier.append(shingles[(inside & ~near)[owner]])
    removed = {"duplicates": documents[repeated], "near_duplicates": kept[near]}
    counts = {
        domain: {
            kind: {split: int(((gone.domain == domain) & (gone.split == split)).sum()) for split in SPLITS}
            for kind, gone in removed.items()
        }
        for domain in documents.domain.unique()
    }
    return kept[~near].reset_index(drop=True), counts


def _occur(shingles: np.ndarray, earlier: list[np.ndarray]) -> np.ndarray:
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *earlier]))
    # A table of the leading bits rules out nearly all of them before the exact look-up, whose sorting is slow.
    table = np.zeros(1 << 24, dtype=bool)
    table[known >> np.uint64(40)] = True
    found = table[shingles >> np.uint64(40)]
    found[found] = np.isin(shingles[found], known)
    return found


class _WordHashes(dict):
    # 64 bits of BLAKE2b a word, computed once; Python's own hash differs from process to process.
    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
        self[word] = value
        return value


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint64) of all runs of words in ``texts`` and the number of the text each stands in."""
    word, table = re.compile(r"\w+"), _WordHashes()
    hashes = [np.fromiter(map(table.__getitem__, word.findall(text.lower())), np.uint64) for text in texts]
    # A text shorter than a shingle counts as one, filled up with zeros.
    hashes = [np.pad(one, (0, max(0, SHINGLE_WORDS - len(one)))) for one in hashes]
    lengths = np.array([len(one) for one in hashes], dtype=np.int64)
    flat = np.concatenate(hashes)
    rolled = np.zeros(len(flat) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + flat[place : place + len(rolled)]
    owner = np.repeat(np.arange(len(hashes)), lengths)
    within = owner[: len(rolled)] == owner[SHINGLE_WORDS - 1 :]
    return rolled[within], owner[: len(rolled)][within]
