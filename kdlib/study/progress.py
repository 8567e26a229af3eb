"""Progress bars that show in a terminal and in Jupyter and keep out of batch logs."""

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm as text_bar
from tqdm.auto import tqdm as notebook_bar


def bar(iterable: Iterable | None = None, description: str = "", **options) -> text_bar:
    """A tqdm bar (``options`` are tqdm's); silent where ``KDLIB_BATCH`` is set and standard error is no terminal.

    A notebook that is run from a terminal (``KDLIB_TERMINAL``) draws it as text, which the runner passes on.
    """
    kind = text_bar if os.environ.get("KDLIB_TERMINAL") else notebook_bar
    return kind(iterable, desc=description, disable=batch(), leave=False, **options)


def batch() -> bool:
    """Whether the output goes to a log, where bars would only be noise."""
    return bool(os.environ.get("KDLIB_BATCH")) and not sys.stderr.isatty()
