"""Histograms of how often what a model predicts comes true, and the calibration error that follows from them.

Reliability histograms have 15 equal-width bins, ((m−1)/15, m/15]. ``ece`` takes each position's top-1 probability
(Guo et al., On Calibration of Modern Neural Networks, 2017). ``full_ece`` takes all (token, probability) pairs and is
given *per position*, Σ_bins |Σ p − hits| / positions: V times the mean over pairs, which is near 0 for any model
since almost all pairs lie in the first bin.
"""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

BINS = 15
FIELDS = ("counts", "confidence_sums", "hits")  # of a reliability histogram


def count(histogram: Tensor, p: Tensor, hit: Tensor) -> None:
    """Add probabilities [n], and whether each came true, to a histogram: FIELDS x bins."""
    # A product with the one-hot bins sums in a fixed order; bincount with weights does not on a GPU.
    edges = torch.arange(1, BINS, dtype=p.dtype, device=p.device) / BINS
    bins = functional.one_hot(torch.bucketize(p, edges), BINS).double()
    histogram += torch.stack([torch.ones_like(p), p, hit.to(p)]).double() @ bins


def count_pairs(histogram: Tensor, scores: Tensor, targets: Tensor) -> None:
    """The same for all pairs of log-probabilities [c, V]: at most 14 of a row lie above the first bin, which gets the
    rest of the row's 1.
    """
    row, token = (scores > math.log(1 / BINS)).nonzero(as_tuple=True)
    upper, hit = scores[row, token].exp(), targets[row] == token
    count(histogram, upper, hit)
    histogram[0, 0] += scores.numel() - len(upper)
    histogram[1, 0] += len(scores) - upper.sum(dtype=torch.float64)
    histogram[2, 0] += len(scores) - hit.sum()


def ece(counts: ArrayLike, confidence_sums: ArrayLike, hits: ArrayLike, total: float | None = None) -> float:
    """Expected calibration error from a reliability histogram: Σ_bins |Σ confidence − hits| / ``total`` (Σ counts).

    With top-1 confidences this is Σ n_b/n·|accuracy_b − confidence_b| (Guo et al., On Calibration of Modern Neural
    Networks, 2017, equation 3). Over all (token, probability) pairs, give ``total`` = the number of *tokens* to get
    the error per token.
    """
    total = np.asarray(counts).sum() if total is None else total
    return float(np.abs(np.asarray(confidence_sums) - np.asarray(hits)).sum() / total)
