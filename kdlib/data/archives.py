"""Read files of a wheel, zip or folder as data: no path may lead outside it, and nothing is executed."""

import fnmatch
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from kdlib.errors import KdlibError


def utf8_name(path: Path) -> str:
    """The name of a file as UTF-8, whatever the locale reads in it: splits are chosen by names."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def read_members(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a wheel, zip or folder that matches a pattern, sorted by name; or of a single
    file.

    Raises:
        KdlibError: nothing matches, the archive is damaged, or a name or link could lead out of it.
    """
    path = Path(path)
    if path.is_dir():
        for name in folder_members(path, patterns):
            yield utf8_name(Path(name)), (path / name).read_bytes()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in _archive_members(archive, patterns):
                try:
                    yield member.filename, archive.read(member)
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise KdlibError(
                        f"{path} must be undamaged, got {error} at {member.filename}. Delete it and fetch it again."
                    ) from error
    else:
        yield utf8_name(Path(path.name)), path.read_bytes()


def extract(path: Path, patterns: Sequence[str], folder: Path) -> list[Path]:
    """Extract the matching members of a wheel or zip into ``folder`` and return their paths, sorted by member name.

    Each file appears whole (written aside and renamed) and keeps its executable bit; files already there with the same
    size and CRC stay as they are.

    Raises:
        KdlibError: as for :func:`read_members`.
    """
    extracted = []
    with zipfile.ZipFile(path) as archive:
        for member in _archive_members(archive, patterns):
            target = Path(folder) / member.filename
            if not _is_extracted(target, member):
                target.parent.mkdir(parents=True, exist_ok=True)
                with (
                    archive.open(member) as packed,
                    tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as stream,
                ):
                    shutil.copyfileobj(packed, stream, 1 << 20)
                os.chmod(stream.name, 0o755 if member.external_attr >> 16 & 0o111 else 0o644)
                os.replace(stream.name, target)
            extracted.append(target)
    return extracted


def _is_extracted(target: Path, member: zipfile.ZipInfo) -> bool:
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    crc = 0
    with open(target, "rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc == member.CRC


def _matching(names: dict[str, object], patterns: Sequence[str], where: object) -> list[str]:
    found = sorted(
        name for name in names if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )
    if not found:
        raise KdlibError(
            f"A file in {where} must match {', '.join(patterns) or 'anything'}, "
            f"got {', '.join(sorted(names)[:5]) or 'none'}"
            f"{' …' if len(names) > 5 else ''}. Correct 'members' of the source."
        )
    return found


def _archive_members(archive: zipfile.ZipFile, patterns: Sequence[str]) -> list[zipfile.ZipInfo]:
    members = {member.filename: member for member in archive.infolist() if not member.is_dir()}
    for name, member in members.items():
        if name.startswith("/") or "\\" in name or ":" in name.split("/")[0] or ".." in PurePosixPath(name).parts:
            raise KdlibError(
                f"Names in {archive.filename} must not lead outside the archive, got {name!r}. Nothing was read; do not use it."
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise KdlibError(
                f"{archive.filename} must have plain files only, got the link {name!r}. Nothing was read; do not use it."
            )
    return [members[name] for name in _matching(members, patterns, archive.filename)]


def folder_members(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Names of the files in a folder that match a pattern, sorted.

    Raises:
        KdlibError: none matches, or one is a link that is not the hub client's own.
    """
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    found = _matching(files, patterns, folder)
    for name in found:
        if files[name].is_symlink() and not _in_hub_cache(files[name], folder):
            raise KdlibError(
                f"Files in {folder} must be plain, got the link {files[name]}. Replace it by a copy of the file."
            )
    return found


def _in_hub_cache(file: Path, folder: Path) -> bool:
    # A snapshot of the hub's client holds links to contents in blobs/, beside it or shared by the whole cache.
    folder = folder.resolve()
    stores = [parent / "blobs" for parent in folder.parents[1:3]]
    return folder.parent.name == "snapshots" and any(file.resolve().is_relative_to(store) for store in stores)
