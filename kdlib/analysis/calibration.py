"""Expected calibration error from a reliability histogram: what chance alone would show, and what is left beyond it.

Σ |confidence − accuracy| over bins is above 0 for a perfectly calibrated model too, since the accuracy of a bin is that of
finitely many tokens. How much above is its floor; two models that differ by less are not told apart.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr


def debiased(histogram: Mapping[str, ArrayLike]) -> float:
    """The ECE without what chance adds: 0 on average for a calibrated model, so that it can be below 0.

    The plain estimate takes the sign of a bin's gap from the gap itself, noise and all. Split at random into two halves of its
    tokens, one half can tell the sign and the other the size, independently; the mean over such splits is, with noise of standard
    deviation σ about the gap d, d·(2Φ(d/σ) − 1) − 2σφ(d/σ). (Kumar et al., Verified Uncertainty Calibration, NeurIPS 2019,
    debias by subtracting an estimate of the mean excess; at 0 that leaves more than half of it. Splitting a normal variable into
    independent parts: Neufeld et al., JMLR 25, 2024.)

    Args:
        histogram: counts, confidence_sums and hits of each bin.
    """
    gap, noise, total = _gaps(histogram)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(gap == 0, 0.0, gap / noise)
    density = np.exp(-(ratio**2) / 2) / np.sqrt(2 * np.pi)
    return float((gap * (2 * ndtr(ratio) - 1) - 2 * noise * density).sum() / total)


def floor(histogram: Mapping[str, ArrayLike]) -> float:
    """The ECE that a calibrated model with the same confidences shows on average, were tokens independent of one another."""
    _, noise, total = _gaps(histogram)
    return float(np.sqrt(2 / np.pi) * noise.sum() / total)


def error_of_tokens(histogram: Mapping[str, ArrayLike]) -> float:
    """Standard error of the mean gap between confidence and accuracy, were tokens independent of one another."""
    _, noise, total = _gaps(histogram)
    return float(np.sqrt((noise**2).sum()) / total)


def _gaps(histogram: Mapping[str, ArrayLike]) -> tuple[np.ndarray, np.ndarray, float]:
    # Σ(confidence − hit) of each bin, and its standard deviation if hits come as often as they are expected.
    counts, sums, hits = (np.asarray(histogram[name], dtype=np.float64) for name in ("counts", "confidence_sums", "hits"))
    confidence = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return sums - hits, np.sqrt(counts * confidence * (1 - confidence)), counts.sum()
