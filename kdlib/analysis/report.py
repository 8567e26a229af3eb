"""How results are told: tidy CSV, and numbers and tables that are always looked up in one.

A number in the paper or the README is never typed. An analysis registers it as a *lookup* (file, row, column, format)
in ``results/<profile>/numbers/<notebook>.json``; LaTeX and Markdown are generated from lookups and tables alone.
"""

import csv
import math
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.analysis import grids, outputs
from kdlib.errors import KdlibError
from kdlib.study import store

if TYPE_CHECKING:
    import pandas as pd  # telling what was saved does without

README_FINDINGS = ("objectives_differences", "methods_differences")
README_PROFILE = "laptop"
README_FIGURES = {
    "methods": "Negative log-likelihood of every method on test and out-of-domain text, with intervals",
    "objectives": "Students with and without soft targets, seed by seed, and the differences with intervals",
    "leaderboard": "Ways of forming an ensemble: loss minus that of independent members, on test and out-of-domain text",
    "targets": "Gradient angle, distance from the teacher, test loss and calibration error against bytes a token on disk",
}


def save_table(frame: "pd.DataFrame", profile: str, stem: str) -> None:
    """Write ``results/<profile>/<stem>.csv``: six digits, whole numbers in full, empty cells for what is unknown."""
    path = store.results(profile) / f"{stem}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_csv(frame), encoding="utf-8", newline="\n")


def as_csv(frame: "pd.DataFrame") -> str:
    """A table as its file holds it."""
    return frame.convert_dtypes().to_csv(index=False, float_format="%.6g", lineterminator="\n")


class _Formatter(string.Formatter):
    # Adds the format "si" for counts of any size: in full below 10 000, else three digits and a metric prefix; and "p" for
    # p-values: three decimals, or that it is below the last of them.
    def format_field(self, value, spec):
        if spec == "p":
            return "< 0.001" if value < 0.001 else f"{value:.3f}"
        if spec != "si" or isinstance(value, str):
            return super().format_field(value, spec.removeprefix("si"))
        if abs(value) < 10_000:
            return f"{value:,.0f}"
        power = min(5, int(math.log10(abs(value)) / 3 + 1e-9))
        return f"{value / 1000**power:#.3g}".rstrip(".") + " " + " kMGTP"[power]


def render(template: str, cells: dict[str, str]) -> str:
    """A format string filled with the cells of a CSV row: numbers where they are numbers; "–" if one is empty."""
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    if any(cells[name] == "" for name in wanted):
        return "–"
    return _Formatter().vformat(template, (), {name: _value(cells[name]) for name in wanted})


def _value(cell: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def rows(profile: str, stem: str, where: dict[str, str]) -> list[dict[str, str]]:
    """The rows of a results CSV whose cells equal ``where``, as text.

    Raises:
        KdlibError: the file is not there, or lacks a column.
    """
    path = store.results(profile) / f"{stem}.csv"
    if not path.is_file():
        raise KdlibError(
            f"{path} is missing. An analysis writes it; make it with: make paper PROFILE={Path(profile).stem}"
        )
    with open(path, newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    if unknown := set(where) - set(found[0] if found else where):
        raise KdlibError(f"{path} has no column {', '.join(sorted(unknown))}; it has {', '.join(found[0])}.")
    return [row for row in found if all(row[name] == str(value) for name, value in where.items())]


def look_up(profile: str, lookup: dict) -> str:
    """The text of a number: ``format`` applied to the one row of ``csv`` that matches ``where``.

    Raises:
        KdlibError: no row, or several, match.
    """
    found = rows(profile, lookup["csv"], lookup["where"])
    if len(found) != 1:
        raise KdlibError(f"A number needs one row of {lookup['csv']}.csv where {lookup['where']}; found {len(found)}.")
    return render(lookup["format"], found[0])


def save_numbers(profile: str, analysis: str, shown: dict[str, tuple[list[str], dict[str, str]]]) -> None:
    """Register cells of saved tables as numbers of the paper, named ``<table>/<key>/…/<name>``.

    Writes ``results/<profile>/numbers/<analysis>.json``.

    Args:
        analysis: the name of a notebook, with that of a grid where it takes one (:attr:`kdlib.analysis.outputs.Analysis.name`).
        shown: table: (columns that together name a row, {name of the number: format string over the row's columns}).
    """
    found = {}
    for stem, (keys, formats) in shown.items():
        for row in rows(profile, stem, {}):
            where = {key: row[key] for key in keys}
            for name, template in formats.items():
                lookup = {"csv": stem, "where": where, "format": template}
                found["/".join([stem, *where.values(), name])] = lookup | {"text": look_up(profile, lookup)}
    path = store.results(profile) / "numbers" / f"{analysis}.json"
    path.parent.mkdir(exist_ok=True)
    store.write_json(path, found)


def numbers(profile: str) -> dict[str, str]:
    """Every registered number of the profile: name → text.

    Raises:
        KdlibError: an analysis has not been run.
    """
    found = {}
    for name, analysis in outputs.analyses(store.grids(profile)).items():
        path = store.results(profile) / "numbers" / f"{name}.json"
        if not path.is_file():
            raise KdlibError(
                f"The analysis {name} of profile {profile!r} has not been run ({path} is missing). "
                f"Run it with: kdlib run {' '.join(analysis.arguments)} --profile {profile}"
            )
        found |= {name: lookup["text"] for name, lookup in store.read_json(path).items()}
    return found


@dataclass(frozen=True)
class Table:
    """A table as the reader sees it: rows of a CSV, and for each heading a format string over the row's columns."""

    csv: str
    columns: dict[str, str]
    where: dict[str, str] = field(default_factory=dict)

    def body(self, profile: str) -> list[list[str]]:
        """The cells, row by row."""
        return [
            [render(template, row) for template in self.columns.values()] for row in rows(profile, self.csv, self.where)
        ]


_METHOD = {"Method": "{method}", "Runs": "{runs}"}
_LOSS = {"NLL": "{nll:.3f}"}
_AGAINST = {"− CE student": "{difference:+.3f}", "95 % interval": "[{low:+.3f}, {high:+.3f}]", "p": "{p_value:p}"}
_QUALITY = {"Bits/byte": "{bits_per_byte:.3f}", "Accuracy": "{accuracy:.3f}", "ECE": "{ece:.3f}"}
_CALIBRATED = {"Calibrated NLL": "{nll_calibrated:.3f}"}
_SIZE = {"Parameters": "{parameters:si}", "Training FLOPs": "{flops:si}"}
_DIFFERENCE = {
    "A": "{a}",
    "B": "{b}",
    "Text": "{split}",
    "A − B": "{difference:+.3f}",
    "95 % interval": "[{low:+.3f}, {high:+.3f}]",
    "p": "{p_value:p}",
    "A is better": "{verdict}",
}
_CORPUS = {
    "Split": "{split}",
    "Domain": "{domain}",
    "Sources": "{sources:,}",
    "Documents": "{documents:,}",
    "Bytes": "{bytes:si}",
    "Tokens": "{tokens:si}",
    "Licence": "{licence}",
}
_CALIBRATION = {
    "Method": "{method}",
    "Text": "{split}",
    "Temperature": "{temperature:.3f}",
    "ECE": "{ece:.3f} → {ece_calibrated:.3f}",
    "Floor": "{ece_floor:.3f}",
    "Debiased": "{ece_debiased:.3f} → {ece_debiased_calibrated:.3f}",
    "95 % interval": "[{ece_low:.3f}, {ece_high:.3f}] → [{ece_low_calibrated:.3f}, {ece_high_calibrated:.3f}]",
    "Full ECE": "{full_ece:.3f} → {full_ece_calibrated:.3f}",
    "NLL": "{nll:.3f} → {nll_calibrated:.3f}",
}
_COST = {
    "What": "{what}",
    "Runs": "{runs}",
    "Tokens": "{tokens:si}",
    "Tokens/s": "{tokens_per_second:si}",
    "Seconds": "{seconds:,.0f}",
    "Peak memory (B)": "{peak_memory_bytes:si}",
    "FLOPs": "{flops:si}",
    "Bytes/token": "{bytes_per_token:.1f}",
}
_VOCABULARY = {"Teacher": "{teacher}", "Vocabulary": "{vocabulary:,}", "Bits/byte": "{bits_per_byte:.3f}"}
_TARGETS = {
    "Targets": "{cell}",
    "Runs": "{runs}",
    "Tokens": "{tokens:si}",
    "Bytes/token": "{bytes_per_token:.1f}",
    "Format": "{format:.0f}",
    "Ids/token": "{entries_per_token:.1f}",
    "Angle, untrained": "{angle_initial:.1f}",
    "Angle, trained": "{angle_trained:.1f}",
    "KL to teacher": "{teacher_kl:.3f}",
    "NLL": "{nll:.3f}",
    "ECE": "{ece:.3f}",
    "Within 0.01 nats": "{nll_within}",
    "0.005 of ECE": "{ece_within}",
}
GROWTH = {"Ensemble": "{cell}", "k": "{size}", "Member k": "{nll:.3f}", "First k together": "{pool_nll:.3f}"}
TABLES = {
    "corpus": Table("corpus", _CORPUS),
    "vocabulary": Table("vocabulary", _VOCABULARY),
    "objectives": Table(
        "objectives", _METHOD | {"Text": "{split}"} | _LOSS | {"Perplexity": "{perplexity:.1f}"} | _QUALITY
    ),
    "objectives_differences": Table("objectives_differences", _DIFFERENCE),
    "methods": Table("methods", _METHOD | _LOSS | _AGAINST | _QUALITY | _SIZE, {"split": "test"}),
    "methods_ood": Table("methods", _METHOD | _LOSS | _AGAINST | _QUALITY, {"split": "ood"}),
    "methods_differences": Table("methods_differences", _DIFFERENCE),
    "calibration": Table("calibration", _CALIBRATION),
    "targets": Table("targets", _TARGETS),
    "targets_differences": Table("targets_differences", _DIFFERENCE, {"split": "test"}),
    "cost": Table("cost", _COST),
}


def tables(profile: str) -> dict[str, Table]:
    """The tables of the paper that the profile's results hold: those of its comparison, and one for each of its grids."""
    held = store.grids(profile)
    about = [grids.of(profile, name) for name in held]
    found = TABLES | {one.stem: Table(one.stem, one.columns) for one in about}
    found |= {f"{one.stem}_growth": Table(f"{one.stem}_growth", GROWTH) for one in about if one.growth}
    written = {stem for analysis in outputs.analyses(held).values() for stem in analysis.tables}
    return {name: table for name, table in found.items() if table.csv in written}


def findings(profile: str, stem: str) -> list[str]:
    """The sentences of a table of differences about test text."""
    return [row["sentence"] for row in rows(profile, stem, {"split": "test"})]


_MARKS = {"→": r"$\to$", "−": "$-$", "–": "--", "≥": r"$\ge$", "≤": r"$\le$", "×": r"$\times$"}
_MARKS |= {"α": r"$\alpha$", "β": r"$\beta$", "λ": r"$\lambda$", "ρ": r"$\rho$", "τ": r"$\tau$"}


def latex(text: str) -> str:
    """Plain text as LaTeX: special characters escaped, hyphens before digits as minus signs."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    text = text.replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")
    text = re.sub(r"(?<![\w.])[-−](?=\d)", "$-$", text)
    text = re.sub(r"(?<=\d) (?=[kMGTP]\b)", "~", text)
    for mark, command in _MARKS.items():
        text = text.replace(mark, command)
    return text


def latex_macros(values: dict[str, str]) -> str:
    r"""Definitions behind ``\result{name}``; none for names that LaTeX could not read, such as a cell's with a %."""
    named = {name: text for name, text in values.items() if not re.search(r"[\\{}%#&$~^]", name)}
    return "".join(f"\\defineresult{{{name}}}{{{latex(text)}}}\n" for name, text in sorted(named.items()))


def latex_table(table: Table, profile: str) -> str:
    """A ``tabular`` with booktabs rules: numbers to the right, words to the left."""
    body = table.body(profile)
    aligned = "".join("r" if _is_number([row[i] for row in body]) else "l" for i in range(len(table.columns)))
    heading, *lines = [" & ".join(map(latex, cells)) + r" \\" for cells in [table.columns, *body]]
    ruled = [r"\toprule", heading, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{@{{}}{aligned}@{{}}}}", *ruled, r"\end{tabular}", ""])


def _is_number(cells: Iterable[str]) -> bool:
    return all(re.match(r"[\[+−-]*\d|<|–$", cell) for cell in cells)


def markdown_table(headings: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A GitHub table; numbers to the right."""
    headings, body = list(headings), [list(row) for row in body]
    rule = ["---:" if body and _is_number([row[i] for row in body]) else "---" for i in range(len(headings))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [headings, rule, *body]
    )


def update_readme(profile: str = README_PROFILE) -> None:
    """Redraw the generated parts of ``README.md``: results and figures of ``profile``, and the benchmark table."""
    path = store.home() / "README.md"
    text = _replace(path.read_text(encoding="utf-8"), "results", _results(profile))
    path.write_text(
        _replace(text, "benchmarks", _benchmarks(store.home() / "benchmarks" / "results.csv")), encoding="utf-8"
    )


def _replace(text: str, name: str, generated: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise KdlibError(f"README.md must hold {begin} and {end} once each; what lies between them is generated.")
    return f"{text[: text.index(begin)]}{begin}\n{generated}\n{text[text.index(end) :]}"


def _results(profile: str) -> str:
    if not (store.results(profile) / "numbers").is_dir():
        return f"No results of the profile `{profile}` yet: `make paper PROFILE={profile}` fills this part in."
    found, table = numbers(profile), TABLES["methods"]
    setup = {name: found[f"setup/{name}/value"] for name in ("runs", "device", "epochs")}
    epochs = f"{setup['epochs']} epoch{'' if setup['epochs'] == '1' else 's'}"
    about = (
        f"Drawn from the {setup['runs']} runs of the profile `{profile}` on {setup['device']}: "
        f"{found['setup/train_tokens/si']} tokens of training text, {epochs}. Losses are nats per "
        "token of test text; intervals are at 95 % and hold seeds and sources, p is Holm-adjusted."
    )
    said = [f"- {sentence}" for stem in README_FINDINGS for sentence in findings(profile, stem)]
    held = outputs.analyses(store.grids(profile)).values()
    drawn = {stem for analysis in held for stem in analysis.figures}
    pictures = {
        stem: f"![{alt}](figures/{profile}/{stem}.png)" for stem, alt in README_FIGURES.items() if stem in drawn
    }
    parts = [about, markdown_table(table.columns, table.body(profile)), "\n".join(said)]
    parts += [pictures.pop("methods"), pictures.pop("objectives")]
    return "\n\n".join([*parts, *_studies(profile), *pictures.values()])


def _studies(profile: str) -> list[str]:
    """What each grid found on test text: who is better or worse than its reference, and by how much."""
    body, seeds, within = [], set(), []
    for analysis in outputs.analyses(store.grids(profile)).values():
        if analysis.grid and analysis.findings:
            stem = analysis.tables[0]
            found = rows(profile, f"{stem}_differences", {"split": "test"})
            told = {verdict: [row for row in found if row["verdict"] == verdict] for verdict in ("yes", "no")}
            cells = ["; ".join(f"{row['a']} ({_difference(float(row['difference']))})" for row in one) for one in told.values()]
            undecided = len(found) - sum(map(len, told.values()))
            seeds |= {row["runs"] for row in found}
            lengths = sorted(rows(profile, stem, {}), key=lambda row: float(row["tokens"]))
            tokens = dict.fromkeys(render("{tokens:si}", row) for row in (lengths[0], lengths[-1]))
            study = [f"`{analysis.grid}`", " to ".join(tokens), found[0]["b"]]
            body.append([*study, *(cell or "none" for cell in cells), str(undecided)])
            within += _equivalent(profile, stem) if f"{stem}_equivalence" in analysis.tables else []
    if not body:
        return []
    about = (
        f"Models that differ in one respect ({' or '.join(sorted(seeds))} seeds or groups of seeds each), against the reference of their "
        "study, paired by seed: who is shown to have the lower test loss, and who is shown not to (difference in nats per token, "
        "p ≤ 0.05 after Holm). Tokens: those that a student, or all members of an ensemble, were trained on, repeated or not."
    )
    table = markdown_table(["Study", "Tokens", "Reference", "Better", "Not better", "Undecided"], body)
    return [about, table, *within]


def _equivalent(profile: str, stem: str) -> list[str]:
    """Which cells of a grid are shown to have the test loss of its reference."""
    shown = rows(profile, f"{stem}_equivalence", {"measure": "nll", "verdict": "equivalent"})
    cells = "; ".join(row["a"] for row in shown)
    return [f"Within {shown[0]['margin']} nats of `{shown[0]['b']}`, by two one-sided tests: {cells}."] if shown else []


def _difference(nats: float) -> str:
    """Signed, with a digit that is not zero down to 0.001."""
    return f"{nats:+.2f}" if abs(nats) >= 0.01 else f"{nats:+.3f}"


def _benchmarks(path: Path) -> str:
    if not path.is_file():
        return "Not measured yet: `benchmarks/results.csv` is missing."
    with open(path, newline="", encoding="utf-8") as file:
        measured = list(csv.DictReader(file))
    body = [
        [row["what"], row["target"], f"{row['measured']} {row['unit']} ({row['detail']})", row["device"]]
        for row in measured
    ]
    return markdown_table(["What", "Target", "Measured", "Device"], body)
