"""Divergences as a setting: their names, their options, and which targets can serve them. No torch."""

from typing import Annotated, Any

from pydantic import AfterValidator

from kdlib.errors import KdlibError

# Those that need all of the teacher's distribution but the mass of a tail, and those that need its logits; forward KL needs
# no more than unbiased draws. kdlib.losses.divergences says why.
ON_OUTCOMES = (
    "reverse_kl",
    "jeffreys",
    "jsd",
    "skewed_kl",
    "skewed_reverse_kl",
    "tvd",
)
ON_LOGITS = ("logit_mse", "sinkhorn", "mutual_information")
GROUPED = ("sinkhorn", "mutual_information")  # compare tokens with one another
NAMES = ("forward_kl", *ON_OUTCOMES, *ON_LOGITS)
SERVED = {"topk": ("forward_kl", *ON_OUTCOMES), "dense": NAMES}  # by kind of targets; others serve forward_kl alone
# What an option must be, in words and as a test. The losses refuse the same values, but only in the run.
_INSIDE = ("between 0 and 1, both excluded", lambda value: 0 < value < 1)
_ABOVE = ("above 0", lambda value: value > 0)
_COUNT = ("a whole number, 1 or more", lambda value: isinstance(value, int) and value >= 1)
_GROUP = ("a whole number, 2 or more", lambda value: isinstance(value, int) and value >= 2)
OPTIONS = {
    "jsd": {"beta": _INSIDE},
    "skewed_kl": {"alpha": _INSIDE},
    "skewed_reverse_kl": {"alpha": _INSIDE},
    "sinkhorn": {"group": _COUNT, "regularisation": _ABOVE, "iterations": _COUNT},
    "mutual_information": {"group": _GROUP, "critic_temperature": _ABOVE},
}


def as_pair(divergence: str | dict) -> tuple[str, dict[str, Any]]:
    """Name and options of a divergence, however it was spelled."""
    return (divergence, {}) if isinstance(divergence, str) else next(iter(divergence.items()), ("", {}))


def _checked(divergence: str | dict) -> str | dict:
    name, options = as_pair(divergence)
    if name not in NAMES or isinstance(divergence, dict) and len(divergence) != 1:
        raise ValueError(f"must be one of {', '.join(NAMES)}, got {divergence!r}")
    allowed = OPTIONS.get(name, {})
    for option, value in (options or {}).items():
        if option not in allowed:
            raise ValueError(f"options of {name} must be among {', '.join(allowed) or 'none'}, got {option}")
        expected, holds = allowed[option]
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            raise ValueError(f"{option} of {name} must be {expected}, got {value}")
    return {name: options} if options else name


Divergence = Annotated[str | dict[str, Any], AfterValidator(_checked)]


def refuse_unserved(divergence: str | dict, kind: str) -> None:
    """Refuse targets of a kind that does not hold what the divergence compares.

    Raises:
        KdlibError: it names the kinds that do.
    """
    name, _ = as_pair(divergence)
    if name not in SERVED.get(kind, ("forward_kl",)):
        able = [one for one, names in SERVED.items() if name in names]
        raise KdlibError(
            f"Targets of divergence {name} must be of kind {' or '.join(able)}, got {kind}. Set targets={{kind: {able[0]}}}, "
            "objective=online_kd or divergence=forward_kl."
        )
