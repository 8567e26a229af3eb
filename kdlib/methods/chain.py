"""A chain: every member learns from the one before it."""

from kdlib.methods import Taught
from kdlib.study.plan import Step


class Chain(Taught):
    """Born-again networks (Furlanello et al. 2018, arXiv 1805.04770): student k is taught by student k - 1.

    The first is the profile's student, taught by the profile's teacher.
    """

    def teacher(self, before: list[Step]) -> Step:
        """The member before."""
        return before[-1]
