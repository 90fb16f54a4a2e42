"""The tasks, as token batches: what a document holds, what is asked, and at which depth.

batch = make("multi-key", length=4096, rows=8, generator=torch.Generator().manual_seed(seed))
batch.tokens[:, : batch.place.start]     # what the model reads; then it must give batch.answers

A group is the sentences that one question is about: one needle, four values of a key, a chain of copies. Groups that
nobody asks about are distractors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import document, templates
from .vocabulary import CONTINUING, DECIMAL_PAIRS, IDS, PAIRS, RANGES

DEPTHS = 10
SHORTEST = 256  # tokens of a document that every task fits into
OTHERS = 3
VALUE_PAIRS = 3  # tokens of a magic number


@dataclass(frozen=True)
class Batch:
    """tokens [rows, length] int64; answer [rows, length] bool, the tokens of every answer in the document. The last
    question's answer has `answer_length` tokens; behind it stand a full stop and `tail` tokens of filler.

    others [rows, length, OTHERS] int64: tokens that would be as right, -1 for none. Values that may come in any order
    differ in their first token; from there on the value that stands in the document is the right one.
    """

    tokens: torch.Tensor
    answer: torch.Tensor
    answer_length: int
    others: torch.Tensor
    tail: int = 0

    @property
    def place(self) -> slice:
        """Where the last question's answer stands among the tokens of a row."""
        end = self.tokens.shape[1] - self.tail - 1
        return slice(end - self.answer_length, end)

    @property
    def predicting(self) -> slice:
        """The positions whose predictions are the answer: each stands before its token."""
        return slice(self.place.start - 1, self.place.stop - 1)

    @property
    def answers(self) -> torch.Tensor:
        """[rows, answer_length]: the last question's answer."""
        return self.tokens[:, self.place]

    def followed_by(self, tail: torch.Tensor) -> Batch:
        """The same with `tail` [rows, n] behind it."""
        width = (0, tail.shape[1])
        pad = torch.nn.functional.pad
        return Batch(
            torch.cat([self.tokens, tail], 1), pad(self.answer, width), self.answer_length,
            pad(self.others, (0, 0, *width), value=-1), self.tail + tail.shape[1],
        )  # fmt: skip

    def right(self, predicted: torch.Tensor) -> torch.Tensor:
        """bool [rows, answer_length]: which predictions for `answers`, of that shape, are right."""
        others = self.others[:, self.place]
        return (predicted == self.answers) | (predicted[..., None] == others).any(-1)


@dataclass(frozen=True)
class Task:
    """`sentences` and `question` are templates; `draw(rows, groups, generator)` gives their arguments, [rows, groups,
    sentences, MOST_ARGUMENTS] and [rows, groups, MOST_ARGUMENTS]. `share` is how much of a document distractors may
    take, `most` how many groups there can be.
    """

    header: str
    sentences: tuple[str, ...]
    question: str
    draw: Callable[[int, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
    share: float
    most: int
    ordered: bool = True  # sentences of a group keep their order in the document
    interchangeable: int = 1  # parts of the answer that may come in any order

    @property
    def group_length(self) -> int:
        return sum(map(document.length_of, self.sentences))

    def groups(self, length: int) -> int:
        """How many groups a document of `length` tokens has, distractors included: no more than fit into it."""
        around = 2 + document.length_of(self.header) + document.length_of(self.question)  # BOS and a word of filler
        fitting = (length - around) // self.group_length
        return max(1, min(self.most, int(self.share * length) // self.group_length, fitting))


def _pad(*columns: torch.Tensor) -> torch.Tensor:
    joined = torch.cat(columns, -1)
    return torch.nn.functional.pad(joined, (0, document.MOST_ARGUMENTS - joined.shape[-1]))


def _distinct(rows: int, count: int, among: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, count] different integers below `among`, in random order."""
    order = torch.rand(rows, among, generator=generator, device=generator.device)
    return order.topk(count, dim=1).indices


def _keys(rows: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """[rows, count, 2]: an adjective and a noun, no pair twice in a row."""
    (first, last), (noun, last_noun) = RANGES["adjective"], RANGES["noun"]
    nouns = last_noun + 1 - noun
    pair = _distinct(rows, count, (last + 1 - first) * nouns, generator)
    return torch.stack([first + pair // nouns, noun + pair % nouns], -1)


def _code(shape: tuple[int, ...], pairs: list[str], generator: torch.Generator) -> torch.Tensor:
    """Codes of shape[-1] pairs each."""
    return _spelled(torch.randint(len(pairs), shape, generator=generator, device=generator.device), pairs)


def _spelled(drawn: torch.Tensor, pairs: list[str]) -> torch.Tensor:
    """Tokens of codes whose pairs are `pairs[drawn]`: a first pair and continuing ones."""
    device = drawn.device
    kinds = torch.tensor([[IDS[pair] for pair in pairs], [IDS[CONTINUING + pair] for pair in pairs]], device=device)
    first = torch.arange(drawn.shape[-1], device=device) == 0
    return torch.where(first, kinds[0][drawn], kinds[1][drawn])


def _draw_number(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = _pad(_keys(rows, groups, generator), _code((rows, groups, VALUE_PAIRS), DECIMAL_PAIRS, generator))
    return arguments[:, :, None], arguments


def _draw_queries(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    keys = _keys(rows, 4 * groups, generator)
    needles = torch.cat([keys, _code((rows, 4 * groups, VALUE_PAIRS), DECIMAL_PAIRS, generator)], -1)
    needles = needles.view(rows, groups, 4, -1)
    return _pad(needles), _pad(needles.flatten(2))


def _draw_values(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    key = _keys(rows, groups, generator)
    among, shape = len(DECIMAL_PAIRS), (rows, groups, 4, VALUE_PAIRS)
    drawn = torch.randint(among, shape, generator=generator, device=generator.device)
    # Values of a key begin with different pairs: one that was begun must have one way to go on.
    drawn[..., 0] = _distinct(rows * groups, 4, among, generator).view(shape[:-1])
    values = _spelled(drawn, DECIMAL_PAIRS)
    return _pad(key[:, :, None].expand(-1, -1, 4, -1), values), _pad(key, values.flatten(2))


def _draw_chain(copies: int):
    def draw(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = RANGES["noun"]
        value = _code((rows, groups, VALUE_PAIRS), DECIMAL_PAIRS, generator)
        names = first + _distinct(rows, groups * (copies + 1), last + 1 - first, generator)
        names = names.view(rows, groups, copies + 1)
        store = _pad(value, names[..., :1])
        copied = [_pad(names[..., i : i + 2]) for i in range(copies)]
        return torch.stack([store, *copied], 2), _pad(value, names)

    return draw


def _draw_record(rows: int, groups: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = _pad(_code((rows, groups, 4), PAIRS, generator), _code((rows, groups, 4), PAIRS, generator))
    return arguments[:, :, None], arguments


def _numbers(draw, question: str, sentences: int, share: float, most: int, interchangeable: int = 1) -> Task:
    needles = (templates.NUMBER,) * sentences
    return Task(templates.NUMBER_HEADER, needles, question, draw, share, most, False, interchangeable)


def _chain(copies: int) -> Task:
    sentences = (templates.STORE, *[templates.COPY] * copies)
    return Task(templates.STORE_HEADER, sentences, templates.ASK_CHAIN[copies], _draw_chain(copies), 0.2, 24)


TASKS: dict[str, Task] = {
    "single": _numbers(_draw_number, templates.ASK_NUMBER, 1, 0.0, 1),
    "multi-key": _numbers(_draw_number, templates.ASK_NUMBER, 1, 0.3, 1024),
    "multi-query": _numbers(_draw_queries, templates.ASK_QUERIES, 4, 0.2, 128),
    "multi-value": _numbers(_draw_values, templates.ASK_VALUES, 4, 0.2, 32, interchangeable=4),
    **{f"tracking-{copies}": _chain(copies) for copies in templates.ASK_CHAIN},
    "records": Task(
        templates.RECORD_HEADER, (templates.RECORD,), templates.ASK_RECORD, _draw_record, 0.9, 1 << 20
    ),
}  # fmt: skip
FREQUENT_WORDS = "frequent-words"
NAMES = (*TASKS, FREQUENT_WORDS)
WITHOUT_DEPTH = (FREQUENT_WORDS,)  # the whole document is asked about


def make(
    name: str,
    *,
    length: int,
    rows: int,
    generator: torch.Generator,
    questions: int = 1,
    groups: int | None = None,
    depth: int | None = None,
) -> Batch:
    """`rows` documents of exactly `length` tokens with `questions` questions, the last one at the very end.

    `groups` is how many groups there are, by default the task's own for this length; the first `questions` of them
    are asked about, each somewhere after its last sentence. `depth` (0 to 9) puts the sentences of the last question
    into that tenth of the document. Tokens are drawn from `generator`, on its device.
    """
    if name == FREQUENT_WORDS:
        return _frequent_words(length, rows, generator, questions)
    task = TASKS[name]
    groups = task.groups(length) if groups is None else groups
    device = generator.device
    sentence_arguments, question_arguments = task.draw(rows, groups, generator)
    size = len(task.sentences)
    places = torch.rand(rows, groups, size, generator=generator, device=device)
    asked = questions - 1  # the group that the last question is about
    if depth is not None:
        places[:, asked] = (places[:, asked] + depth) / DEPTHS
    if task.ordered:
        places = places.sort(-1).values
    last = places[:, :questions].amax(-1)
    ask_places = last + (1 - last) * torch.rand(last.shape, generator=generator, device=device)
    ask_places[:, asked] = 1.0

    kinds = [document.ID_OF_TEXT[text] for text in (task.header, *task.sentences * groups)]
    kinds = torch.tensor(kinds + [document.ID_OF_TEXT[task.question]] * questions, device=device)
    wanted = torch.cat([torch.full((rows, 1), -1.0, device=device), places.flatten(1), ask_places], 1)
    arguments = torch.cat(
        [
            torch.zeros(rows, 1, document.MOST_ARGUMENTS, dtype=torch.long, device=device),
            sentence_arguments.flatten(1, 2),
            question_arguments[:, :questions],
        ],
        1,
    )
    # Stable, so that the last question stays behind a question that also ended up at the very end.
    order = wanted.argsort(dim=1, stable=True)
    kinds = kinds.expand(rows, -1).gather(1, order)
    arguments = arguments.gather(1, order[..., None].expand_as(arguments))
    spent = 1 + document.length_of(task.header) + groups * task.group_length
    filler_length = length - spent - questions * document.length_of(task.question)
    if filler_length < 1:
        raise ValueError(f"{name}: {groups} groups and {questions} questions do not fit into {length} tokens")
    filler, breaks = document.prose(rows, filler_length, generator)
    at = document.places_near(breaks, wanted.gather(1, order).clamp(min=0), filler_length)
    return _batch(document.insert(filler, at, kinds, arguments), task.question, task.interchangeable)


def _frequent_words(length: int, rows: int, generator: torch.Generator, questions: int) -> Batch:
    """Forty words, the word of rank r as often as 1 / r^1.5; asked for the three that came most often so far."""
    device = generator.device
    distinct, text = 40, templates.ASK_WORDS
    filler_length = length - 1 - document.length_of(templates.WORDS_HEADER) - questions * document.length_of(text)
    first, last = RANGES["noun"]
    members = first + _distinct(rows, distinct, last + 1 - first, generator)
    weights = torch.arange(1, distinct + 1, device=device, dtype=torch.float32) ** -1.5
    bounds = (weights / weights.sum()).cumsum(0)
    drawn = torch.rand(rows, filler_length, generator=generator, device=device)
    rank = torch.searchsorted(bounds, drawn).clamp(max=distinct - 1)
    at = torch.rand(rows, questions, generator=generator, device=device).mul(filler_length).long().sort(1).values
    at[:, -1] = filler_length
    # How often each word came before each question: [rows, questions, distinct].
    reached = torch.searchsorted(
        at, torch.arange(filler_length, device=device).expand(rows, -1).contiguous(), right=True
    )
    counts = torch.zeros(rows, questions + 1, distinct, device=device)
    row = torch.arange(rows, device=device)[:, None]
    counts.index_put_((row, reached, rank), torch.ones((), device=device), accumulate=True)
    top = counts[:, :questions].cumsum(1).topk(3, -1).indices
    arguments = _pad(members[row[..., None], top])
    header = torch.zeros(rows, 1, document.MOST_ARGUMENTS, dtype=torch.long, device=device)
    kinds = torch.tensor(
        [document.ID_OF_TEXT[templates.WORDS_HEADER]] + [document.ID_OF_TEXT[text]] * questions, device=device
    )
    at = torch.cat([torch.zeros(rows, 1, dtype=torch.long, device=device), at], 1)
    inserted = document.insert(
        members.gather(1, rank), at, kinds.expand(rows, -1), torch.cat([header, arguments], 1)
    )  # fmt: skip
    return _batch(inserted, text)


def _batch(inserted: tuple[torch.Tensor, torch.Tensor], question: str, interchangeable: int = 1) -> Batch:
    tokens, answer = inserted
    where = templates.answer(question)
    length = where.stop - where.start
    others = torch.full((*tokens.shape, OTHERS), -1, device=tokens.device)
    if interchangeable > 1:
        stated = tokens[answer].view(-1, length)
        among = torch.full((*stated.shape, OTHERS), -1, device=tokens.device)
        step = (length - VALUE_PAIRS) // (interchangeable - 1)  # a value and what stands before the next one
        firsts = stated[:, ::step]
        for index in range(interchangeable - 1):
            later = firsts[:, index + 1 :]
            among[:, index * step, : later.shape[1]] = later
        others[answer] = among.flatten(0, 1)
    return Batch(tokens, answer, length, others)
