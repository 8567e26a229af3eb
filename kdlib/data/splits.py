"""Division of a domain's text into training and held-out splits.

The rules, in the order in which they apply:

1. *Files that name their split* keep it: text of your own (reader ``text``) where ``splits`` of the source says so or, without
   that, where a part of every file's name does (``train.txt``, ``bnc.dev``, ``test/a.txt``) and one of them names train.
2. *By the hash of its name* each source goes to a split that no profile, budget or further source moves. This is how the
   carriers of ``profiles/sources.yaml`` and hub data sets are split. Text of your own is where that gives every held-out
   split :data:`ENOUGH` sources: whole files, and sections of long ones.
3. *Sections* are what is left, where sources are few: every text is cut into contiguous sections, the longest of
   :data:`LENGTHS` that give every held-out split :data:`ENOUGH` of them. In the order of the hashes of their names they go to
   the held-out splits until each comes nearest to its share, no two of them side by side; the rest is trained on. A split
   that no file names takes its sections from the files of validation, else of train.

Wherever sections of two splits would be neighbours, the held-out one loses its edge, a *guard* that no split gets.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import groupby
from typing import NamedTuple

import numpy as np

from kdlib.data.readers import Messages, spans
from kdlib.errors import KdlibError

SHARES = {"train": 0.86, "validation": 0.03, "calibration": 0.03, "test": 0.08}
SPLITS = (*SHARES, "ood")
SALT = "kdlib"
# Fewer sources than this resample badly; below two there is nothing to resample.
ENOUGH, LEAST = 20, 2
MIN_CHARACTERS = 200
# Sections have at least so many characters and less than twice as many, the first that give enough sections.
LENGTHS = (16_000, 8_000, 4_000, 2_000, 1_000)
LONGEST_GUARD = 1_000
BY_HASH = "hash of the name"
# What is trained on between two held-out sections is one source, or several of at most this length.
TRAIN_CHARACTERS = 20_000
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "calibration": ("calibration",),
    "test": ("test",),
}


class Part(NamedTuple):
    """A source: its name, the split it is in, and its text or chat."""

    source: str
    split: str
    content: str | Messages


class _Section(NamedTuple):
    # Characters start to end of a text; a guard on either side would leave those from inner_start to inner_end.
    text: str
    name: str
    start: int
    end: int
    inner_start: int
    inner_end: int
    whole: bool

    @property
    def size(self) -> int:
        return self.inner_end - self.inner_start


def fraction(text: str) -> float:
    """A number in [0, 1) that looks random and is the same for the same text everywhere: its SHA-256."""
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64


def split_of(source: str, salt: str = SALT) -> str:
    """The split of a source that is not out of domain, by the hash of its name: no profile or budget moves it."""
    position = fraction(f"{salt}/{source}")
    for split, share in SHARES.items():
        if position < share:
            return split
        position -= share
    return "test"  # rounding of the shares' sum


def named(names: Sequence[str], patterns: Mapping[str, str] | None) -> dict[str, str]:
    """The split that each of a source's texts is said to be in, by its name; empty where none is said.

    Args:
        names: of the texts, as the reader gives them; a record's is ``<file>/<number>``.
        patterns: glob of the files of each split, from ``splits`` of the source; an empty one turns names off. By default
            a part of a name between dots and slashes is looked for, and counts if files of train and of another have it.

    Raises:
        KdlibError: a file that names no split or two, or no file of train, where others name theirs.
    """
    files = {name: re.sub(r"(\.jsonl)/\d+$", r"\1", name) for name in names}
    if patterns is not None:
        found = {
            file: [split for split, glob in patterns.items() if fnmatchcase(file, glob)] for file in set(files.values())
        }
    else:
        parts = {file: set(re.split(r"[./]", file.lower())) for file in set(files.values())}
        found = {file: [split for split in _WORDS if parts[file].intersection(_WORDS[split])] for file in parts}
    says = {split for splits in found.values() for split in splits}
    if patterns == {} or (patterns is None and not ("train" in says and len(says) > 1)):
        return {}
    if "train" not in says:
        raise KdlibError(
            f"`splits` must name files of train, got none for {patterns.get('train')!r} among {_some(found)}. Correct the pattern."
        )
    for file, splits in sorted(found.items()):
        if len(splits) != 1:
            raise KdlibError(
                f"Every file must name one split where others do, got {' and '.join(splits) or 'none'} for {file!r}. Rename "
                "it, or set `splits` of the source ({} ignores names)."
            )
    return {name: found[file][0] for name, file in files.items()}


def _some(names) -> str:
    return ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")


def divide(
    domain: str,
    texts: Mapping[str, str | Messages],
    *,
    own: bool = False,
    ood: bool = False,
    says: Mapping[str, str] | None = None,
    salt: str = SALT,
) -> tuple[list[Part], dict]:
    """The sources of a domain with their splits, by the rule above.

    Args:
        domain: its name, for errors.
        texts: what the reader found, by the full name (``<domain>/<name>``); only texts are cut, chats are not.
        own: text of your own, which is held to :data:`ENOUGH` sources a split.
        ood: everything goes to the split ``ood``, in sections if ``own``.
        says: the split that a text's file names, for all texts or none.
        salt: another salt makes other splits.

    Returns:
        The parts, and for the data card: the ``rule``; shares ``wanted`` (None where files say their split);
        ``section_characters``, the least length of a section (None where no text was cut); ``guard_characters``, left out
        between splits; and ``least_sources``, those that a held-out split takes even beyond its budget.

    Raises:
        KdlibError: too little text for two sections in each split.
    """
    if not own:
        whole = [Part(name, "ood" if ood else split_of(name, salt), content) for name, content in texts.items()]
        if ood or SHARES.keys() <= {part.split for part in whole}:
            return whole, _division("out of domain" if ood else BY_HASH, wanted=None if ood else SHARES)
    says = dict.fromkeys(texts, "ood") if ood else dict(says or dict.fromkeys(texts, "train"))
    for length in LENGTHS:
        sections = [section for name, content in texts.items() for section in _sections(name, content, length)]
        rule, splits = BY_HASH, {section.name: split_of(section.name, salt) for section in sections}
        if set(says.values()) != {"train"} or not own or length != LENGTHS[0] or _fewest(sections, splits) < ENOUGH:
            rule, splits = _by_share(sections, says, salt)
        if _fewest(sections, splits) >= ENOUGH:
            break
    _require_enough(domain, texts, says, sections, splits)
    parts, dropped = _parts(texts, sections, splits)
    cut = any(not section.whole for section in sections)
    wanted = SHARES if set(says.values()) == {"train"} else None
    return parts, _division(rule, wanted, length if cut else None, dropped, ENOUGH)


def _division(
    rule: str, wanted: Mapping[str, float] | None, section: int | None = None, guard: int = 0, least_sources: int = 0
) -> dict:
    return {
        "rule": rule,
        "wanted": wanted and dict(wanted),
        "section_characters": section,
        "guard_characters": guard,
        "least_sources": least_sources,
    }


def _length(content: str | Messages) -> int:
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


def _sections(name: str, content: str | Messages, length: int) -> list[_Section]:
    """A text in as many sections of about one size as have ``length`` characters each."""
    total = _length(content)
    count = total // length if isinstance(content, str) else 1
    if count < 2:
        return [_Section(name, name, 0, total, 0, total, whole=True)]
    starts = np.array([start for start, _ in spans(content, length // 8)] + [total])
    edges = [0, *starts[np.searchsorted(starts, np.arange(1, count) * total / count)].tolist(), total]
    guard = min(length // 6, LONGEST_GUARD)
    found = []
    for start, end in zip(edges, edges[1:], strict=False):
        inner_start = 0 if start == 0 else int(starts[np.searchsorted(starts, start + guard)])
        inner_end = end if end == total else int(starts[np.searchsorted(starts, end - guard, side="right") - 1])
        found.append(_Section(name, f"{name}/{start:09d}", start, end, inner_start, inner_end, whole=False))
    return found


def _fewest(sections: Sequence[_Section], splits: Mapping[str, str]) -> int:
    """Sections of the held-out split that has fewest."""
    counts = Counter(splits[section.name] for section in sections if section.size >= MIN_CHARACTERS)
    held_out = ["ood"] if set(splits.values()) == {"ood"} else [split for split in SHARES if split != "train"]
    return min(counts[split] for split in held_out)


def _by_share(sections: Sequence[_Section], says: Mapping[str, str], salt: str) -> tuple[str, dict[str, str]]:
    """The rule that applies, and the split of each section: what its file says, and a share of it for splits without files."""
    splits = {section.name: says[section.text] for section in sections}
    present = set(says.values())
    if present == {"ood"}:
        return "out of domain", splits
    missing = [split for split in SHARES if split not in present]
    pool = "validation" if "validation" in present else "train"
    shared = [section for section in sections if says[section.text] == pool]
    scale = _kept(shared, pool, missing) / sum(SHARES[split] for split in (pool, *missing))
    place = {section.name: number for number, section in enumerate(shared)}
    got, count = Counter(), Counter()
    for section in sorted(shared, key=lambda section: fraction(f"{salt}/{section.name}")):
        # Taken only if that brings the split nearer to its share, or if it would else have too few to be resampled.
        lacking = [
            split for split in missing if got[split] + section.size / 2 < SHARES[split] * scale or count[split] < LEAST
        ]
        around = [shared[at] for at in (place[section.name] - 1, place[section.name] + 1) if 0 <= at < len(shared)]
        apart = pool != "train" or all(other.text != section.text or splits[other.name] == "train" for other in around)
        if lacking and apart and section.size >= MIN_CHARACTERS:
            split = min(lacking, key=lambda split: (got[split] / SHARES[split], SHARES[split]))
            splits[section.name] = split
            got[split] += section.size
            count[split] += 1
    return "sections" if present == {"train"} else "named by the files", splits


def _kept(shared: Sequence[_Section], pool: str, missing: Sequence[str]) -> float:
    """Characters of the pool that will be left once held-out sections have lost their edges."""
    whole = sum(section.end - section.start for section in shared)
    inner = sum(section.size for section in shared)
    held_out = 1 if pool != "train" else 1 - SHARES[pool] / sum(SHARES[split] for split in (pool, *missing))
    # Left = whole - held_out · left · (whole / inner - 1): what is held out loses that much for each character it keeps.
    return whole / (1 + held_out * (whole / inner - 1)) if inner else 0


def _require_enough(
    domain: str, texts: Mapping, says: Mapping[str, str], sections: Sequence[_Section], splits: Mapping[str, str]
) -> None:
    present = set(says.values())
    if _fewest(sections, splits) >= LEAST and (present != {"train"} or len(sections) >= ENOUGH):
        return
    characters = sum(map(_length, texts.values()))
    if present in ({"train"}, {"ood"}):
        least = ENOUGH if present == {"train"} else LEAST
        raise KdlibError(
            f"Domain {domain!r} must have at least {least * LENGTHS[-1]:,} characters, or {least} texts of {MIN_CHARACTERS}, for all "
            f"splits, got {characters:,} characters in {len(texts)} texts. Add text."
        )
    counts = Counter(splits[section.name] for section in sections if section.size >= MIN_CHARACTERS)
    short = [split for split in SHARES if split != "train" and counts[split] < LEAST]
    raise KdlibError(
        f"The files of domain {domain!r} must give {', '.join(short)} at least {LEAST} sections of {LENGTHS[-1]:,} characters, got "
        f"{', '.join(str(counts[split]) for split in short)}. Give more text for {'validation' if 'validation' in present else 'these'}."
    )


def _parts(
    texts: Mapping[str, str | Messages], sections: Sequence[_Section], splits: Mapping[str, str]
) -> tuple[list[Part], int]:
    """Sections as sources: trimmed where they are held out, those trained on joined where they follow each other."""
    parts, dropped = [], 0
    for (name, split), found in groupby(sections, key=lambda section: (section.text, splits[section.name])):
        run, content = list(found), texts[name]
        if run[0].whole:
            parts.append(Part(name, split, content))
        elif split == "train":
            stretch = content[run[0].start : run[-1].end]
            for start, end in spans(stretch, TRAIN_CHARACTERS):
                parts.append(Part(f"{name}/{run[0].start + start:09d}", split, stretch[start:end]))
        else:
            edges = [(section.start, section.end) for section in run]
            edges[0] = (run[0].inner_start, edges[0][1])
            edges[-1] = (edges[-1][0], run[-1].inner_end)
            dropped += run[-1].end - run[0].start - (edges[-1][1] - edges[0][0])
            parts += [
                Part(section.name, split, content[start:end]) for section, (start, end) in zip(run, edges, strict=True)
            ]
    return parts, dropped
