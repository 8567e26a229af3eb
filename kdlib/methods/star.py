"""A star: every member learns from the first."""

from kdlib.methods.chain import Chain
from kdlib.study.plan import Step


class Star(Chain):
    """Students of one student: the control of a chain that keeps its teacher.

    As many members are taught by a student as in :class:`kdlib.methods.chain.Chain` (Furlanello et al. 2018, arXiv
    1805.04770), but none is more than one step from the first, which the profile's teacher taught.
    """

    def teacher(self, before: list[Step]) -> Step:
        """The first member."""
        return before[0]
