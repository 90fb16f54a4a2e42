"""What `bsfa verify --tasks` asks: tasks by name, a file of questions, or annotation files of images.

Each kind is checked, counted and asked about its depths without a model, and then gives its questions for one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError
from . import plans, question_files
from .images import ImageData
from .questions import TextQuestion

if TYPE_CHECKING:
    from ..models.load import LoadedModel


class QuestionSet(ABC):
    """`spec` is what --tasks says, `more` how the user gets more questions than its `len`, `longest` the tokens of a
    question at most, where the user sets them.
    """

    spec: str
    more: str = "raise --questions"
    longest: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def check(self, saved: bool) -> None:
        """Raise, without a model, for what cannot be asked, or not be written where it is to be `saved`."""

    @abstractmethod
    def has_depths(self) -> bool:
        """Whether any question is asked at a depth."""

    @abstractmethod
    def questions_for(self, loaded: LoadedModel, seed: int) -> list:
        """Raises UsageError and InputError for a model that cannot be asked them."""

    def written(self, asked: Sequence, loaded: LoadedModel, seed: int) -> Iterator[TextQuestion]:
        """`asked`, of `questions_for`, as RULER's files hold them."""
        yield from asked


@dataclass(frozen=True)
class NamedTasks(QuestionSet):
    """`count` questions of each task of `plans.names_of(spec)`, at each length."""

    spec: str
    lengths: tuple[int, ...]
    count: int

    def __len__(self) -> int:
        return self.count * len(plans.names_of(self.spec)) * len(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def _plan(self, seed: int = 0):
        return plans.plan(self.spec, self.lengths, self.count, seed)

    def check(self, saved: bool) -> None:
        self._plan()

    def has_depths(self) -> bool:
        return self._plan().has_depths

    def questions_for(self, loaded: LoadedModel, seed: int) -> list:
        return list(self._plan(seed).questions_for(loaded.tokenizer))

    def written(self, asked: Sequence, loaded: LoadedModel, seed: int) -> Iterator[TextQuestion]:
        if isinstance(asked[0], TextQuestion):
            yield from asked
            return
        plan = self._plan(seed)
        for place in plan.places():
            yield plan.write(*place, loaded.tokenizer)


@dataclass(frozen=True)
class QuestionFile(QuestionSet):
    """All questions of a .jsonl file (see question_files.py)."""

    spec: str

    @property
    def more(self) -> str:
        return f"add some to {self.spec}"

    @cached_property
    def _read(self) -> list:
        return question_files.read(Path(self.spec).expanduser())

    def __len__(self) -> int:
        return len(self._read)

    def check(self, saved: bool) -> None:
        if saved and not isinstance(self._read[0], TextQuestion):
            raise UsageError(f"--save-questions writes RULER's files, and {self.spec} is judged by likelihood")

    def has_depths(self) -> bool:
        return any(question.depth is not None for question in self._read)

    def questions_for(self, loaded: LoadedModel, seed: int) -> list:
        question_files.check_positions(Path(self.spec), self._read, loaded)
        return self._read


@dataclass(frozen=True)
class ImageTasks(QuestionSet):
    """Up to `count` questions of each task in annotation files, behind others up to `longest` tokens, if set."""

    data: ImageData
    count: int
    longest: int | None = None
    seed: int = 0  # that it is counted and checked by, if not asked by

    @property
    def spec(self) -> str:
        return str(self.data)

    @cached_property
    def _plan(self):
        from .image_questions import ImagePlan

        return ImagePlan(self.data, self.count, self.longest, self.seed)

    def __len__(self) -> int:
        return len(self._plan.drawn)

    def check(self, saved: bool) -> None:
        self._plan.check()

    def has_depths(self) -> bool:
        return False

    def questions_for(self, loaded: LoadedModel, seed: int) -> list:
        if loaded.processor is None:
            raise InputError(
                f"{self.spec} asks about images, and {loaded.no_processor or 'this model reads text only'}"
            )
        from bsfa_kernels.integrations.modules import most_positions

        plan = self._plan if seed == self.seed else replace(self._plan, seed=seed)
        return list(plan.questions_for(loaded.processor, most_positions(loaded.model.config)))
