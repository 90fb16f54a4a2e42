"""Seeded text that exercises attention in different ways, for when no data is at hand: `--data builtin:NAME`.

Every kind repeats, nests or refers back differently, so that heads which look near, far, or for a match all have
something to do. It is not a substitute for the text a model will serve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_ONSETS = "b c d f g h l m n p r s t v st tr pl gr".split()
_NUCLEI = "a e i o u ai ea ou".split()
_CODAS = ["", "", "n", "r", "s", "l", "nd", "rt"]
_SMALL = "the a of to in and that it with for as was on by at from but not which or".split()


def _words(rng: random.Random, count: int) -> list[str]:
    """Distinct pronounceable words, common ones first."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = rng.choice((1, 2, 2, 3))
        words["".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))] = None
    return list(words)


def _pick(rng: random.Random, words: list[str]) -> str:
    """A word by Zipf's law: rank r about as often as 1 / r."""
    return words[int(len(words) ** rng.random()) - 1]


def _prose(rng: random.Random) -> Iterator[str]:
    words = _words(rng, 1500)
    names = [word.capitalize() for word in _words(rng, 12)]
    while True:
        hero, sentences = rng.choice(names), []
        for _ in range(rng.randint(3, 8)):
            clause = [
                rng.choice(_SMALL) if rng.random() < 0.4 else _pick(rng, words) for _ in range(rng.randint(5, 18))
            ]
            if rng.random() < 0.3:
                clause[rng.randrange(len(clause))] = hero
            if len(clause) > 9:
                clause[len(clause) // 2] += ","
            sentences.append(" ".join([clause[0].capitalize(), *clause[1:]]) + rng.choice("...?!"))
        yield " ".join(sentences) + "\n\n"


def _code(rng: random.Random) -> Iterator[str]:
    names = _words(rng, 200)
    defined: list[str] = []
    while True:
        name, one, two = (rng.choice(names) for _ in range(3))
        lines = [f"def {name}_{one}({two}, limit={rng.randrange(100)}):"]
        if defined:
            lines.append(f"    {one} = {rng.choice(defined[-40:])}({two}, limit)")
        for _ in range(rng.randint(1, 5)):
            lines.append(f"    for i in range({rng.randrange(2, 64)}):")
            lines.append(f"        {two}[i] = {two}[i - 1] {rng.choice('+-*%')} {rng.randrange(1, 99)}")
        lines.append(f"    return {two}\n\n")
        defined.append(f"{name}_{one}")
        yield "\n".join(lines)


def _table(rng: random.Random) -> Iterator[str]:
    words = _words(rng, 60)
    while True:
        columns = rng.sample(words, rng.randint(3, 6))
        yield "| id | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|\n"
        start = rng.randrange(9000)
        for row in range(rng.randint(5, 30)):
            cells = [str(rng.randrange(10_000)) if rng.random() < 0.6 else rng.choice(words) for _ in columns]
            yield f"| {start + row} | " + " | ".join(cells) + " |\n"
        yield "\n"


def _records(rng: random.Random) -> Iterator[str]:
    words = _words(rng, 300)
    known: dict[str, int] = {}
    while True:
        if known and rng.random() < 0.2:
            key = rng.choice(list(known)[-500:])
            yield f"The value of {key} is {known[key]}.\n"
        else:
            key = f"{rng.choice(words)}-{rng.choice(words)}"
            known[key] = rng.randrange(10**6)
            yield f"{key} = {known[key]}\n"


def _facts(rng: random.Random) -> Iterator[str]:
    words = _words(rng, 400)
    facts = [
        f"{rng.choice(words).capitalize()} keeps the {rng.choice(words)} in {rng.choice(words).capitalize()}. "
        for _ in range(24)
    ]
    while True:
        if rng.random() < 0.3:
            yield rng.choice(facts)
        else:
            yield " ".join(_pick(rng, words) for _ in range(rng.randint(6, 16))).capitalize() + ". "


def _mixed(rng: random.Random) -> Iterator[str]:
    kinds = [make(random.Random(rng.random())) for make in (_prose, _code, _table, _records, _facts)]
    while True:
        part = rng.choice(kinds)
        for _ in range(rng.randint(4, 20)):
            yield next(part)
        yield "\n"


KINDS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "mixed": _mixed,
    "prose": _prose,
    "code": _code,
    "tables": _table,
    "records": _records,
    "facts": _facts,
}


def generate(kind: str, seed: int, characters: int) -> str:
    """At least `characters` characters of the kind (a key of KINDS); the same for the same arguments everywhere."""
    parts: list[str] = []
    length = 0
    for part in KINDS[kind](random.Random(f"bsfa {kind} {seed}")):
        parts.append(part)
        length += len(part)
        if length >= characters:
            return "".join(parts)
    raise AssertionError("generators are endless")
