"""What a student trains on: documents of a split, perhaps chosen, repeated, weighted or made up.

A *way* of choosing is a settings class in a module of this room: bagged, selected, clustered, generated, random_tokens. In a profile it is
``text: {way: settings}``, or its name alone where it needs none; ``text: corpus`` is the whole train split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from kdlib.study.parameters import problems

if TYPE_CHECKING:
    import numpy as np

    from kdlib.data.corpus import Split


@dataclass(frozen=True)
class TrainingText:
    """Documents to train on.

    Attributes:
        split: where they and their tokens are.
        documents: their ids, a repeated id repeatedly; None: all.
        weights: [positions] of ``split``, weight of a token's loss; None: all alike.
    """

    split: Split
    documents: list[str] | None = None
    weights: np.ndarray | None = None

    def windows(self, block_length: int) -> np.ndarray:
        """Windows of the documents, see :meth:`kdlib.data.corpus.Split.windows`."""
        return self.split.windows(block_length, self.documents)


@dataclass(frozen=True)
class Given:
    """What a way of choosing text may read.

    Attributes:
        train: the train split; tokenizer, block_length: of the corpus.
        seed: of the student.
        runs: those that the way asked for, by name.
        load: the model of a run.
    """

    train: Split
    tokenizer: Any
    block_length: int
    seed: int
    runs: dict[str, Any] = field(default_factory=dict)
    load: Callable[[Any], Any] | None = None


class Way(BaseModel):
    """Settings of one way of choosing text.

    Attributes:
        CACHED: whether cached targets, which are kept by document and position, describe the text.
        UNREAD: settings that count by the ids of the runs they name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    CACHED: ClassVar[bool] = True
    UNREAD: ClassVar[frozenset[str]] = frozenset()

    def inputs(self, student, plan) -> dict:
        """The runs that it reads, by name, asked for with a :class:`kdlib.study.plan.Planner`."""
        return {}

    def take(self, given: Given) -> TrainingText:
        """The text itself."""
        return TrainingText(given.train)


def up_to(wanted: float, tokens: np.ndarray, first: np.ndarray, more: Callable[[], np.ndarray]) -> np.ndarray:
    """Numbers of documents, from ``first`` on and then ``more`` as often as needed, until their tokens come nearest to ``wanted``.

    Args:
        tokens: [documents], of each; first, more(): numbers of documents in the order in which they are taken, at least one.
    """
    import numpy as np  # planning does without

    order = first
    while tokens[order].sum() < wanted:
        order = np.concatenate([order, more()])
    return order[: np.abs(tokens[order].cumsum() - wanted).argmin() + 1]


def ways() -> dict[str, type[Way]]:
    """The settings class of every way, by name."""
    from kdlib.data.bagged import Bagged
    from kdlib.data.clustered import Clustered
    from kdlib.data.generated import Generated
    from kdlib.data.random_tokens import Uniform, Unigram
    from kdlib.data.selected import Selected

    return {
        "corpus": Way,
        "bagged": Bagged,
        "selected": Selected,
        "clustered": Clustered,
        "generated": Generated,
        "uniform": Uniform,
        "unigram": Unigram,
    }


def way(text: str | dict) -> Way:
    """The settings behind ``text`` of a student.

    Raises:
        ValueError: no such way, or settings that it does not take.
    """
    if text == "corpus":
        return Way()
    name, settings = (text, {}) if isinstance(text, str) else next(iter(text.items()), ("", {}))
    if name not in ways() or isinstance(text, dict) and len(text) != 1:
        raise ValueError(f"text must be corpus or {{way: settings}} with a way of {', '.join(ways())}, got {text!r}")
    try:
        return ways()[name].model_validate(settings or {})
    except ValidationError as error:
        raise ValueError(f"text {name}: {problems(error, whole=name)}") from None


def identity(text: str | dict) -> str | dict:
    """What of ``text`` determines a result, but for the runs that it names."""
    found = way(text)
    values = found.model_dump(mode="json", exclude=set(found.UNREAD), exclude_none=True)
    name = text if isinstance(text, str) else next(iter(text))
    return {name: values} if values else name


def _checked(text: str | dict) -> str | dict:
    way(text)
    # One spelling of what needs no settings: an id must not see the other.
    return text if isinstance(text, str) or any(text.values()) else next(iter(text))


Text = Annotated[str | dict[str, Any], AfterValidator(_checked)]
