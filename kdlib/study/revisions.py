"""Which version of the code made a run, as part of its run id.

Every module that shapes results has a *revision* in ``revisions.json`` beside the hash of its code (comments, docstrings and
blank lines left out). While the code has that hash, the revision stands for it in run ids. Code that was edited and not yet
declared stands for itself by its hash, so an edit always makes new runs. Whoever made the edit then declares what it was::

    python -m kdlib.study.revisions keep losses     # same results: old runs stay valid
    python -m kdlib.study.revisions bump losses     # other results: every run that used it is made anew
"""

import ast
import hashlib
import io
import json
import sys
import tokenize
from functools import cache
from pathlib import Path

from kdlib.errors import KdlibError

PACKAGE = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("revisions.json")
# Where each lies in the package; a folder stands for all of its modules.
MODULES = {
    "sources": "data/sources",
    "readers": "data/readers",
    "documents": "data/documents",
    "corpus": "data/corpus",
    "vocabulary": "data/vocabulary",
    "models": "models",
    "initialisation": "models/initialisation",
    "losses": "losses",
    "cache": "cache",
    "schedules": "study/schedules",
    "selection": "data/selection",
    "synthetic": "data/synthetic",
    "training": "training",
    "low_precision": "models/low_precision",
    "ensemble": "ensemble",
    "evaluation": "evaluation/metrics",
    "fidelity": "evaluation/fidelity",
    "producers": "runs/producers",
}


def code_hash(module: str) -> str:
    """SHA-256 of a module's (or package's) code without comments, docstrings and blank lines."""
    path = PACKAGE / MODULES.get(module, module)
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return hashlib.sha256("\f".join(_bare(file.read_text()) for file in files).encode()).hexdigest()


def _bare(source: str) -> str:
    # Text, not the syntax tree, is hashed: the tree's printed form differs between Python versions.
    drop, lines = set(), source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            docstring = node.body[0]
            # Not one that shares its line with code, as in: class Error(ValueError): "docstring"
            if not lines[docstring.lineno - 1].encode()[: docstring.col_offset].strip():
                drop.update(range(docstring.lineno, docstring.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for number, line in enumerate(lines, 1) if number not in drop and line.strip())


def _record() -> dict[str, dict]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


@cache
def code_version(module: str) -> str:
    """``r<revision>`` while the module is as declared, else the first 12 digits of its hash."""
    record = _record().get(module, {})
    found = code_hash(module)
    return f"r{record['revision']}" if record.get("sha256") == found else found[:12]


def code_versions(modules: tuple[str, ...]) -> dict[str, str]:
    """Version of each module, for a run's settings."""
    return {module: code_version(module) for module in modules}


def declare(action: str, modules: list[str]) -> None:
    """Record the present code of ``modules``: ``keep`` their revisions, or ``bump`` them."""
    record = _record()
    unknown = [module for module in modules if module not in MODULES]
    if action not in ("keep", "bump") or unknown or not modules:
        raise KdlibError(
            f"Expected keep or bump and one or more of: {', '.join(MODULES)}. Found: {action} {' '.join(modules)}"
        )
    for module in modules:
        revision = record.get(module, {}).get("revision", 0) + (action == "bump" or module not in record)
        record[module] = {"revision": revision, "sha256": code_hash(module)}
    RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")


if __name__ == "__main__":
    try:
        declare(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
    except KdlibError as error:
        sys.exit(str(error))
