"""Questions: what a model reads, and what it must answer. As tokens for the bundled model, as text for any other.

    plan = Plan(("multi-key", "tracking-2"), (4096, 32768), questions=20)
    for question in plan.questions_for(tokenizer): ...

A question is a function of the plan's seed, its task, length and number, on every machine. Generator seeds with the
bit HELD_OUT are for evaluation; training and calibration draw without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import torch

from ..errors import InputError, UsageError
from . import document, frame_tasks, tasks
from .vocabulary import CONTINUING, IDS, PAIRS, RANGES, WORDS, build_tokenizer

HELD_OUT = 1 << 31  # a CPU's generator looks at the lower 32 bits of its seed only
ALL = "all"
ANSWER = "Answer:"  # where the lead into the answer begins
# A text may be this much shorter than asked for; its length is found by trying.
SHORTEST_SHARE, TRIES = 0.97, 8
SPARE_TOKENS = 16  # to generate, beyond the tokens of the right answer


@dataclass(frozen=True)
class TokenQuestion:
    """One document of the bundled vocabulary, its last question's answer included: `batch` has one row."""

    task: str
    length: int
    depth: int | None  # tenth of the document, 0 to 9; None where the whole document is asked about
    batch: tasks.Batch

    @property
    def tokens(self) -> list[int]:
        """The document, question and answer included."""
        return self.batch.tokens[0].tolist()

    @property
    def extra(self) -> Mapping[str, torch.Tensor] | None:
        """What the model's forward takes besides tokens."""
        return None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the answer must contain: its numbers, or else its names."""
        answer = [WORDS[token] for token in self.batch.answers[0].tolist()]
        values: list[str] = []
        for word in answer:
            if word.startswith(CONTINUING):
                values[-1] += word.removeprefix(CONTINUING)
            elif word in PAIRS:
                values.append(word)
        first, last = RANGES["noun"]
        return tuple(values or [word for word in answer if first <= IDS[word] <= last])


@dataclass(frozen=True)
class TextQuestion:
    """`text` ends where the answer begins. `match`, RULER's two: "all" scores the share of `outputs` that the answer
    contains, "part" whether it contains any.
    """

    task: str
    length: int
    depth: int | None
    text: str
    outputs: tuple[str, ...]
    match: str = "all"
    new_tokens: int = 128
    lead: str = ""  # the end of `text` that leads into the answer, where it is known

    def tokens(self, tokenizer) -> int:
        """Positions that it takes, with an answer."""
        return len(tokenizer(self.text, verbose=False).input_ids) + self.new_tokens


@dataclass(frozen=True)
class Plan:
    """`questions` questions for each task and length, at the depths in turn. Raises UsageError for what cannot be.

    `ask_at` below 1 puts each question and its answer at that share of the length, with filler behind. Only the bundled
    model can be asked so, since its answers are read where they stand.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    questions: int
    seed: int = 0
    held_out: bool = True
    ask_at: float = 1.0

    def __post_init__(self):
        for name in self.tasks:
            if name not in tasks.NAMES:
                raise UsageError(f"there is no task {name!r}; there are {', '.join(tasks.NAMES)} and {ALL}")
        if not 0 < self.ask_at <= 1:
            raise UsageError(f"a question stands at a share of the length above 0 and at most 1, got {self.ask_at:g}")
        for length in self.lengths:
            if length - self._tail(length) < tasks.SHORTEST:
                works = next(n for n in count(length + 1) if n - self._tail(n) >= tasks.SHORTEST)
                raise UsageError(f"tasks do not fit into {length} tokens; the shortest length that works is {works}")

    def _tail(self, length: int) -> int:
        return length - int(length * self.ask_at)

    def __len__(self) -> int:
        return len(self.tasks) * len(self.lengths) * self.questions

    def questions_for(self, tokenizer) -> Iterator[TokenQuestion | TextQuestion]:
        """Token questions where `tokenizer` is the bundled one, else texts of the plan's lengths in its tokens."""
        self.check(tokenizer)
        ours = is_bundled(tokenizer)
        for place in self.places():
            yield self.draw(*place) if ours else self.write(*place, tokenizer)

    def check(self, tokenizer) -> None:
        """Raise UsageError for the tokenizer of a model that cannot be asked these questions."""
        if frame_tasks.is_bundled(tokenizer):
            raise UsageError("the bundled vision-language model knows no tasks about text; ask it tasks about frames")
        if not is_bundled(tokenizer) and self.ask_at < 1:
            raise UsageError(
                "only the bundled model can be asked before the end of a text; others generate their answer"
            )

    @property
    def has_depths(self) -> bool:
        """Whether any question is asked at a depth."""
        return not set(self.tasks) <= set(tasks.WITHOUT_DEPTH)

    def places(self) -> Iterator[tuple[str, int, int]]:
        """(task, length, number) of every question."""
        for index in range(self.questions):
            for length in self.lengths:
                yield from ((task, length, index) for task in self.tasks)

    def draw(self, task: str, length: int, index: int, tokens: int | None = None) -> TokenQuestion:
        """Question `index` of a task and length; `tokens` makes the document that long instead."""
        name = f"bsfa {self.seed} {task} {length} {index}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT
        generator = torch.Generator().manual_seed(seed + (HELD_OUT if self.held_out else 0))
        depth = index % tasks.DEPTHS if task not in tasks.WITHOUT_DEPTH else None
        size = tokens or length
        tail = self._tail(size)
        batch = tasks.make(task, length=size - tail, rows=1, generator=generator, depth=depth)
        if tail:
            batch = batch.followed_by(document.prose(1, tail, generator)[0])
        return TokenQuestion(task, length, depth, batch)

    def write(self, task: str, length: int, index: int, tokenizer) -> TextQuestion:
        """The same as text: at most `length` tokens of `tokenizer`, the answer included.

        Raises UsageError for too short a length, InputError where no document comes near it.
        """
        question, _ = self._sized(task, length, index, tokenizer)
        text, answer = as_text(question)
        spare = len(tokenizer(answer, add_special_tokens=False).input_ids) + SPARE_TOKENS
        lead = text[text.rindex(ANSWER) :]
        return TextQuestion(task, length, question.depth, text, question.outputs, "all", spare, lead)

    def document(self, task: str, length: int, index: int, tokenizer) -> tuple[list[int], None]:
        """Tokens of `tokenizer` of the document, its question and its answer; and what else the model takes, nothing.
        Errors as in `write`.
        """
        if is_bundled(tokenizer):
            return self.draw(task, length, index).tokens, None
        return self._sized(task, length, index, tokenizer)[1], None

    def _shortest(self, length: int, tokenizer) -> int:
        """The next length that all of this plan's questions fit into; those are drawn anew for each length."""
        least = length
        while True:
            plan = replace(self, lengths=(least,))
            sizes = [len(_encoded(plan.draw(*place, tasks.SHORTEST), tokenizer)) for place in plan.places()]
            if max(sizes) <= least:
                return least
            least = max(sizes)

    def _sized(self, task: str, length: int, index: int, tokenizer) -> tuple[TokenQuestion, list[int]]:
        tokens = int(length * _density(task, tokenizer))
        for _ in range(TRIES):
            tokens = max(tokens, tasks.SHORTEST)
            question = self.draw(task, length, index, tokens)
            found = _encoded(question, tokenizer)
            if SHORTEST_SHARE * length <= len(found) <= length:
                return question, found
            if tokens == tasks.SHORTEST and len(found) > length:
                works = self._shortest(length, tokenizer)
                raise UsageError(
                    f"{task} does not fit into {length} tokens of this model's tokenizer; the shortest length that "
                    f"works is {works}"
                )
            tokens = int(tokens * (0.99 * length / len(found)))
        raise InputError(
            f"{task}: no document of {length} tokens of this model's tokenizer was found; the nearest has {len(found)}"
        )


def parse_names(text: str) -> tuple[str, ...]:
    """Task names of "multi-key,tracking-2" or "all"; `Plan` refuses unknown ones."""
    return tasks.NAMES if text == ALL else tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def is_bundled(tokenizer) -> bool:
    """Whether `tokenizer` reads task texts back as the tokens that they were made of."""
    return len(tokenizer) == len(IDS) and tokenizer.get_vocab() == IDS


def as_text(question: TokenQuestion) -> tuple[str, str]:
    """(the document up to the answer, the answer)."""
    decode, length = _tokenizer().decode, question.batch.answer_length + 1
    tokens = question.batch.tokens[0]
    return decode(tokens[1:-length]), decode(tokens[-length:-1])


@cache
def _tokenizer():
    return build_tokenizer()


def _density(task: str, tokenizer) -> float:
    """Tokens of the bundled vocabulary for one of `tokenizer`."""
    probe = Plan((task,), (1024,), 1).draw(task, 1024, 0)
    return 1024 / len(_encoded(probe, tokenizer))


def _encoded(question: TokenQuestion, tokenizer) -> list[int]:
    """The whole document, its answer included, in tokens of `tokenizer`."""
    return tokenizer(" ".join(as_text(question)), verbose=False).input_ids
