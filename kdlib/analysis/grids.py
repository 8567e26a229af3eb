"""What is special of each grid of students or ensembles: what it asks, the reference, the columns of its table, the panels of its figure.

A description is data alone, so that whoever lists analyses imports neither matplotlib nor scipy. What a panel draws is in
:mod:`kdlib.analysis.panels`, how students are measured and chosen in :mod:`kdlib.analysis.studies`.
"""

from dataclasses import dataclass, field, replace

from kdlib.study import store

STUDENT = {"Student": "{cell}", "Runs": "{runs}", "Tokens": "{tokens:si}", "NLL": "{nll:.3f}"}
QUALITY = {"Calibrated NLL": "{nll_calibrated:.3f}", "ECE": "{ece:.3f}", "Accuracy": "{accuracy:.3f}"}
OOD = {"Out of domain": "{ood_nll:.3f}"}
SPEED = {"Tokens/s": "{tokens_per_second:si}"}
WORK = {"Training FLOPs": "{flops:si}"}
ENSEMBLE = {"Ensemble": "{cell}", "Groups": "{runs}", "NLL": "{nll:.3f}", "Members on average": "{member_nll:.3f}"}
ENSEMBLE |= {"Ambiguity": "{ambiguity:.3f}"} | OOD | QUALITY | {"ECE, calibrated": "{ece_calibrated:.3f}"}
ENSEMBLE |= {"FLOPs / reference": "{relative_flops:.2f}"}
_CALIBRATION = {"calibrated": "{nll_calibrated:.3f}", "ece": "{ece:.3f}"}


@dataclass(frozen=True)
class Grid:
    """How a grid is analysed; the defaults are for one that is not known by its name.

    Args:
        stem: its tables are ``<stem>.csv``, ``<stem>_runs.csv`` and ``<stem>_differences.csv``, its figure is ``<stem>``.
        about: its question, and what the reader should know of its columns and panels.
        settings: parameters of the students that are columns of its tables.
        constant: the reference is chosen on validation text among the cells that have a value for each of these parameters;
            without any it is the first cell.
        shares: its students share one teacher, and a column ``share`` tells how much of its accuracy each reaches.
        student: what sentences call the student of a cell.
        columns: heading → format string over the columns of ``<stem>.csv``.
        numbers: numbers of the paper that each cell gives: name → format string.
        panels: what the figure shows, from left to right, by the names of :data:`kdlib.analysis.panels.PANELS`.
        widths: of the panels, relative to one another.
        growth: whether it is also told what every further member adds (``14_growth``); its cells are ensembles.
    """

    stem: str
    about: str = (
        "**How do students that differ in one respect compare?** The profile says what sets each apart. The figure: the test loss, "
        "a grey dot a student, and its differences from the reference on test and out-of-domain text."
    )
    settings: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    shares: bool = False
    student: str = "student “{}”"
    columns: dict[str, str] = field(default_factory=lambda: STUDENT | OOD | QUALITY | WORK | SPEED)
    numbers: dict[str, str] = field(default_factory=lambda: {"ood": "{ood_nll:.3f}"} | _CALIBRATION)
    panels: tuple[str, ...] = ("loss", "difference in domain", "difference out of domain")
    widths: tuple[float, ...] = (1, 1.2, 1.2)
    growth: bool = False


_ENSEMBLES = Grid(
    stem="",
    about="**How do ensembles that differ in one respect compare?** The profile says what sets each apart; groups are of unlike seeds. "
    "FLOPs are all that making an ensemble took, scoring and written text included, but the teacher's training. The figure: "
    "differences from the reference, group by group, on test and out-of-domain text.",
    student="ensemble “{}”",
    columns=ENSEMBLE,
    numbers=_CALIBRATION | {"ood": "{ood_nll:.3f}", "ambiguity": "{ambiguity:.3f}", "accuracy": "{accuracy:.3f}"},
    panels=("difference in domain", "difference out of domain"),
    widths=(1, 1),
)
KNOWN = {
    "weights": Grid(
        stem="kd_weight",
        about="**How much should a student listen to its teacher, how softly, and when?** `kd_weight` shares a student's loss between "
        "the teacher and the text, the temperature softens what the teacher says, and a schedule moves the weight while the student "
        "trains. The reference is the constant weight and temperature with the lowest mean *validation* loss; what is reported of it "
        "is *test* text, which had no say. The figure: darker is better, a weight of 0 is cross-entropy, which knows no temperature, "
        "and the chosen constant is outlined; at the right what else was tried, against it.",
        settings=("objective", "kd_weight", "temperature"),
        constant=("kd_weight", "temperature"),
        student="student with {}",
        columns=STUDENT | {"Validation NLL": "{validation_nll:.3f}", "Chosen": "{chosen}"} | QUALITY,
        numbers={"validation": "{validation_nll:.3f}", "ece": "{ece:.3f}", "chosen": "{chosen}"},
        panels=("constants", "others"),
        widths=(1.3, 1),
    ),
    "losses": Grid(
        stem="losses",
        about="**Which divergence from the teacher should a student minimise, and what does it cost?** Students that see the same text "
        "and the same distributions differ only in how the distance between teacher and student is measured. Calibrated: with one "
        "temperature fitted on calibration text, which undoes most of what a divergence does to confidence alone. The figure: the "
        "difference from the reference, the calibration error and the training speed, a grey dot a student.",
        student="student with {}",
        columns=STUDENT | QUALITY | SPEED,
        numbers=_CALIBRATION,
        panels=("difference", "calibration", "speed"),
        widths=(1.3, 1, 1),
    ),
    "features": Grid(
        stem="features",
        about="**Is there more to learn from a teacher than its predictions?** Students that learn from its logits alone are set "
        "against students that learn from its hidden states or attention as well, or instead. FLOPs hold the student's passes and the "
        "teacher's; the feature loss itself shows in the speed. The figure: the difference from the reference, and what it costs, a "
        "grey dot a student.",
        student="student with {}",
        columns=STUDENT | QUALITY | WORK | SPEED,
        numbers=_CALIBRATION | {"speed": "{tokens_per_second:si}"},
        panels=("difference", "speed"),
        widths=(1.4, 1),
    ),
    "initialisation": Grid(
        stem="initialisation",
        about="**Is it worth starting from the teacher's weights?** A student can begin at random, with the teacher's embeddings, with "
        "every second of its layers, or as the teacher itself. Those of another depth are set against the reference too: their "
        "parameters stand beside them. The figure: a grey dot a student, a tick their mean; dotted the teacher, dashed one per cent "
        "below its accuracy.",
        shares=True,
        columns=STUDENT | QUALITY | {"Of the teacher's": "{share:.1%}", "Parameters": "{parameters:si}"},
        numbers={"accuracy": "{accuracy:.3f}", "share": "{share:.1%}", "parameters": "{parameters:si}"},
        panels=("loss beside the teacher's", "share"),
        widths=(1, 1),
    ),
    "data": Grid(
        stem="data",
        about="**Which text is worth distilling on?** Students see the same number of tokens, repeats included, but not the same text: "
        "documents that are hard or easy for the teacher or for a student, other mixes of domains, text that the teacher wrote, or "
        "none that anybody wrote. The figure: differences from the reference on test and out-of-domain text; an arrow is a student "
        "outside the axis, its number is at the right all the same.",
        columns=STUDENT | OOD | QUALITY,
        numbers={"ood": "{ood_nll:.3f}", "tokens": "{tokens:si}"},
        panels=("difference in domain", "difference out of domain"),
        widths=(1, 1),
    ),
    "leaderboard": replace(
        _ENSEMBLES,
        stem="leaderboard",
        about="**Which way of forming an ensemble is worth it at equal compute?** Groups of students that are formed in unlike ways, "
        "against independent ones. FLOPs are all that making an ensemble took, scoring and written text included, but the teacher's "
        "training: where they are not one times the reference's, compute is not equal. All share the student's settings, which were "
        "not tuned for any method. Of the gain: how far the loss is below that of the reference's members on average, as a share of what "
        "their pool is. The figure: differences from the reference on test and out-of-domain text.",
        columns=ENSEMBLE | {"Of the gain": "{gain:.0%}"},
        numbers=_ENSEMBLES.numbers | {"gain": "{gain:.0%}"},
    ),
    "chain": replace(
        _ENSEMBLES,
        stem="chain",
        about="**Who should teach the next member?** Nobody but the profile's teacher (independent), the member before it (chain), the "
        "first (star), or the pool of all before it (all previous). The figure: differences from independent members on test and "
        "out-of-domain text. What every further member adds is told by `14_growth`.",
        growth=True,
    ),
    "pools": replace(
        _ENSEMBLES,
        stem="pools",
        about="**How should members be combined, and does it matter how many there are?** The same members, averaged as probabilities, "
        "as logits, or with weights fitted to calibration text. The figure: test loss against the number of members, as it is and "
        "with the temperature that fits calibration text best.",
        panels=("size", "size, calibrated"),
    ),
    "routing": replace(
        _ENSEMBLES,
        stem="routing",
        about="**Are members that know one kind of text each worth routing to?** Members that learned most from one cluster of documents "
        "each (c-BTM), combined by routers or alike, against random clusters and against one student on as many tokens. The figure: "
        "differences from the reference on test and out-of-domain text, and by domain.",
        panels=("difference in domain", "difference out of domain", "domains"),
        widths=(1, 1, 1.1),
    ),
    "sweeps": replace(
        _ENSEMBLES,
        stem="sweeps",
        about="**How much does a method's own setting matter?** Bagging, boosting, negative correlation and snapshots at other settings "
        "than the leaderboard's, and independent members that differ in initialisation or in the order of their text alone. The figure: "
        "differences from the reference on test and out-of-domain text.",
    ),
    "tuning": replace(
        _ENSEMBLES,
        stem="tuning",
        about="**Are settings that suit one student those that suit an ensemble of them?** Epochs and weight decay of one student, and of "
        "members. What is chosen is chosen by the validation loss, which stands in the table. The figure: differences from the "
        "reference on test and out-of-domain text.",
        columns=ENSEMBLE | {"Validation NLL": "{validation_nll:.3f}"},
    ),
}


def describe(name: str, formed: bool = False) -> Grid:
    """How the grid called ``name`` is analysed: as one of :data:`KNOWN`, else by default; ``formed``: its cells are ensembles.

    Grids of a profile's own keep their tables under ``<name>_grid``, which no other analysis writes.
    """
    if name in KNOWN:
        return KNOWN[name]
    return replace(_ENSEMBLES, stem=f"{name}_grid") if formed else Grid(stem=f"{name}_grid")


def of(profile: str, name: str) -> Grid:
    """How a grid that the profile's results hold is analysed.

    Raises:
        KdlibError: the profile was never run here.
    """
    return describe(name, bool(store.formed(profile, name)))
