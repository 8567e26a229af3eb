"""How figures look: one style, one colour a method, labels beside what they name, the same bytes from the same data."""

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.analysis import statistics
from kdlib.study import store

# Okabe and Ito's palette, told apart by colour-blind readers and in greyscale.
COLOURS = {"CE": "#0072B2", "KD": "#D55E00", "online KD": "#009E73", "teacher": "#333333", "untrained": "#999999"}
KINDS = {
    "sampled": "#D55E00",
    "importance": "#CC79A7",
    "stratified": "#E69F00",
    "topk": "#0072B2",
    "topk_sampled": "#009E73",
    "dense": "#333333",
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
DARK, GREY = "#333333", "#767676"
WIDTH = 6.3  # inches: the paper's text width


def use_style() -> None:
    """Set matplotlib up for the paper: small type, few lines, fonts embedded, the same bytes from the same data."""
    axes = {"labelsize": 8, "titlesize": 8, "titleweight": "bold", "titlelocation": "left", "linewidth": 0.6}
    ticks = {"labelsize": 7.5, "major.width": 0.6, "major.size": 3, "minor.width": 0.8, "minor.size": 3.2}
    rc = {f"axes.{name}": value for name, value in axes.items()}
    rc |= {f"{side}tick.{name}": value for side in "xy" for name, value in ticks.items()}
    rc |= {"axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False, "font.size": 8}
    rc |= {"figure.constrained_layout.use": True, "figure.dpi": 100, "savefig.dpi": 200, "lines.linewidth": 1.2}
    rc |= {"lines.markersize": 4.8, "lines.solid_capstyle": "round", "axes.axisbelow": True}
    rc |= {"patch.edgecolor": "white", "patch.force_edgecolor": True, "patch.linewidth": 0.8}
    rc |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "0.15")
    rc |= {"pdf.fonttype": 42, "font.family": "DejaVu Sans", "axes.prop_cycle": plt.cycler(color=list(KINDS.values()))}
    plt.rcParams.update(rc)


def colour(method: str) -> str:
    """The colour of a method: one for each objective, dark grey for teachers."""
    return next(
        (COLOURS[name] for name in ("online KD", "KD", "CE", "teacher") if name in method), COLOURS["untrained"]
    )


def dots(axis: Axes, frame: pd.DataFrame, label: str, value: str, limits: tuple[float, float] | None = None) -> None:
    """A line per row of ``frame``, top first: the value, its interval (columns low, high), and the number at the right.

    A value beyond ``limits`` becomes an arrow at that edge, and an interval ends there; the number stays what it is. A column
    ``colour`` takes the place of the methods' colours, a column ``beside`` is written after the number.
    """
    low, high = limits or (-np.inf, np.inf)
    for place, row in enumerate(frame.to_dict("records")):
        tint, inside = row.get("colour") or colour(row[label]), low <= row[value] <= high
        if inside:
            ends = np.clip([row["low"], row["high"]], low, high)
            axis.plot(ends, [place, place], color=tint, linewidth=1.6, solid_capstyle="butt")
        marker = "o" if inside else ">" if row[value] > high else "<"
        axis.plot(np.clip(row[value], low, high), place, marker=marker, color=tint, markersize=4.5, clip_on=False)
        _number(axis, place, f"{row[value]:.3f}", tint)
        if "beside" in row:
            _number(axis, place, row["beside"], tint, column=1)
    _lines(axis, list(frame[label]))
    if limits:
        axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def against(axis: Axes, differences: pd.DataFrame, reference: str, losses: Mapping[str, float] | None = None) -> None:
    """Differences from a reference, which has the first line, with their intervals: dark where p ≤ 0.05, else grey.

    Args:
        differences: columns a, difference, low, high, p_value (``comparison.differences``, one split).
        losses: mean loss of every line, by name, written beside the differences.
    """
    first = pd.DataFrame([{"a": reference, "difference": 0.0, "low": 0.0, "high": 0.0, "colour": DARK}])
    told = differences.assign(colour=np.where(differences.p_value <= statistics.ALPHA, DARK, GREY))
    rows = pd.concat([first, told], ignore_index=True)
    if losses is not None:
        rows["beside"] = [f"{losses[name]:.3f}" for name in rows.a]
        for column, heading in enumerate(["Δ", "NLL"]):
            _number(axis, -1, heading, GREY, column)
    # Neither one student that learned nothing nor an unbounded interval may squeeze all others into a point.
    ends = rows[["low", "difference", "high"]].where(np.isfinite)
    near = ends[rows.difference.abs() <= 3 * ends[1:].abs().max(axis=1).median()]
    dots(axis, rows, "a", "difference", (near.min(axis=None), near.max(axis=None)))
    axis.axvline(0, color="#999999", linewidth=0.7, zorder=0)
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel(f"nats/token against {reference},\nbelow 0 is better")


def seeds(axis: Axes, table: pd.DataFrame, column: str, form: str = ".3f") -> None:
    """A line per cell of ``table``, top first: a grey dot a run, a tick at their mean, and that number at the right."""
    for place, (_, values) in enumerate(table.groupby("cell", sort=False)[column]):
        axis.plot(values, [place] * len(values), "o", color="#aaaaaa", markersize=3, markeredgewidth=0)
        axis.plot(values.mean(), place, "|", color=DARK, markersize=9, markeredgewidth=1.6)
        _number(axis, place, f"{values.mean():{form}}", DARK)
    _lines(axis, list(table.cell.unique()))
    axis.locator_params(axis="x", nbins=4)


def lines(axis: Axes, table: pd.DataFrame, x: str, y: str, error: str | None = None, named: bool = False) -> None:
    """A line a cell of ``table`` over a whole number ``x``, in a colour of its own, with a band of ± the column ``error``.

    Args:
        named: whether names stand at the right, in the colours of their lines.
    """
    ends = []
    for tint, (cell, rows) in zip(LINES, table.groupby("cell", sort=False), strict=False):
        rows = rows.sort_values(x)
        axis.plot(rows[x], rows[y], "o-", color=tint, markersize=3)
        if error is not None and rows[error].notna().all():
            axis.fill_between(rows[x], rows[y] - rows[error], rows[y] + rows[error], color=tint, alpha=0.15, linewidth=0)
        ends.append((cell, tint, rows[x].iloc[-1], rows[y].iloc[-1]))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if named:
        label_points(axis, *map(list, zip(*((cell, x, y) for cell, _, x, y in ends), strict=True)), tints=[tint for _, tint, *_ in ends])


def stacked(axis: Axes, table: pd.DataFrame, label: str, columns: dict[str, str]) -> None:
    """A bar per row of ``table``, top first, of the sums of ``columns`` (column: its name); those that are 0 throughout are left out."""
    tints = dict(zip(columns, ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#cccccc", "#999999"), strict=False))
    begin = np.zeros(len(table))
    for column in [name for name in columns if table[name].any()]:
        axis.barh(range(len(table)), table[column], left=begin, color=tints[column], label=columns[column], height=0.65)
        begin += table[column].to_numpy()
    _lines(axis, list(table[label]))
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=7, handlelength=1)


def height(lines: int) -> float:
    """Inches for panels with that many lines of :func:`dots` or :func:`seeds`."""
    return 0.7 + 0.22 * lines


def _number(axis: Axes, place: int, text: str, tint: str, column: int = 0) -> None:
    # Right-aligned, a column every 32 points: seven characters and a gap.
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "ha": "right"}
    axis.annotate(text.replace("-", "−"), (1, place), (33 + 32 * column, 0), color=tint, fontsize=7.5, annotation_clip=False, **where)


def _lines(axis: Axes, names: list[str]) -> None:
    labels = [textwrap.fill(name, 40) for name in names]
    axis.set(yticks=range(len(names)), yticklabels=labels, ylim=(len(names) - 0.4, -0.6))
    axis.tick_params(axis="y", length=0)


def label_points(
    axis: Axes, names: list[str], x: list[float], y: list[float], inward: bool = False, tints: list[str] | None = None
) -> None:
    """Names beside points, in the colours of their methods or in ``tints``, moved apart vertically where they would overlap.

    Names stand to the right of their points; ``inward``: to the left for points in the right half.
    """
    order, (bottom, top) = np.argsort(y), axis.get_ylim()
    places, gap = np.array(y, dtype=float)[order], 0.065 * (top - bottom)
    for _ in range(50):
        overlap = np.maximum(0, gap - np.diff(places)) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    for i, place in zip(order, places, strict=True):
        fraction = axis.transAxes.inverted().transform(axis.transData.transform((x[i], y[i])))[0]
        side, offset = ("right", -6) if inward and fraction > 0.5 else ("left", 6)
        options = {"ha": side, "va": "center", "color": tints[i] if tints else colour(names[i]), "fontsize": 7.5}
        axis.annotate(names[i], (x[i], place), (offset, 0), textcoords="offset points", **options)


def learning_curve(run: store.Run) -> None:
    """One run's training and validation NLL against the tokens seen; nothing for a model that was not trained."""
    if not (run.path / "log.csv").is_file():
        return
    log = pd.read_csv(run.path / "log.csv")
    log, validation = log.dropna(subset="loss"), log.dropna(subset="validation_nll")
    _, axis = plt.subplots(figsize=(0.6 * WIDTH, 2.4))
    axis.plot(log.tokens, log.ce, color="#bbbbbb", linewidth=0.7)
    axis.plot(validation.tokens, validation.validation_nll, color=COLOURS["CE"])
    ends = {"training NLL": log.ce.iloc[-1]} | (
        {"validation NLL": validation.validation_nll.iloc[-1]} if len(validation) else {}
    )
    label_points(axis, list(ends), [log.tokens.iloc[-1]] * len(ends), list(ends.values()))
    axis.set(xlabel="training tokens seen", ylabel="nats/token")


def reliability(axis: Axes, bins: pd.DataFrame, text: str, tint: str) -> None:
    """Accuracy against confidence of the first choice: a dot a bin, its area by its tokens; the diagonal is calibrated.

    Args:
        bins: columns counts, confidence_sums, hits; empty bins are left out.
        text: written in the corner.
    """
    filled = bins[bins.counts > 0]
    confidence, accuracy = filled.confidence_sums / filled.counts, filled.hits / filled.counts
    axis.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.7, zorder=0)
    axis.plot(confidence, accuracy, color=tint, linewidth=0.9)
    axis.scatter(confidence, accuracy, s=2 + 60 * filled.counts / filled.counts.sum(), color=tint, linewidth=0)
    axis.annotate(text, (0.97, 0.04), xycoords="axes fraction", va="bottom", ha="right", color=tint, fontsize=7.5)
    axis.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")


def save(figure: Figure, profile: str, stem: str) -> Image:
    """Write ``figures/<profile>/<stem>.pdf`` and ``.png``, byte for byte the same for the same drawing, and close the figure.

    Returns:
        The picture as it was saved. A notebook shows it at the end of a cell, and does not draw the figure once more.
    """
    path = store.figures(profile)
    path.mkdir(parents=True, exist_ok=True)
    # Time and versions are left out of the files: they would differ where nothing that is drawn does.
    figure.savefig(path / f"{stem}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    figure.savefig(path / f"{stem}.png", metadata={"Software": None})
    plt.close(figure)
    return Image(path / f"{stem}.png", retina=True)
