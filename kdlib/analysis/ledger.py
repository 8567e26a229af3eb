"""What a run and everything it rests on took, by category: operations and seconds, each run upstream counted once.

Every run keeps its own ``work`` (:mod:`kdlib.study.work`). The cost of a method is the sum over the *union* of the runs
upstream of it: targets that four members read are written once, and a teacher that wrote them is trained once.
"""

from collections.abc import Iterator

import pandas as pd

from kdlib.errors import KdlibError
from kdlib.study import store
from kdlib.study.work import CATEGORIES, Work, total

# What a model or text cost to make; evaluation is what it cost to know about it.
MAKING = tuple(name for name in CATEGORIES if name != "evaluation")


def work(run: store.Run) -> Work:
    """What a run computed itself: category -> flops and seconds (None where they were not kept), 0 where there was none.

    Raises:
        KdlibError: the run was made before work was kept.
    """
    metrics = run.metrics
    if "work" not in metrics:
        raise KdlibError(
            f"The metrics of {run.id} must say what work it took (work), got none. Delete the folder {run.path} to have it made again."
        )
    return total(metrics["work"])


def upstream(profile: str, run: store.Run) -> list[store.Run]:
    """``run`` and all that it was made from, directly or not, each once: inputs before what reads them, ``run`` last.

    Scores may be missing (they only chose text) and are left out, with what they alone read.

    Raises:
        KdlibError: another one is missing from the profile's results.
    """
    found: dict[str, store.Run] = {}
    # Depth first without recursion: a chain of students may be long.
    waiting = [(run, False)]
    while waiting:
        one, done = waiting.pop()
        if done:
            found[one.id] = one
        elif one.id not in found:
            waiting.append((one, True))
            waiting += [(read, False) for read in _inputs(profile, one)]
    return list(found.values())


def cost(profile: str, run: store.Run, teacher_training: bool) -> pd.DataFrame:
    """What ``run`` took, all that lies upstream included: a row a category, columns flops and seconds.

    Args:
        teacher_training: whether the ``train`` of runs of kind teacher counts. A student that teaches another is a student,
            and its training always counts. What a model cost before it came here is in nobody's ledger.

    Returns:
        Seconds are NaN for a category in which a run's were not kept; everything is where scores are missing upstream.
    """
    runs = upstream(profile, run)
    whole = {one for each in runs for one in _named(each)} <= {one.id for one in runs}
    parts = [
        {name: entry for name, entry in work(one).items() if teacher_training or (one.kind, name) != ("teacher", "train")}
        for one in runs
    ]
    found = pd.DataFrame(total(*parts)).T.astype(float).rename_axis("category")
    return found if whole else found * float("nan")


def making(profile: str, run: store.Run) -> float:
    """FLOPs that making ``run`` took, all that lies upstream included but the training of teachers and all evaluation.

    Of a teacher it is its own training; NaN for one that was not trained here. NaN where scores are missing upstream.
    """
    if run.kind == "teacher":
        return float("nan") if run.metrics["training"] is None else float(work(run)["train"]["flops"])
    return float(cost(profile, run, teacher_training=False).flops[list(MAKING)].sum(skipna=False))


def _named(run: store.Run) -> dict[str, str]:
    """What a run read: id -> the name of the input."""
    inputs = run.settings["inputs"].items()
    return {one: name for name, value in inputs for one in ([value] if isinstance(value, str) else value)}


def _inputs(profile: str, run: store.Run) -> Iterator[store.Run]:
    for one, name in _named(run).items():
        if found := store.find(profile, one):
            yield found
        elif not one.startswith("scores-"):
            raise KdlibError(
                f"{run.id} must find its input {name} among the results of {profile!r}, got no run {one}. Finish them with: "
                f"make paper PROFILE={profile}"
            )
