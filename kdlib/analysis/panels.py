"""The panels of a grid's figure: each draws one thing about its students on one axis."""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.analysis import comparison, figures, studies
from kdlib.analysis.grids import Grid


@dataclass(frozen=True)
class Found:
    """What was found of a grid: a row a student, a row a cell, and the differences from the cell ``reference``.

    ``means`` and ``differences`` are those of :func:`kdlib.analysis.studies.means` and
    :func:`kdlib.analysis.studies.differences`.
    """

    profile: str
    students: pd.DataFrame
    means: pd.DataFrame
    differences: pd.DataFrame
    reference: str


def draw(grid: Grid, found: Found) -> Figure:
    """The figure of a grid: its panels beside one another, a line a cell."""
    lines = 1 + found.differences.a.nunique()
    own = bool({"constants", "size", "size, calibrated"} & set(grid.panels))  # not a line a cell
    size = (figures.WIDTH, max(2.4 if own else 0, figures.height(0 if grid.panels[0] == "size" else lines)))
    figure, axes = plt.subplots(1, len(grid.panels), figsize=size, sharey=not own, width_ratios=grid.widths)
    for axis, name in zip(axes, grid.panels, strict=True):
        PANELS[name](axis, found)
    return figure


def _against(axis: Axes, found: Found, split: str, title: str, reference: str | None = None) -> None:
    rows = found.differences[found.differences.split == split]
    figures.against(axis, rows, reference or found.reference)
    axis.set_title(title)


def difference(axis: Axes, found: Found) -> None:
    """Test loss minus the reference's."""
    _against(axis, found, "test", "test NLL")


def difference_in_domain(axis: Axes, found: Found) -> None:
    """Test loss minus the reference's, beside :func:`difference_out_of_domain`."""
    _against(axis, found, "test", comparison.TEXTS["test"])


def difference_out_of_domain(axis: Axes, found: Found) -> None:
    """Loss on out-of-domain text minus the reference's."""
    _against(axis, found, "ood", comparison.TEXTS["ood"])


def others(axis: Axes, found: Found) -> None:
    """Students without a constant weight and temperature against the one that was chosen, beside :func:`constants`."""
    _against(axis, found, "test", "other students", "the chosen constant")


def constants(axis: Axes, found: Found) -> None:
    """Test loss by weight and temperature: darker is better, the chosen pair outlined, cross-entropy the weight of 0."""
    import seaborn as sns  # which imports half of scipy: other panels do without

    means = found.means
    varied = means.dropna(subset=["kd_weight", "temperature"])
    wide = varied.pivot_table(index="kd_weight", columns="temperature", values="nll")
    if len(ce := means[means.objective == "ce"]):
        wide.loc[0.0] = ce.nll.iloc[0]
    wide = wide.sort_index()
    limits = {"vmin": varied.nll.min(), "vmax": varied.nll.max()}
    text = {"annot": True, "fmt": ".3f", "annot_kws": {"fontsize": 7.5}}
    sns.heatmap(wide, cmap="Blues_r", cbar=False, linewidths=1, ax=axis, **text, **limits)
    chosen = means[means.cell == found.reference].iloc[0]
    corner = wide.columns.get_loc(chosen.temperature), wide.index.get_loc(chosen.kd_weight)
    line = {"fill": False, "edgecolor": figures.COLOURS["KD"], "linewidth": 2, "clip_on": False, "zorder": 3}
    axis.add_patch(plt.Rectangle(corner, 1, 1, **line))
    axis.tick_params(length=0)
    axis.set_yticklabels([f"{weight:g}" if weight else "0 (CE)" for weight in wide.index], rotation=0)
    axis.set(xticklabels=[f"{one:g}" for one in wide.columns], xlabel="temperature", ylabel="kd_weight")
    axis.set_title("test NLL (nats/token)")


def calibration(axis: Axes, found: Found) -> None:
    """Calibration error, a dot a student."""
    figures.seeds(axis, found.students, "ece")
    axis.set(xlabel="test ECE", title="calibration error")


def speed(axis: Axes, found: Found) -> None:
    """Tokens a second in training, a dot a student."""
    figures.seeds(axis, found.students, "tokens_per_second", ",.0f")
    axis.set(xlabel=studies.speed_label(found.profile, found.students), title="training speed")


def loss(axis: Axes, found: Found) -> None:
    """Test loss, a dot a student."""
    figures.seeds(axis, found.students, "nll")
    axis.set(xlabel="nats/token, lower is better", title="test NLL")


def loss_beside_the_teachers(axis: Axes, found: Found) -> None:
    """Test loss, a dot a student; the teacher's dotted."""
    loss(axis, found)
    teacher = studies.teacher(found.profile, found.students).metrics["evaluation"]["test"]["nll"]
    _teacher(axis, teacher, "left", 3)


def share(axis: Axes, found: Found) -> None:
    """Share of the teacher's accuracy, a dot a student; dotted the teacher, dashed one per cent below it."""
    figures.seeds(axis, found.students, "share", ".1%")
    _teacher(axis, 1, "right", -5)  # past the dashed line
    axis.axvline(0.99, color="#999999", linewidth=0.9, linestyle="--", zorder=0)
    axis.set(xlabel="share of the teacher's accuracy", title="accuracy")
    axis.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))


def size(axis: Axes, found: Found) -> None:
    """Test loss against the number of members, a line a way of combining them, beside :func:`size_calibrated`."""
    figures.lines(axis, _by_way(found), "size", "nll")
    axis.set(xlabel="members", ylabel="nats/token", title="test NLL")


def size_calibrated(axis: Axes, found: Found) -> None:
    """As :func:`size`, with the temperature that fits calibration text best."""
    figures.lines(axis, _by_way(found), "size", "nll_calibrated", named=True)
    axis.set(xlabel="members", title="calibrated")


def _by_way(found: Found) -> pd.DataFrame:
    return found.means.rename(columns={"cell": "name", "way": "cell"})


def domains(axis: Axes, found: Found) -> None:
    """Test loss minus the reference's in each domain, a column each; blue is better, orange worse."""
    rows = [(row.cell, row.run.metrics["domains"]["test"]) for row in found.students.itertuples()]
    table = pd.DataFrame([{"cell": cell} | {name: one["nll"] for name, one in parts.items()} for cell, parts in rows])
    table = table.groupby("cell", sort=False).mean()
    table = (table - table.loc[found.reference]).loc[[found.reference, *found.differences.a.unique()]]
    limit = table.abs().max(axis=None) or 1.0
    axis.imshow(table, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", alpha=0.7)
    for place, values in enumerate(table.to_numpy()):
        for column, value in enumerate(values):
            axis.text(column, place, f"{value:+.2f}".replace("-", "−"), ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(table.columns)), table.columns, rotation=30, ha="right")
    axis.tick_params(length=0)
    axis.set_title("by domain")


def _teacher(axis: Axes, at: float, side: str, points: float) -> None:
    axis.axvline(at, color="#999999", linewidth=0.9, linestyle=":", zorder=0)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top", "ha": side}
    axis.annotate("teacher", (at, 0.98), (points, 0), color=figures.GREY, fontsize=7.5, rotation=90, **place)


PANELS = {
    "difference": difference,
    "difference in domain": difference_in_domain,
    "difference out of domain": difference_out_of_domain,
    "constants": constants,
    "others": others,
    "calibration": calibration,
    "speed": speed,
    "loss": loss,
    "loss beside the teacher's": loss_beside_the_teachers,
    "share": share,
    "size": size,
    "size, calibrated": size_calibrated,
    "domains": domains,
}
