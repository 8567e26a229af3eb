"""Ways to form an ensemble, one module each: which runs are its members, and how each differs from the profile's student.

A module holds one class of the module's name in capitals, such as ``Bagging`` in ``bagging``, whose fields are the method's
options. A profile asks for it by the module's name (``study: methods``), and so does ``05_ensemble`` (``method``).
"""

import pkgutil
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdlib.errors import KdlibError
from kdlib.study.parameters import Seeds, problems
from kdlib.study.plan import Planner, Step


class Method(BaseModel, ABC):
    """A way to form an ensemble."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    seeds: Seeds = Field(min_length=1, description="one member a seed")
    student: dict[str, Any] = Field({}, description="what sets all members apart from the profile's student section")

    @abstractmethod
    def members(self, plan: Planner) -> list[Step]:
        """The member runs, in order."""

    def student_on(self, text: str | dict[str, Any]) -> dict[str, Any]:
        """The student's settings with the text that the method gives it.

        Raises:
            KdlibError: they name a text of their own.
        """
        if "text" in self.student:
            raise KdlibError(f"text of student must be left out, since the method chooses it, got {self.student['text']}.")
        return self.student | {"text": text}


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, **options: Any) -> Method:
    """The method of that name with its options.

    Raises:
        KdlibError: there is none, or it does not take these options.
    """
    if name not in names():
        raise KdlibError(f"method must be one of {', '.join(names())}, got {name!r}.")
    found = getattr(import_module(f"{__name__}.{name}"), name.title().replace("_", ""))
    try:
        return found.model_validate(options)
    except ValidationError as error:
        allowed = ", ".join(name for name in found.model_fields if name not in Method.model_fields) or "none"
        raise KdlibError(f"Options of method {name} must be among {allowed}, got {problems(error)}.") from None
