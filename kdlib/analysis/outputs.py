"""Which analyses a profile has, and what each writes."""

from collections.abc import Iterable
from dataclasses import dataclass

from kdlib.analysis import grids


@dataclass(frozen=True)
class Analysis:
    """A notebook that reads results, for one grid where it takes one, and what it writes.

    Args:
        tables: ``results/<profile>/<table>.csv``.
        figures: ``figures/<profile>/<figure>.{pdf,png}``, each of which has a table of its name.
        grid: the grid of the profile that it reads, if it reads one.
    """

    notebook: str
    tables: list[str]
    figures: list[str]
    grid: str | None = None

    @property
    def name(self) -> str:
        """What its numbers are kept under: the notebook's name, with the grid for :data:`GRID_NOTEBOOKS`."""
        return f"{self.notebook}_{self.grid}" if self.notebook in GRID_NOTEBOOKS else self.notebook

    @property
    def arguments(self) -> list[str]:
        """What ``kdlib run`` is told, beside the profile, to run it."""
        setting = ["--set", f"grid={self.grid}"] if self.notebook in GRID_NOTEBOOKS else []
        return [f"notebooks/{self.notebook}.ipynb", *setting]

    @property
    def findings(self) -> list[str]:
        """Its tables whose rows are sentences: what it found."""
        return [stem for stem in self.tables if stem.endswith("_differences")]


GRID_NOTEBOOK, GROWTH_NOTEBOOK = "21_grid", "14_growth"
GRID_NOTEBOOKS = (GRID_NOTEBOOK, GROWTH_NOTEBOOK)
# The analyses of a profile's comparison, and that of the one grid with a notebook of its own.
COMPARISON = [
    Analysis(
        "10_objectives",
        ["objectives", "objectives_seeds", "objectives_differences", "learning_curves"],
        ["objectives", "learning_curves"],
    ),
    Analysis("12_methods", ["methods", "methods_differences"], ["methods"]),
    Analysis("15_calibration", ["calibration", "reliability"], ["reliability"]),
    Analysis("17_cost", ["runs", "setup", "corpus", "vocabulary", "cost"], ["cost"]),
]
TARGETS = Analysis("11_target_fidelity", ["targets", "targets_runs", "targets_differences", "targets_equivalence"], ["targets"], "targets")


def analyses(held: Iterable[str]) -> dict[str, Analysis]:
    """The analyses of a profile whose results hold these grids, by their names."""
    held = list(held)
    found = [*COMPARISON, TARGETS] if TARGETS.grid in held else COMPARISON
    found = sorted(found, key=lambda one: one.notebook)
    for grid in sorted(held, key=[*grids.KNOWN, *held].index):
        if grid != TARGETS.grid:
            about = grids.describe(grid)
            stem = about.stem
            found.append(Analysis(GRID_NOTEBOOK, [stem, f"{stem}_runs", f"{stem}_differences"], [stem], grid))
            if about.growth:
                found.append(Analysis(GROWTH_NOTEBOOK, [f"{stem}_growth"], [f"{stem}_growth"], grid))
    return {one.name: one for one in found}
