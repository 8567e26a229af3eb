"""What models are worth: metrics of a model or a pool, and how near students come to their teacher."""

import math

TEMPERATURES = (0.05, 20.0)  # range in which a calibration temperature is fitted


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature lies at an end of its range: then no temperature calibrates the model."""
    return any(math.isclose(temperature, bound, rel_tol=1e-4) for bound in TEMPERATURES)
