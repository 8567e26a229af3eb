"""The work of a run, by category: what it computed itself, in operations of matrix products and in seconds.

A run's ``work`` is ``{category: {"flops": int, "seconds": float | None}}``:

- ``train``: forward and backward passes of the model that is trained, and passes of frozen ones that its loss pools it with.
- ``teacher_forward``: the teacher's passes for soft targets, cached or in the loop; of cached dense targets, the output
  layer that each step applies anew.
- ``generation``: text sampled from a teacher.
- ``scoring``: text read only to choose from it.
- ``evaluation``: everything that measures, validation along the way included.

Each second is in one category: a teacher asked within a step is timed with the step, under ``train``. None means that
the seconds were not kept. What inputs of the run took is theirs; :mod:`kdlib.analysis.ledger` adds it.
"""

CATEGORIES = ("train", "teacher_forward", "generation", "scoring", "evaluation")
Entry = dict[str, int | float | None]
Work = dict[str, Entry]


def entry(flops: int, seconds: float | None = 0.0) -> Entry:
    """One category's share of a run's work."""
    return {"flops": int(flops), "seconds": seconds}


def total(*parts: Work) -> Work:
    """The sum of several works, with every category; seconds are None where a part's are."""
    return {category: _sum([part[category] for part in parts if category in part]) for category in CATEGORIES}


def _sum(entries: list[Entry]) -> Entry:
    seconds = [one["seconds"] for one in entries]
    return entry(sum(one["flops"] for one in entries), None if None in seconds else float(sum(seconds)))
