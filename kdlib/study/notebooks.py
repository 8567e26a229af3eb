"""Notebook files as data: where they are, what their code is, which parameters they declare.

Only the sources of code cells count as a notebook's code: opening one in Jupyter rewrites metadata, ids and outputs of
the file, and none of that changes what it computes.
"""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from kdlib.errors import KdlibError
from kdlib.study.profiles import REPOSITORY
from kdlib.study.profiles import notebooks as known


def find(name: str | Path) -> Path:
    """The notebook file called ``name``: a path, or the name of one of the project's notebooks.

    Raises:
        KdlibError: no such file, or not a notebook of this project.
    """
    path = Path(name)
    if path.stem not in known():
        raise KdlibError(f"notebook must be one of {', '.join(f'notebooks/{one}.ipynb' for one in known())}, got {str(name)!r}.")
    for candidate in (path, REPOSITORY / "notebooks" / f"{path.stem}.ipynb"):
        if candidate.is_file():
            return candidate.resolve()
    raise KdlibError(f"Notebook {path.stem} was not found, neither as {path} nor in {REPOSITORY / 'notebooks'}.")


def cells(path: Path) -> list[dict[str, Any]]:
    """Cells of a notebook file, ``source`` as one string.

    Raises:
        KdlibError: the file cannot be read as a notebook.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KdlibError(
            f"{path} cannot be read as a notebook ({type(error).__name__}: {error}). Restore it with git."
        ) from error


def code_hash(path: Path) -> str:
    """SHA-256 of the sources of a notebook's code cells, in order."""
    sources = [cell["source"] for cell in cells(path) if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def declared(path: Path) -> dict[str, Any]:
    """Names and values in the notebook's ``parameters`` cell: one assignment of a literal a line.

    Raises:
        KdlibError: there is not exactly one such cell, or it holds anything else.
    """
    tagged = [cell for cell in cells(path) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise KdlibError(
            f"{path} has {len(tagged)} cells tagged 'parameters'; expected exactly one, which papermill fills."
        )
    values = {}
    for statement in ast.parse(tagged[0]["source"]).body:
        try:
            (target,) = statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            raise KdlibError(
                f"The parameters cell of {path} holds {ast.unparse(statement)!r}; "
                "expected only lines like 'name = literal'."
            ) from None
    return values
