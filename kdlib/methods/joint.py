"""Joint: the pool of all members is trained as one model, and no member for itself."""

from typing import ClassVar

from kdlib.methods.ncl import Ncl


class Joint(Ncl):
    """End-to-end training of an ensemble (Webb et al. 2020, "To ensemble or not ensemble: when does end-to-end training fail?", arXiv
    1902.04422): negative correlation learning with the coupling at its end.
    """

    coupling: ClassVar[float] = 1.0
