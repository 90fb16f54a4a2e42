"""What is trained when: length, rows and the mix of tasks as functions of the share of the budget that is spent.

Repeated random tokens first: their loss reaches every position, and the heads that look back for a match form from
it. Questions alone never get there: they stall at guessing among the needles. Then questions, then longer documents.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ..data import document, tasks
from ..data.vocabulary import WORDS

REPEATS = "repeats"
KINDS = (REPEATS, *tasks.NAMES)
WEIGHTS = {
    **{name: 0.4 for name in tasks.TASKS if name.startswith("tracking")},
    "single": 0.3, "multi-query": 1.5, "multi-value": 4.0, "records": 1.5, "frequent-words": 1.5,
}  # fmt: skip
MOST_QUESTIONS = 64
SHORTEST_PERIOD = 8  # of repeats, in tokens


@dataclass(frozen=True)
class Phase:
    """Until the share `until` of the budget: `rows` documents of `length` tokens a step, `repeats` of them repeats."""

    until: float
    length: int
    rows: int
    repeats: float

    @property
    def revisited(self) -> bool:
        """Whether later phases come back to it: it has questions."""
        return self.repeats < 1


# Short to long, and the longer ones once more.
FULL = (
    Phase(0.05, 256, 128, 1.0),
    Phase(0.12, 256, 128, 0.35),
    Phase(0.19, 1024, 64, 0.2),
    Phase(0.27, 4096, 16, 0.15),
    Phase(0.35, 16384, 4, 0.15),
    Phase(0.45, 32768, 2, 0.12),
    Phase(0.50, 65536, 1, 0.12),
    Phase(0.56, 1024, 64, 0.1),
    Phase(0.64, 4096, 16, 0.1),
    Phase(0.75, 16384, 4, 0.1),
    Phase(0.94, 32768, 2, 0.1),
    Phase(1.00, 65536, 1, 0.1),
)
TOY = (Phase(0.3, 256, 16, 1.0), Phase(1.0, 256, 16, 0.25))
REVISIT = 0.25  # share of the time spent on earlier lengths, so that they are not forgotten


def choose(phases: tuple[Phase, ...], progress: float, rng: random.Random) -> Phase:
    """The phase of `progress` (0 to 1), or now and then an earlier one with questions."""
    now = next((index for index, phase in enumerate(phases) if progress < phase.until), len(phases) - 1)
    earlier = [phase for phase in phases[:now] if phase.revisited and phase.length < phases[now].length]
    return rng.choice(earlier) if earlier and rng.random() < REVISIT else phases[now]


@dataclass(frozen=True)
class Rows:
    """tokens [N, T]; others [N, T, tasks.OTHERS], tokens as right as those, or -1; weight [N, T], 1 / number of answer
    tokens in the row at each of them; final [N, T] bool, the last question's answer; kind [N], index into KINDS.
    """

    tokens: torch.Tensor
    others: torch.Tensor
    weight: torch.Tensor
    final: torch.Tensor
    kind: torch.Tensor

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(*(tensor[start:stop] for tensor in vars(self).values()))


def draw(phase: Phase, steps: int, rng: random.Random, generator: torch.Generator) -> Rows:
    """`steps` steps of rows, the kinds in random order and in the phase's mix."""
    total = phase.rows * steps
    parts = []
    for kind, count in zip(KINDS, _counts(phase, total, rng), strict=True):
        if count:
            parts.append(_rows(kind, phase.length, count, rng, generator))
    order = torch.randperm(total, generator=generator, device=generator.device)
    joined = [torch.cat([getattr(part, name) for part in parts])[order] for name in vars(parts[0])]
    return Rows(*joined)


def _counts(phase: Phase, total: int, rng: random.Random) -> list[int]:
    """Rows of each kind, `total` in all; what does not come out even is drawn."""
    weights = [WEIGHTS.get(name, 1.0) for name in tasks.NAMES]
    shares = [phase.repeats, *((1 - phase.repeats) * weight / sum(weights) for weight in weights)]
    counts = [int(share * total) for share in shares]
    for index in rng.choices(range(len(KINDS)), shares, k=total - sum(counts)):
        counts[index] += 1
    return counts


def _rows(kind: str, length: int, rows: int, rng: random.Random, generator: torch.Generator) -> Rows:
    device = generator.device
    if kind == REPEATS:
        tokens, answer = _repeats(length, rows, generator)
        others = torch.full((rows, length, tasks.OTHERS), -1, device=device)
        final = torch.zeros_like(answer)
    else:
        groups, questions = _sizes(kind, length, rng)
        batch = tasks.make(
            kind, length=length, rows=rows, generator=generator, groups=groups, questions=questions
        )  # fmt: skip
        tokens, answer, others = batch.tokens, batch.answer, batch.others
        final = torch.zeros_like(answer)
        final[:, batch.place] = True
    weight = answer / answer.sum(1, keepdim=True)
    return Rows(tokens, others, weight, final, torch.full((rows,), KINDS.index(kind), device=device))


def _repeats(length: int, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of the whole vocabulary, the same segment again and again; answers from its second time on.

    Periods are spread evenly over their logarithm: the short ones teach looking back first.
    """
    device = generator.device
    segment = torch.randint(len(WORDS), (rows, length), generator=generator, device=device)
    uniform = torch.rand(rows, 1, generator=generator, device=device)
    period = (SHORTEST_PERIOD * (length / 2 / SHORTEST_PERIOD) ** uniform).long()
    positions = torch.arange(length, device=device).expand(rows, -1)
    return segment.gather(1, positions % period), positions >= period


def _sizes(kind: str, length: int, rng: random.Random) -> tuple[int | None, int]:
    """(groups, questions): as few groups as one or as many as evaluation has, and more questions than it asks."""
    if kind == tasks.FREQUENT_WORDS:
        return None, rng.choice((1, 1, 2))
    task = tasks.TASKS[kind]
    question = document.length_of(task.question)
    most_questions = max(1, min(MOST_QUESTIONS, int(0.4 * length) // question))
    most = max(1, min(task.most, int(0.5 * length) // task.group_length))
    if task.share > 0.5 and rng.random() < 0.5:
        most = max(1, int(0.85 * length) // task.group_length - 2 * most_questions)
    groups = max(1, round(most ** rng.uniform(0.4, 1.0)))
    return groups, min(groups, most_questions)
