"""Progress bars that show in a terminal and in Jupyter and keep out of batch logs."""

import os
import sys
from collections.abc import Iterable

from tqdm.auto import tqdm


def bar(iterable: Iterable | None = None, description: str = "", **options) -> tqdm:
    """A tqdm bar (``options`` are tqdm's); silent where ``KDLIB_BATCH`` is set and standard error is no terminal."""
    return tqdm(iterable, desc=description, disable=batch(), leave=False, **options)


def batch() -> bool:
    """Whether the output goes to a log, where bars would only be noise."""
    return bool(os.environ.get("KDLIB_BATCH")) and not sys.stderr.isatty()
