"""Text that a model wrote, as a train split like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from kdlib.data.corpus import Split, separator_id
from kdlib.data.random_tokens import as_split, check_size
from kdlib.data.text import Given, TrainingText, Way
from kdlib.errors import KdlibError
from kdlib.study.progress import bar
from kdlib.study.refs import Ref

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


class Generated(Way):
    """As many tokens as the train split has, or a share of that, sampled from the model of a run."""

    CACHED: ClassVar = False
    UNREAD: ClassVar = frozenset({"by"})

    by: Ref | None = Field(None, description="the run that writes; None: the student's teacher")
    temperature: float | None = Field(None, gt=0, le=100, description="of the sampling; None: 1")
    top_p: float | None = Field(None, gt=0, le=1, description="draw from the smallest set of tokens with this probability")
    seed: int | None = Field(None, ge=0, description="of the sampling; None: the student's")
    share: float | None = Field(None, gt=0, le=1, description="tokens written, as a share of the train split's; None: 1")

    def inputs(self, student, plan) -> dict:
        """The run that writes the text."""
        return {"writer": plan.resolve(student.teacher if self.by is None else self.by)}

    def take(self, given: Given) -> TrainingText:
        """Documents of at most a row each."""
        writer, tokens = given.load(given.runs["writer"]), round(given.train.documents.tokens.sum() * (self.share or 1.0))
        # A step of generation takes a GPU as long for few documents as for many.
        rows, temperature = 32 if writer.device.type == "cpu" else 512, self.temperature or 1.0
        seed = given.seed if self.seed is None else self.seed
        made = sampled(writer, given.tokenizer, tokens, given.block_length, seed, temperature, self.top_p, batch_size=rows)
        return TrainingText(made)


def sampled(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    length: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    batch_size: int = 32,
) -> Split:
    """Sample documents from a teacher, prompted with the separator only and ended by the next separator.

    A document of ``length`` is ended there. None is empty: the separator is never the first token. The text depends on
    ``seed``, ``batch_size`` and the type of device; the global random state and the teacher, including its generation
    settings, are left unchanged.

    Args:
        tokens: predicting positions in all. The last document is cut to reach them exactly, or to one more where only
            a separator would be left of it.
        length: most predicting positions of a document.
        temperature: of the sampling; 1 is the teacher's own distribution.
        top_p: draw from the smallest set of tokens with this probability (Holtzman et al. 2020, "The curious case of
            neural text degeneration"); None draws from all.
        batch_size: documents sampled at a time.

    Raises:
        KdlibError: fewer than 2 tokens, a length below 8 or beyond the teacher's context, a temperature or top_p out of
            range.
    """
    check_size(tokens, length)
    context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or length
    if length > context:
        raise KdlibError(f"`length` must be at most the teacher's context of {context} tokens, got {length}. Lower it.")
    if not temperature > 0 or not (top_p is None or 0 < top_p <= 1):
        raise KdlibError(
            f"`temperature` must be above 0 and `top_p` above 0 and at most 1, or None, got {temperature} and {top_p}."
        )
    import torch
    from transformers import GenerationConfig

    separator = separator_id(tokenizer)
    settings = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_k=0,  # the default of transformers is 50
        top_p=1.0 if top_p is None else float(top_p),
        min_new_tokens=1,
        max_new_tokens=length - 1,
        eos_token_id=separator,
        pad_token_id=separator,
    )
    prompt = torch.full((batch_size, 1), separator, device=teacher.device)
    documents, left = [], tokens
    with _generating(teacher, settings, seed), bar(None, "sampling text", total=tokens, unit="token") as progress:
        while left > 0:
            for row in teacher.generate(prompt, attention_mask=torch.ones_like(prompt))[:, 1:].cpu().numpy():
                ended = np.append(row, separator).tolist().index(separator)
                documents.append(row[: min(ended, max(1, left - 1))])
                left -= len(documents[-1]) + 1
                progress.update(len(documents[-1]) + 1)
                if left <= 0:
                    break
    return as_split("sampled", documents, tokenizer)


@contextmanager
def _generating(teacher: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """The teacher in evaluation mode with these settings alone (its own would fill the gaps), and a random state apart."""
    import torch

    own, training = teacher.generation_config, teacher.training
    teacher.generation_config = settings
    teacher.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield
    finally:
        teacher.generation_config = own
        teacher.train(training)
