"""What can be asked for: parameters with their allowed values, and the runs that a profile plans."""

import textwrap
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdlib.errors import KdlibError
from kdlib.study import profiles


def parameters(notebook: str | None, profile: str = "smoke") -> str:
    """A notebook's parameters (None: every notebook's) with the profile's values, what is allowed, and what each means.

    Raises:
        KdlibError: no such notebook.
    """
    known = profiles.notebooks()
    name = None if notebook is None else notebook.removesuffix(".ipynb").rpartition("/")[2]
    if name is not None and name not in known:
        raise KdlibError(f"notebook must be one of {', '.join(known)}, got {notebook!r}.")
    return "\n\n".join(_notebook(one, profile) for one in known if name in (None, one))


def _notebook(notebook: str, profile: str) -> str:
    model, _ = profiles.notebooks()[notebook]
    defaults = profiles.parameters(notebook, profile).model_dump()
    lines = [notebook]
    for name, entry in model.model_fields.items():
        lines.append(f"  {name} = {defaults[name]!r}   [{allowed(entry)}]")
        lines += textwrap.wrap(entry.description or "", 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def allowed(entry: FieldInfo) -> str:
    """The values a parameter may have, in words: its choices, or its type and range."""
    return _words(entry.annotation) + _limits(entry.metadata)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if hasattr(kind, "__metadata__"):
        return _words(get_args(kind)[0]) + _limits(kind.__metadata__)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("none" if one is NoneType else _words(one) for one in get_args(kind))
    if get_origin(kind) in (list, dict):
        inner = [_words(one) for one in get_args(kind)]
        return f"list of {inner[0]}" if get_origin(kind) is list else f"mapping of {inner[0]} to {inner[1]}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "{" + ", ".join(kind.model_fields) + "}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", Any: "anything"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _limits(metadata: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    # Of a type inside another one, the limits are still in the Field that set them.
    plain = [limit for one in metadata for limit in (one.metadata if isinstance(one, FieldInfo) else [one])]
    found = [f"{sign} {getattr(one, name):g}" for one in plain for name, sign in signs.items() if getattr(one, name, None) is not None]
    return f" {' and '.join(found)}" if found else ""


def runs(profile: str) -> str:
    """The runs that a profile plans with all of its grids: id, whether it is there, label."""
    from kdlib.study import design, store

    planned = design.study(profile, tuple(profiles.load(profile).study.grids))
    width = max(len(one.id) for one in planned)
    return "\n".join(f"{one.id:{width}}  {'made' if store.find(profile, one.id) else '-   '}  {one.label}" for one in planned)
