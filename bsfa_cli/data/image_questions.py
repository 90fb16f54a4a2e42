"""A benchmark's own questions about images, judged by which candidate a vision-language model finds likeliest.

    plan = ImagePlan(ImageData.of("lvb_val.json", root), questions=50, length=32768)
    plan.check()                                      # without a model
    for question in plan.questions_for(processor): question.asked().prompt, question.weigh(log_likelihoods)

What such files hold, and what of it can be judged so: multimodal/scoring.py. A question is asked behind other samples
of its files, answered, as many as fit into `length`; by itself where there is none. Open questions get candidates from
the answers of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from .images import ImageData
from .samples import MultimodalSample

if TYPE_CHECKING:
    from ..metrics.answers import Chosen
    from .multimodal.scoring import Asked

CANDIDATES = 4  # of an open question


@dataclass(frozen=True)
class ImageQuestion:
    """`sample`, asked behind others drawn from `pool`, in all at most `length` tokens; by itself, in at most `most`,
    where that is None.
    """

    sample: MultimodalSample
    pool: Sequence[MultimodalSample]
    processor: object
    length: int | None
    most: int | None = None
    depth: int | None = None

    @property
    def task(self) -> str:
        return self.sample.metadata["task"]

    def asked(self) -> Asked:
        """The prompt and the tokens of its candidates; images are read now. Raises InputError for what cannot be
        read, and for a question that is longer than `length` by itself.
        """
        from .multimodal.scoring import ask, behind

        if self.length is not None:
            return behind(self.processor, self.sample, self.pool, self.length)
        asked = ask(self.processor, self.sample)
        tokens = len(asked.prompt.tokens) + max(map(len, asked.continuations))
        if self.most is not None and tokens > self.most:
            raise InputError(
                f"{self.sample.metadata['source']}: question and answer have {tokens:,} tokens, past the model's "
                f"{self.most:,} positions (max_position_embeddings)"
            )
        return asked

    def weigh(self, likelihoods: Sequence[float], lengths: Sequence[int]) -> Chosen:
        """The candidate of these log-likelihoods and tokens that is chosen, and how right it is."""
        from .multimodal.scoring import score

        return score(self.sample, likelihoods, lengths)


@dataclass(frozen=True)
class ImagePlan:
    """Up to `questions` of each task in the files of `data`, in an order that `seed` draws."""

    data: ImageData
    questions: int
    length: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise, without a model, for files that cannot be used or hold nothing that can be judged."""
        if self.data.repeat:
            raise UsageError("--repeat-data packs texts; questions are asked once each, so drop it")
        self.data.annotations.check()
        _ = self.drawn

    @cached_property
    def drawn(self) -> list[MultimodalSample]:
        """The samples to ask about. Raises InputError where there is none with an answer and candidates."""
        from .multimodal.scoring import with_candidates

        taken: Counter[str] = Counter()
        found = []
        for sample in with_candidates(list(self.data.annotations.samples(self.seed)), CANDIDATES, self.seed):
            task = sample.metadata["task"]
            if len(sample.metadata.get("options", ())) > 1 and taken[task] < self.questions:
                taken[task] += 1
                found.append(sample)
        if not found:
            raise InputError(f"{self.data} holds no question with an answer and other candidates")
        return found

    def questions_for(self, processor, most: int | None = None) -> Iterator[ImageQuestion]:
        """`most`: positions that the model has."""
        everything = [sample for sample in self.data.annotations.samples(self.seed + 1) if sample.answer]
        for sample in self.drawn:
            yield ImageQuestion(sample, everything, processor, self.length, most)
