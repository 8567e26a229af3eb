"""Pictures of the tour: a text coloured token by token, learning curves side by side, a pool that grows, a slider over pictures."""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from kdlib.analysis import figures, ledger, tables
from kdlib.analysis.statistics import pool_target_logprobs
from kdlib.study.store import Run

_HEAT = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#fbe3b0", "#e69f00", "#d55e00"])
# A monospaced letter is 0.602 of its size wide, and a line of COLUMNS letters as wide as a figure.
COLUMNS, _SIZE, _LINE = 90, figures.WIDTH * 72 / 90 / 0.602, 0.25


def next_tokens(names: Sequence[str], expected: Sequence[float], kept: Sequence[float], what: str) -> None:
    """A bar a token, most likely first: its probability; a dot: what cached targets hold of it, said by ``what``."""
    places = range(len(names))
    _, axis = plt.subplots(figsize=(0.75 * figures.WIDTH, 0.5 + 0.2 * len(names)))
    axis.barh(places, expected, height=0.7, color="#bbbbbb")
    axis.plot(kept, places, "o", color=figures.COLOURS["KD"], markersize=5, clip_on=False)
    axis.set(yticks=places, ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.25 * max(expected)), xlabel="probability of the next token")
    axis.set_yticklabels([f"“{_visible(name)}”" for name in names], fontfamily="DejaVu Sans Mono")
    axis.tick_params(axis="y", length=0)
    axis.annotate("bars: the teacher", (0.98, 0.16), xycoords="axes fraction", ha="right", color=figures.DARK)
    axis.annotate(f"dots: {what}", (0.98, 0.06), xycoords="axes fraction", ha="right", color=figures.COLOURS["KD"])


def coloured(texts: dict[str, tuple[Sequence[str], Sequence[float]]], unit: str) -> None:
    """Texts with a colour behind every token, all on one scale, which stands below.

    Args:
        texts: heading -> pieces of the text, and a number for each (NaN: no colour).
    """
    top = max(np.nanmax(values) for _, values in texts.values())
    placed = list(_placed(texts))
    inches = _LINE * (placed[-1][0] + 2.6)
    figure = plt.figure(figsize=(figures.WIDTH, inches), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(-1, COLUMNS + 1), ylim=(inches / _LINE - 0.6, -0.6))
    axis.set_axis_off()
    for line, column, piece, value in placed:
        heading = value is None
        if not heading and np.isfinite(value):
            axis.add_patch(Rectangle((column, line - 0.42), len(piece), 0.84, color=_HEAT(value / top), linewidth=0))
        style = {"fontsize": 8, "fontweight": "bold"} if heading else {"fontsize": _SIZE, "fontfamily": "DejaVu Sans Mono"}
        axis.text(column, line, piece, va="center_baseline", color=figures.DARK, **style)
    _scale(axis, placed[-1][0] + 1.5, top, unit)


def curves(runs: dict[str, Run], reference: tuple[str, float]) -> None:
    """Learning curves side by side: loss on the text being trained on in grey, on held-out text in colour.

    Args:
        runs: name of a student -> its run; names say CE, KD as tables do, which sets the colour.
        reference: name and validation NLL of a model drawn as a dashed line.
    """
    figure, axes = plt.subplots(1, len(runs), figsize=(figures.WIDTH, 2.4), sharey=True, squeeze=False)
    for axis, (name, run) in zip(axes.flat, runs.items(), strict=True):
        log = pd.read_csv(run.path / "log.csv")
        seen, held_out = log.dropna(subset="loss"), log.dropna(subset="validation_nll")
        axis.plot(seen.tokens, seen.ce, color="#cccccc", linewidth=0.8)
        axis.plot(held_out.tokens, held_out.validation_nll, color=figures.colour(name), linewidth=1.6)
        last = held_out.iloc[-1]
        end = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right", "fontweight": "bold"}
        axis.annotate(f"{last.validation_nll:.2f}", (last.tokens, last.validation_nll), color=figures.colour(name), **end)
        axis.axhline(reference[1], color=figures.COLOURS["teacher"], linewidth=0.8, linestyle="--")
        axis.set(title=name, xlabel="tokens seen")
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[0, 0].set_ylabel("loss (nats/token)")
    told = f"{reference[0]}: {reference[1]:.2f}"
    axes[0, 0].annotate(told, (0, reference[1]), xytext=(0, 3), textcoords="offset points", fontsize=7.5)
    axes[0, -1].annotate("grey: text trained on", (0.98, 0.94), xycoords="axes fraction", ha="right", color="#999999")
    axes[0, -1].annotate("colour: held-out text", (0.98, 0.85), xycoords="axes fraction", ha="right", color=figures.DARK)


def pool_losses(log_probs: Sequence[np.ndarray]) -> pd.DataFrame:
    """The loss of every pool that some members can form, from what each stored: the log-probability of every token.

    Args:
        log_probs: [K, n], nats.

    Returns:
        A row a subset: ``members`` (how many) and ``nll`` of their probability pool, nats a token.
    """
    every = np.asarray(log_probs, dtype=np.float64)
    sizes = range(1, len(every) + 1)
    return pd.DataFrame(
        {"members": size, "nll": -pool_target_logprobs(every[list(chosen)]).mean()}
        for size in sizes
        for chosen in combinations(range(len(every)), size)
    )


def growing(losses: pd.DataFrame, size: int, reference: tuple[str, float]) -> None:
    """Loss against the number of members: a dot a pool (:func:`pool_losses`), a line through their means, ``size`` told."""
    means, tint = losses.groupby("members").nll.mean(), figures.COLOURS["KD"]
    _, axis = plt.subplots(figsize=(0.75 * figures.WIDTH, 2.6))
    axis.plot(losses.members, losses.nll, "o", color="#bbbbbb", markersize=4, markeredgewidth=0)
    axis.plot(means.index, means, color=tint, linewidth=0.8, alpha=0.5)
    axis.plot(means.loc[:size].index, means.loc[:size], color=tint, linewidth=1.8)
    axis.plot(size, means[size], "o", color=tint, markersize=9)
    axis.axhline(reference[1], color=figures.COLOURS["teacher"], linewidth=0.8, linestyle="--")
    low, high = min(reference[1], losses.nll.min()), losses.nll.max()
    axis.set(xticks=means.index, xlim=(0.7, len(means) + 0.3), ylim=(low - 0.1 * (high - low), high + 0.1 * (high - low)))
    axis.annotate(reference[0], (0.72, reference[1]), xytext=(0, 3), textcoords="offset points", fontsize=7.5)
    gain = f", {means[1] - means[size]:.3f} better than one alone" if size > 1 else " on average"
    axis.set(title=f"{size} member{'s' * (size > 1)}: {means[size]:.3f} nats/token{gain}")
    axis.set(xlabel="members in the pool", ylabel="loss on test text (nats/token)")


def opinions(members: Sequence[list[tuple]]) -> tables.Shown:
    """What each member holds most likely: a row a member, most likely first.

    Args:
        members: of each, tuples that begin with a piece of text and end with its probability.
    """
    rows = [
        {"member": f"student {number}"} | {f"choice {n}": f"“{one[0]}” {one[-1]:.2f}" for n, one in enumerate(likely, 1)}
        for number, likely in enumerate(members, 1)
    ]
    return tables.show(pd.DataFrame(rows), {name.capitalize(): f"{{{name}}}" for name in rows[0]})


def costs(profile: str, runs: dict[str, Run]) -> pd.DataFrame:
    """GFLOPs of what made each run, everything upstream included: a row a run, columns model, training, teacher, targets."""
    rows = []
    for name, run in runs.items():
        alone, whole = (ledger.cost(profile, run, teacher_training=one).flops / 1e9 for one in (False, True))
        teacher = whole["train"] - alone["train"]
        rows.append({"model": name, "training": alone["train"], "teacher": teacher, "targets": alone["teacher_forward"]})
    return pd.DataFrame(rows)


def bill(costs: pd.DataFrame) -> None:
    """A bar a model of what it cost (:func:`costs`), by what it was spent on."""
    _, axis = plt.subplots(figsize=(0.85 * figures.WIDTH, 0.9 + 0.3 * len(costs)))
    names = {"training": "training of students", "teacher": "training of the teacher", "targets": "writing soft targets"}
    figures.stacked(axis, costs, "model", names)
    axis.set_xlabel("GFLOPs (10⁹ operations)")


def summary(runs: dict[str, Run], costs: pd.DataFrame) -> tables.Shown:
    """What each model reached on test text and what it took (:func:`costs`), best first."""
    total = costs.set_index("model").sum(axis=1)
    rows = [
        {"model": name, "size": run.metrics["parameters"]["total"], "gflops": total[name]}
        | {key: run.metrics["evaluation"]["test"][key] for key in ("nll", "accuracy")}
        for name, run in runs.items()
    ]
    columns = {"Model": "{model}", "NLL": "{nll:.3f}", "Right": "{accuracy:.1%}", "Parameters": "{size:si}", "GFLOPs": "{gflops:.0f}"}
    return tables.show(pd.DataFrame(rows), columns, best="nll")


class Slider:
    """A picture that a slider changes, in Jupyter; where nothing shows widgets (GitHub, a printed page) the first picture.

    Args:
        draw: makes the figure for a value, with pyplot.
        label: what the values are.
        values: those of the slider, in order.
        first: where it begins.
    """

    def __init__(self, draw: Callable[[int], None], label: str, values: Sequence[int], first: int):
        self.draw, self.label, self.values, self.first = draw, label, list(values), first

    def png(self, value: int) -> bytes:
        """The picture for a value."""
        self.draw(value)
        figure, file = plt.gcf(), io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
        plt.close(figure)
        return file.getvalue()

    def _repr_mimebundle_(self, **_) -> tuple[dict, dict]:
        picture = self.png(self.first)
        width = int.from_bytes(picture[16:20], "big") // 2  # PNGs have twice the pixels of the screen
        found = {"image/png": base64.b64encode(picture).decode(), "text/plain": f"{self.label}: {self.first}"}
        return self._widget(picture, width)._repr_mimebundle_() | found, {"image/png": {"width": width}}

    def _widget(self, picture: bytes, width: int):
        import ipywidgets

        image = ipywidgets.Image(value=picture, format="png", width=width)
        slider = ipywidgets.SelectionSlider(
            options=self.values, value=self.first, description=self.label, style={"description_width": "initial"}
        )
        slider.observe(lambda change: setattr(image, "value", self.png(change["new"])), names="value")
        return ipywidgets.VBox([slider, image])


def _placed(texts: dict) -> Iterator[tuple[int, int, str, float | None]]:
    """Line, column, piece and number of every heading (None) and token, wrapped between tokens."""
    line = 0
    for heading, (pieces, values) in texts.items():
        yield line, 0, heading, None
        line, column = line + 1, 0
        for piece, value in zip(pieces, values, strict=True):
            shown = _visible(piece)
            if column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            yield line, column, shown, float(value)
            column += len(shown)
        line += 2


def _visible(piece: str) -> str:
    """A token on one line of a font that has its letters."""
    if piece == "<|endoftext|>":
        return "(end)"
    return "".join(one if one.isprintable() and one != "�" else "¶" if one == "\n" else "·" for one in piece)


def _scale(axis, line: float, top: float, unit: str) -> None:
    for part in range(20):
        axis.add_patch(Rectangle((4 + part, line - 0.25), 1, 0.5, color=_HEAT(part / 19), linewidth=0))
    for column, text, side in ((3.3, "0", "right"), (24.7, f"{top:.2g} {unit}", "left")):
        axis.text(column, line, text, va="center_baseline", ha=side, color=figures.GREY, fontsize=7.5)
