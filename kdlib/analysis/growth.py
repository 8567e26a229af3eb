"""How ensembles grow: the loss of each member, and of the pool of all up to it, from what members kept of the text.

A probability pool needs no more than each member's log-probability of the token that came, which every evaluation keeps: no
model runs here. Other pools need whole distributions, and are ensembles of their own in a grid.
"""

import numpy as np
import pandas as pd

from kdlib.analysis import statistics
from kdlib.errors import KdlibError
from kdlib.study import store


def growth(profile: str, grid: str, split: str) -> pd.DataFrame:
    """The loss of each member and of the probability pool of the first k, a row for each ensemble of a grid and k.

    Columns: cell, seed (number of the group of seeds), size (k), nll (of the k-th member, nats a token), pool_nll.

    Raises:
        KdlibError: the results hold no such grid, its cells are students, or not all of its runs are there.
    """
    formed, kept, rows = store.formed(profile, grid), {}, []
    if not formed:
        raise KdlibError(f"Cells of grid {grid!r} must be ensembles, whose members can be counted, got students.")
    for cell, runs in store.cells(profile, grid).items():
        for seed, run in enumerate(runs, 1):
            for one in formed[run.id]:
                if one not in kept:
                    kept[one] = np.load(run.beside(one).path / "target_logprobs.npz")[split].astype(np.float64)
            members = np.stack([kept[one] for one in formed[run.id]])
            for size in range(1, len(members) + 1):
                pooled = -statistics.pool_target_logprobs(members[:size]).mean()
                rows.append({"cell": cell, "seed": seed, "size": size, "nll": -members[size - 1].mean(), "pool_nll": pooled})
    return pd.DataFrame(rows)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means of :func:`growth` over groups of seeds, a row for each cell and size, with standard errors, NaN for one group."""
    found = table.groupby(["cell", "size"], sort=False)[["nll", "pool_nll"]]
    errors = found.sem().rename(columns={"nll": "standard_error", "pool_nll": "pool_standard_error"})
    return found.mean().join(errors).assign(runs=found.size()).reset_index()
