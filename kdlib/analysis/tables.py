"""Tables that a person reads in a notebook: units, no row numbers, sorted, the best marked.

Not pandas' ``Styler``: what it marks lies in a style sheet, which GitHub strips, and as plain text it is nothing.
"""

import csv
import io
import re
import textwrap
from dataclasses import dataclass
from html import escape

import pandas as pd

from kdlib.analysis import report
from kdlib.errors import KdlibError

BEST = "★"
UNITS = {
    "A − B": "nats/token",
    "Ambiguity": "nats/token",
    "Angle, trained": "°",
    "Angle, untrained": "°",
    "Best member": "nats/token",
    "Calibrated NLL": "nats/token",
    "Entropy": "nats",
    "Interval": "nats/token",
    "KL to teacher": "nats/token",
    "Members on average": "nats/token",
    "NLL": "nats/token",
    "Out of domain": "NLL, nats/token",
    "Standard error": "nats/token",
    "Together": "nats/token",
    "Validation NLL": "nats/token",
}
TEXTS = {"test": "test", "ood": "out of domain", "validation": "validation", "calibration": "calibration"}
_WIDEST = 32  # characters of a cell of words before it is wrapped


@dataclass(frozen=True)
class Shown:
    """A table as Jupyter, GitHub and a terminal show it: cells of text, and which rows are the best."""

    headings: list[str]
    body: list[list[str]]
    best: list[bool]

    def _repr_html_(self) -> str:
        sides = ["right" if number else "left" for number in self._numbers()]
        head = self._row("th", self.headings, sides, False)
        lines = [self._row("td", cells, sides, best) for cells, best in zip(self.body, self.best, strict=True)]
        return "\n".join(["<table>", f"<thead>{head}</thead>", "<tbody>", *lines, "</tbody>", "</table>"])

    def _row(self, tag: str, cells: list[str], sides: list[str], best: bool) -> str:
        # The side is said twice, since GitHub drops styles and Jupyter has one of its own that outdoes attributes.
        found = []
        for text, side in zip(cells, sides, strict=True):
            whole = "; white-space: nowrap" if tag == "td" and side == "right" else ""
            shown = f"<b>{escape(text)}</b>" if best else escape(text)
            found.append(f'<{tag} align="{side}" style="text-align: {side}{whole}">{shown}</{tag}>')
        return f"<tr>{''.join(found)}</tr>"

    def __repr__(self) -> str:
        body = [[textwrap.wrap(cell, _WIDEST) or [""] for cell in row] for row in self.body]
        # A heading is no wider than its column, unless one of its words is.
        parts = [heading.split() for heading in self.headings] + [line for row in body for line in row]
        count = len(self.headings)
        widths = [max(len(part) for found in parts[i::count] for part in found) for i in range(count)]
        heading = [textwrap.wrap(one, width) for one, width in zip(self.headings, widths, strict=True)]
        lines = [line for row in [heading, *body] for line in _lines(row, widths, self._numbers())]
        head = max(map(len, heading), default=1)
        return "\n".join([*lines[:head], "  ".join("─" * width for width in widths), *lines[head:]])

    def _numbers(self) -> list[bool]:
        return [
            bool(self.body) and all(re.match(r"[\[+−-]*\d|–$", row[i]) for row in self.body)
            for i in range(len(self.headings))
        ]


def _lines(row: list[list[str]], widths: list[int], numbers: list[bool]) -> list[str]:
    found = []
    for i in range(max(map(len, row), default=1)):
        cells = [part[i] if i < len(part) else "" for part in row]
        placed = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, numbers, strict=True)
        ]
        found.append("  ".join(placed).rstrip())
    return found


def show(frame: pd.DataFrame, columns: dict[str, str], best: str | None = None, lowest: bool = True) -> Shown:
    """A table to look at, its numbers rounded as in the paper's: those of the CSV that the frame is saved as.

    Args:
        columns: heading → format string over the columns of ``frame``, as in :class:`kdlib.analysis.report.Table`; units of
            headings that are in :data:`UNITS` are added.
        best: column by which rows are sorted; its best value is bold and has a star, in the first column. Rows where it is
            missing come last. Without it they stay in their order.
        lowest: the best is the lowest value.

    Raises:
        KdlibError: ``frame`` lacks a column that is to be shown or sorted by.
    """
    if best is not None:
        _refuse_unknown({best}, frame)
        frame = frame.sort_values(best, ascending=lowest, kind="stable")
    rows = list(csv.DictReader(io.StringIO(report.as_csv(frame), newline="")))
    try:
        body = [[report.render(template, row) for template in columns.values()] for row in rows]
    except KeyError as error:
        _refuse_unknown(set(error.args), frame)
        raise
    first = [False] * len(rows)
    if best is not None:
        first = list(frame[best] == (frame[best].min() if lowest else frame[best].max()))
    body = [[f"{BEST} {cells[0]}", *cells[1:]] if star else cells for cells, star in zip(body, first, strict=True)]
    return Shown([f"{name} ({UNITS[name]})" if name in UNITS else name for name in columns], body, first)


def evaluation(measured: dict[str, dict[str, float]]) -> Shown:
    """What a model reached on each text, from the ``evaluation`` among its run's metrics."""
    rows = [{"text": text} | measured[split] for split, text in TEXTS.items() if split in measured]
    columns = {"Text": "{text}", "NLL": "{nll:.3f}", "Perplexity": "{perplexity:.1f}", "Bits per byte": "{bits_per_byte:.3f}"}
    columns |= {"Accuracy": "{accuracy:.1%}", "ECE": "{ece:.3f}", "Calibrated NLL": "{nll_calibrated:.3f}"}
    return show(pd.DataFrame(rows), columns)


def facts(told: dict[str, str]) -> Shown:
    """A few things and their values, a line each, as they are written."""
    return Shown(["What", "Value"], [[what, value] for what, value in told.items()], [False] * len(told))


def _refuse_unknown(names: set[str], frame: pd.DataFrame) -> None:
    if unknown := names - set(frame.columns):
        raise KdlibError(f"A table can only show columns of its frame, {', '.join(frame.columns)}; got {', '.join(unknown)}.")
