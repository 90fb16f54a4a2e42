"""How right an answer is that was chosen from candidates by its likelihood: exact, VQA's soft accuracy, ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Of fewer answers no three others can agree, which VQA's accuracy asks for.
FEWEST_FOR_SOFT = 4
NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True)
class Chosen:
    """`credit`, 0 to 1, of the best candidate, the mean where several are as likely; `rank`, from 1, of the best right
    one, behind those as likely as it, None where no candidate is right.
    """

    candidate: str
    credit: float
    rank: int | None


def choose(candidates: Sequence[str], likelihoods: Sequence[float], credits: Sequence[float]) -> Chosen:
    """The candidate of the highest log-likelihood, where `credits` says how right each is.

    Raises ValueError for a likelihood that is NaN. Whether it is of a token or of all is for the caller to choose.
    """
    if any(math.isnan(each) for each in likelihoods):
        raise ValueError("a log-likelihood is NaN")
    best = max(likelihoods)
    tied = [i for i, each in enumerate(likelihoods) if each == best]
    right = [each for each, credit in zip(likelihoods, credits, strict=True) if credit > 0]
    rank = sum(each >= max(right) for each in likelihoods) if right else None
    if rank is not None:
        rank -= right.count(max(right)) - 1
    return Chosen(candidates[tied[0]], sum(credits[i] for i in tied) / len(tied), rank)


def vqa_accuracy(answer: str, counts: Mapping[str, int]) -> float:
    """VQA's accuracy of an answer where people gave `counts`: min(1, others who said it / 3), averaged over people.

    Answers are compared in lower case without articles, punctuation and apostrophes and with numbers as digits, where
    people do not all agree; fewer than four answers count as right or wrong. The benchmark restores apostrophes from a
    table of contractions, where this leaves them out.
    """
    normal = normalised if len(counts) > 1 else str.strip
    said: dict[str, int] = {}
    for each, count in counts.items():
        said[normal(each)] = said.get(normal(each), 0) + count
    people, same = sum(said.values()), said.get(normal(answer), 0)
    if people < FEWEST_FOR_SOFT:
        return float(same > 0)
    agreeing, others = min(1, (same - 1) / 3), min(1, same / 3)
    return (same * agreeing + (people - same) * others) / people


def normalised(answer: str) -> str:
    """An answer as VQA compares it."""
    said = given = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", given)
    for mark in _MARKS:
        apart = mark + " " in given or " " + mark in given
        said = said.replace(mark, "" if apart or grouped else " ")
    said = re.sub(r"\.(?!\d)", "", said).replace("'", "")
    words = (NUMBERS.get(word, word) for word in said.lower().split())
    return " ".join(word for word in words if word not in ARTICLES)
