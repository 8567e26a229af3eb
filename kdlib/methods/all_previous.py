"""All previous: every member learns from the pool of the members before it."""

from kdlib.methods.chain import Chain
from kdlib.study.plan import Step


class AllPrevious(Chain):
    """Born-again networks whose teacher is the ensemble so far: student k is taught by the probability pool of 1 to k - 1.

    Furlanello et al. 2018 (arXiv 1805.04770) pool the generations in the end; here the pool teaches, too. Targets of a pool are
    kept like a model's, but for kind dense. The pool of one member is that member: two members are a chain of two.
    """

    def teacher(self, before: list[Step]) -> Step | list[Step]:
        """The members before, as one pool."""
        return before if len(before) > 1 else before[0]
