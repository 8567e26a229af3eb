"""Readers of text: from the files of a source to named texts or chats, one small function per format.

A reader takes the source's local copy and its entry of the catalogue, and yields ``(name, text)`` or, for a chat,
``(name, messages)`` with messages as chat templates take them: ``[{"role": "user", "content": "…"}, …]``. A name is
unique within its source and stable: splits and document ids are made from it.
"""

import csv
import html
import io
import json
import re
import zipfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from kdlib.data.archives import read_members
from kdlib.data.sources import Source
from kdlib.errors import KdlibError

Messages = list[dict[str, str]]
Named = Iterator[tuple[str, str | Messages]]

_CONTACT = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+|\(?\b\d{3}\)?[ .-]?\d{3}[ .-]?\d{4}\b")
_BOUNDARIES = tuple(re.compile(pattern) for pattern in (r"\n\n", r"\n", r"[.!?…][\"'”’)\]]*\s+", r"\s+"))


def cut(text: str, limit: int) -> Iterator[str]:
    """The pieces of :func:`spans`, without the space around them."""
    for start, end in spans(text, limit):
        yield text[start:end].strip()


def spans(text: str, limit: int) -> Iterator[tuple[int, int]]:
    """Start and end of pieces of at most ``limit`` characters, cut at a paragraph's end where one is in reach, else at
    the end of a line, a sentence or a word, else anywhere. The last two pieces share what is left, so that no short tail
    remains.
    """
    start = 0
    while (rest := len(text) - start) > limit:
        reach = min(limit, rest // 2 + limit // 4)
        for boundary in _BOUNDARIES:
            ends = [match.end() for match in boundary.finditer(text, start + reach // 4, start + reach)]
            if ends:
                break
        end = ends[-1] if ends else start + reach
        yield start, end
        start = end
    yield start, len(text)


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise KdlibError(
            f"{name} must be UTF-8 text, got {content[error.start]:#04x} at byte {error.start}. Convert it with `iconv -t UTF-8`, or "
            "leave it out of `members`."
        ) from error


def _members(path: Path, source: Source) -> Iterator[tuple[str, str]]:
    for name, content in read_members(path, source.members):
        yield name, _decode(name, content)


def _json(path: Path, source: Source) -> Iterator[tuple[str, dict]]:
    for name, content in _members(path, source):
        yield name, json.loads(content)


def _without_markup(text: str) -> str:
    """Plain text of a snippet of HTML or wiki markup; line and paragraph breaks stay."""
    text = re.sub(r"<ref[^>/]*>.*?</ref>|<ref[^>]*/>|\{\{.*?(\}\}|$)", "", text, flags=re.DOTALL)
    text = re.sub(r"</p>\s*<p>|<br\s*/?>", "\n", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)).replace("\N{NO-BREAK SPACE}", " ")
    text = re.sub(r"'{2,}|\[\[|\]\]", "", text)
    text = re.sub(r"\(\s*[;,]?\s*\)", "", text)  # what a template left when it was dropped
    text = re.sub(r"\(\s*[;,]\s*", "(", text)
    return re.sub(r"\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def dialogue(path: Path, source: Source) -> Named:
    """Chats of two people: who writes first is the user; the question they were given to talk about is the system
    message.

    E-mail addresses and telephone numbers are masked: they belong to real people.
    """
    for _, chats in _json(path, source):
        for name, chat in sorted(chats.items()):
            said = [
                (line["sender"], _CONTACT.sub("[contact]", " ".join(line["text"].split())))
                for turn in chat["messages"]
                for line in turn
            ]
            said = [(sender, text) for sender, text in said if text]
            if len({sender for sender, _ in said}) != 2:  # nobody answered
                continue
            messages = [{"role": "system", "content": chat["prompt"].strip()}] if chat.get("prompt") else []
            for sender, lines in groupby(said, key=lambda line: line[0]):
                role = "user" if sender == said[0][0] else "assistant"
                messages.append({"role": role, "content": "\n".join(text for _, text in lines)})
            yield name, messages


def encyclopaedia(path: Path, source: Source) -> Named:
    """Introductions of articles under their titles."""
    for _, articles in _json(path, source):
        for title, article in sorted(articles.items()):
            yield title, f"{article['title']}\n\n{_without_markup(article['extract'])}"


def fiction(path: Path, source: Source) -> Named:
    """Chapters or stories of books, each a source of its own: books are too few to give every split one."""
    for name, book in _members(path, source):
        title = PurePosixPath(name).stem
        for number, chapter in enumerate(_chapters(book.strip())):
            yield f"{title}/{number:03d}", _unwrapped(chapter)


def _chapters(book: str) -> list[str]:
    # A heading follows two blank lines or more; a wider gap before anything else separates scenes of one chapter.
    heading = r"(?:(?i:chapter|book|part) +\w+|[^a-z\n]*[A-Z][^a-z\n]*)"
    return re.split(rf"\n\n\n+(?={heading}\n\s*\n)", book)


def _unwrapped(text: str) -> str:
    """Paragraphs on one line each; indented ones (verse) as they are; rows of stars or dashes dropped."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").split("\n")
        verse = any(line.startswith(" ") for line in lines)
        joined = "\n".join(line.strip() for line in lines) if verse else " ".join(" ".join(lines).split())
        if re.search(r"\w", joined):
            paragraphs.append(joined)
    return "\n\n".join(paragraphs)


def speeches(path: Path, source: Source) -> Named:
    """One speech a file, without the editors' notes."""
    for name, text in _members(path, source):
        text = re.sub(
            r" *\[ *(?:see APP Note|(?:As )?delivered|Read before|Recorded on)[^\]]*\]", "", text, flags=re.IGNORECASE
        )
        yield PurePosixPath(name).stem, text


def recipes(path: Path, source: Source) -> Named:
    """Title, servings and time where known, ingredients, and numbered steps."""
    for _, book in _json(path, source):
        for name, recipe in sorted(book.items()):
            about = [
                f"{label}: {_listed(recipe[key])}"
                for key, label in (("servings", "Serves"), ("time", "Time"))
                if recipe[key]
            ]
            ingredients = [f"- {text}" for text in map(_listed, recipe["ingredients"]) if text]
            steps = [text for text in map(_listed, recipe["steps"]) if text]
            steps = [f"{number}. {text}" for number, text in enumerate(steps, 1)]
            parts = [[_listed(recipe["title"])], about, ["Ingredients:", *ingredients], ["Method:", *steps]]
            yield name.removeprefix("Cookbook:"), "\n\n".join("\n".join(part) for part in parts if part)


def _listed(item: str) -> str:
    return " ".join(re.sub(r"(?:^|(?<=\s))[#*]+[:;]?\s*", "", _without_markup(item)).split())


def country(path: Path, source: Source) -> Named:
    """A country's facts: name, then a heading for each chapter and a paragraph for each field."""
    for name, chapters in _json(path, source):
        names = chapters.get("Government", {}).get("Country name", {})
        short, long = (names.get(f"conventional {form} form", {}).get("text", "none") for form in ("short", "long"))
        title = next((found for found in (short, long) if found != "none"), None)
        parts = [_without_markup(title)] if title else []
        for chapter, fields in chapters.items():
            parts.append(chapter)
            parts += [_field(label, value) for label, value in fields.items()]
        yield "/".join(PurePosixPath(name).with_suffix("").parts[-2:]), "\n\n".join(part for part in parts if part)


def _field(label: str, value: dict) -> str:
    lines = []
    for key, item in value.items():
        text = _without_markup(item["text"] if isinstance(item, dict) else item)
        if isinstance(item, dict) and text:
            key = key.strip()
            lines.append(f"{key}: {text.removeprefix(key.split(': ')[-1] + ': ')}")  # some values repeat their label
            if item.get("note"):
                lines.append(_without_markup(item["note"]))
        elif text:
            lines.append(text)
    if not lines:
        return ""
    return f"{label}: {lines[0]}" if len(lines) == 1 else "\n".join([f"{label}:", *lines])


def news(path: Path, source: Source) -> Named:
    """Articles under their titles, without those whose quotation marks or letters were lost."""
    for _, content in read_members(path, source.members):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            table = _decode("NewsArticles.csv", archive.read("NewsArticles.csv"))
        for row in csv.DictReader(io.StringIO(table)):
            text = f"{row['title']}\n\n{_without_markup(row['text'])}"
            if row["text"].strip() and not re.search(r'"\?|\w\?\w|\ufffd', text):
                yield row["article_id"], text


def text(path: Path, source: Source) -> Named:
    """Your own files: ``.jsonl`` with text or messages in ``text_column``, all others as plain text."""
    for name, content in _members(path, source):
        if not content.strip():
            raise KdlibError(
                f"{name} in {path} must have text, got an empty file. Remove it, or leave it out of `members`."
            )
        if not name.endswith(".jsonl"):
            yield name, content
            continue
        # Not splitlines(): JSON lets a string hold U+2028 and other ends of lines as they are.
        for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
            try:
                record = json.loads(line)[source.text_column]
            except (ValueError, KeyError, TypeError) as error:
                raise KdlibError(
                    f"Line {number} of {name} in {path} must be a JSON object with a field {source.text_column!r}, got "
                    f"{type(error).__name__}: {error}. Correct the line, or `text_column` of the source."
                ) from error
            _check(record, f"Line {number} of {name} in {path}", source)
            if not record:
                raise KdlibError(
                    f"Line {number} of {name} in {path} must have text in {source.text_column!r}, got none. Remove the line."
                )
            yield f"{name}/{number:07d}", record


def hub(path: Path, source: Source) -> Named:
    """Rows of a downloaded hub data set, read from its snapshot through ``datasets`` without a second copy on disk."""
    from datasets import load_dataset

    for number, row in enumerate(load_dataset(str(path), name=source.config, split=source.split, streaming=True)):
        if source.text_column not in row:
            raise KdlibError(
                f"Data set {source.id} must have a column {source.text_column!r}, got {', '.join(row)}. Correct `text_column` of the "
                "source."
            )
        _check(row[source.text_column], f"Row {number} of data set {source.id}", source)
        yield f"{source.split}/{number:09d}", row[source.text_column]


def _check(record: object, where: str, source: Source) -> None:
    def is_message(item: object) -> bool:
        return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))

    wrong = [item for item in (record if isinstance(record, list) else [record]) if not is_message(item)]
    if wrong and not isinstance(record, str):
        raise KdlibError(
            f"{where} must have a text, or a list of messages "
            f'{{"role": "user", "content": "…"}}, both texts, in {source.text_column!r}, got {wrong[0]!r:.80}. Correct it, or `text_column`.'
        )


READERS = {
    reader.__name__: reader
    for reader in (dialogue, encyclopaedia, fiction, speeches, recipes, country, news, text, hub)
}
