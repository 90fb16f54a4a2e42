"""How sure an accuracy is: Wilson's interval for a share, and the same kind of interval for two models on the same
questions.

An interval holds every value that the answers do not contradict: the values whose score test, at 5 % on two sides, the
answers pass. The variance in that test is the one that the questioned value itself implies, and not the one observed,
so an interval never shrinks to a point because no answer happened to differ: d right answers of d kept leave a
retention as low as d / (d + Z^2), four of them 51 %. Resampling the questions, in contrast, finds no spread there.

    difference   Tango, Statistics in Medicine 17 (1998), 891-908
    retention    the ratio of two accuracies: Nam and Blackwelder, Statistics in Medicine 21 (2002), 689-699
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Z = 1.959963984540054  # two-sided 95 %
HALVINGS = 60


class Pairs(NamedTuple):
    """Numbers of questions by who answers them right."""

    both: float
    gained: float  # the sparse model only
    lost: float  # the dense model only
    neither: float

    @property
    def questions(self) -> float:
        return sum(self)

    @property
    def sparse(self) -> float:
        return self.both + self.gained

    @property
    def dense(self) -> float:
        return self.both + self.lost

    def times(self, factor: float) -> Pairs:
        return Pairs(*(factor * count for count in self))


def wilson(right: int, questions: int) -> tuple[float, float]:
    """95 % interval of the share right / questions; (0, 1) without questions."""
    if not questions:
        return 0.0, 1.0
    share, spread = right / questions, Z * Z / questions
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / questions + spread / (4 * questions)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(sparse: Sequence[float], dense: Sequence[float]) -> dict:
    """JSON of sparse against dense answers (1 right, 0 wrong) to the same questions: how many were `gained` and `lost`,
    the `difference` of the accuracies and `retention`, their ratio, with 95 % intervals. Ratios are None where no dense
    answer is right.
    """
    pairs = count(sparse, dense)
    return {
        "gained": pairs.gained,
        "lost": pairs.lost,
        "difference": (pairs.sparse - pairs.dense) / pairs.questions,
        "difference_interval": list(difference_interval(pairs)),
        "retention": pairs.sparse / pairs.dense if pairs.dense else None,
        "retention_interval": list(retention_interval(pairs)) if pairs.dense else None,
    }


def count(sparse: Sequence[float], dense: Sequence[float]) -> Pairs:
    """The four numbers of answers (1 right, 0 wrong) to the same questions."""
    answers = [(bool(a), bool(b)) for a, b in zip(sparse, dense, strict=True)]
    return Pairs(*(answers.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))


def difference_interval(pairs: Pairs) -> tuple[float, float]:
    """95 % interval of the sparse model's accuracy less the dense one's."""
    n, gained, lost = pairs.questions, pairs.gained, pairs.lost

    def score(difference: float) -> float:
        # The likeliest share of lost answers, given this difference.
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * share + difference * (1 - difference))
        return _standardised(gained - lost - n * difference, variance)

    observed = (gained - lost) / n
    return _end(score, observed, -1.0), _end(score, observed, 1.0)


def retention_interval(pairs: Pairs) -> tuple[float, float]:
    """95 % interval of the sparse model's accuracy over the dense one's, which is not 0."""
    n, sparse, dense = pairs.questions, pairs.sparse / pairs.questions, pairs.dense / pairs.questions
    gained, lost = pairs.gained / n, pairs.lost / n

    def score(ratio: float) -> float:
        # The likeliest shares of gained and lost answers, given this ratio.
        spread = math.sqrt((sparse - dense * ratio**2) ** 2 + 4 * ratio**2 * gained * lost)
        likely_gained = (-sparse + ratio**2 * (dense + 2 * gained) + spread) / (2 * ratio * (ratio + 1))
        likely_lost = ratio * likely_gained - (ratio - 1) * (sparse + lost)
        return _standardised(n * (sparse - ratio * dense), n * ratio * (likely_gained + likely_lost))

    observed = high = sparse / dense
    while abs(score(high := 2 * high + 1)) <= Z:
        pass
    return _end(score, observed, 0.0) if observed else 0.0, _end(score, observed, high)


def least_answers(retention: float) -> int | None:
    """How many questions the dense model must answer right before keeping all of them shows this retention; None where
    no number does.
    """
    return math.ceil(Z * Z * retention / (1 - retention)) if retention < 1 else None


def enough_questions(pairs: Pairs, retention: float) -> int | None:
    """About how many questions, answered as these are, would show this retention; None where none would."""
    if not pairs.dense or pairs.sparse / pairs.dense <= retention:
        return None
    few, many = 1.0, 2.0
    while retention_interval(pairs.times(many))[0] < retention:
        few, many = many, 2 * many
    for _ in range(10):
        middle = (few + many) / 2
        few, many = (few, middle) if retention_interval(pairs.times(middle))[0] >= retention else (middle, many)
    return math.ceil(many * pairs.questions)


def _standardised(distance: float, variance: float) -> float:
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _end(score: Callable[[float], float], inside: float, outside: float) -> float:
    """Where, on the way from `inside` to `outside`, the score test begins to fail."""
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if abs(score(middle)) <= Z else (inside, middle)
    return inside
