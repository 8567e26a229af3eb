"""The code that determines a result: a module and all of the package that it imports, compared without comments.

What only plans, stores and tells of runs is left out: a run's settings and inputs stand in its id themselves.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Of the room study, what shapes no number.
APART = {"kdlib", "kdlib.errors", "kdlib.study"} | {
    f"kdlib.study.{name}"
    for name in (
        *("closure", "design", "divergences", "features", "kinds", "listing", "notebooks", "parameters", "plan"),
        *("profiles", "progress", "proof", "refs", "revisions", "runner", "store"),
    )
}


def closure(module: str) -> list[str]:
    """Names of the package's modules that ``module`` imports, directly or not, at its top or in its functions."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in found and name not in APART:
            found.add(name)
            # Importing a module runs those of the packages around it too.
            around = name.rpartition(".")[0]
            waiting += [around, *_imports(name)]
    return sorted(found)


def code_hash(modules: Iterable[str]) -> str:
    """SHA-256 of the modules' code without comments, docstrings and blank lines."""
    texts = (f"{name}\n{_read(_file(name).read_text(encoding='utf-8'))[1]}" for name in sorted(modules))
    return hashlib.sha256("\f".join(texts).encode()).hexdigest()


def room(name: str) -> list[str]:
    """Every module of a room, such as analysis."""
    return [f"kdlib.{name}.{path.stem}" for path in sorted((PACKAGE / name).glob("*.py")) if path.stem != "__init__"]


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _imports(module: str) -> frozenset[str]:
    imports, _ = _read(_file(module).read_text(encoding="utf-8"))
    return frozenset(_named(imports))


def _named(imports: Iterable[ast.Import | ast.ImportFrom]) -> Iterator[str]:
    for node in imports:
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.startswith("kdlib."))
        elif (node.module or "").split(".")[0] == "kdlib":
            for one in node.names:
                inside = f"{node.module}.{one.name}"
                yield inside if _file(inside).is_file() else node.module


@cache  # most modules are behind several kinds of run
def _read(source: str) -> tuple[list[ast.Import | ast.ImportFrom], str]:
    """A module's imports, and its code without comments, docstrings and blank lines."""
    tree = ast.parse(source)
    statements = [tree, *_statements(tree.body)]
    return [one for one in statements if isinstance(one, ast.Import | ast.ImportFrom)], _bare(source, statements)


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    # Neither imports nor docstrings stand inside an expression, and most of a tree is expressions.
    for node in body:
        yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from _statements(getattr(node, part, ()))


def _bare(source: str, statements: Iterable[ast.AST]) -> str:
    # Text, not the syntax tree, is hashed: the tree's printed form differs between Python versions.
    drop, lines = set(), source.splitlines()
    for node in statements:
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
