"""Questions that a model answers by which candidate it finds most likely, and how right the chosen one is.

    asked = ask(processor, with_candidates(samples, 10)[0])
    # one prefill of asked.prompt, then the log-likelihood of each of asked.continuations after it
    score(sample, log_likelihoods)

What can be scored: multiple choice by the likelihood of its letters; yes or no and NLVR2 by that of the two words; VQA
and video QA among candidates, by VQA's accuracy; captions and retrieval (which caption for an image) by the rank of a
right one among candidates, by likelihood per token, since captions differ in length. What cannot: free generation,
which these benchmarks judge by CIDEr, by substrings or by another model, and which image fits a caption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import InputError
from ...metrics.answers import Chosen, choose, vqa_accuracy
from ..samples import MultimodalSample
from . import encode
from .encode import Encoder, pictures
from .pack import added, packed
from .packed import Packed, Part

SPARE = 4  # answers drawn for every candidate, since some are right
BY_TOKEN = ("caption", "retrieval")


@dataclass(frozen=True)
class Asked:
    """`prompt` ends where the answer begins; `continuations` are the tokens of `candidates`."""

    prompt: Packed
    candidates: tuple[str, ...]
    continuations: tuple[tuple[int, ...], ...]


def with_candidates(samples: Sequence[MultimodalSample], count: int, seed: int = 0) -> list[MultimodalSample]:
    """The samples, open ones with "options" of up to `count`: their best answer, and of other samples of the task
    answers that are wrong for them, in a seeded order. Samples without an answer are left out.
    """
    pools: dict[str, list[str]] = {}
    for sample in samples:
        if sample.answer:
            pools.setdefault(sample.metadata["task"], []).append(sample.answer[0])
    pools = {task: list(dict.fromkeys(pool)) for task, pool in pools.items()}
    found = []
    for sample in samples:
        if not sample.answer:
            continue
        if "options" not in sample.metadata:
            rng = random.Random(f"bsfa candidates {seed} {sample.id}")
            pool = pools[sample.metadata["task"]]
            drawn = rng.sample(pool, min(len(pool), SPARE * count))
            wrong = [answer for answer in drawn if credit(sample, answer) == 0]
            options = [sample.answer[0], *wrong[: count - 1]]
            rng.shuffle(options)
            sample = replace(sample, metadata=sample.metadata | {"options": tuple(options)})
        found.append(sample)
    return found


def candidates(sample: MultimodalSample) -> tuple[str, ...]:
    """What an answer is chosen from. Raises InputError for a sample that has one candidate or none, or no answer."""
    options = sample.metadata.get("options", ())
    if sample.answer is None or len(options) < 2:
        raise InputError(
            f"{sample.metadata['source']}: {sample.metadata['task']} without an answer, or without candidates for it, "
            "cannot be scored by likelihood"
        )
    return tuple(options)


def ask(processor, sample: MultimodalSample, before: Sequence[MultimodalSample] = ()) -> Asked:
    """The question of `sample`, after the samples `before` it, which are answered. Errors as in `pack`."""
    options = candidates(sample)
    encoder = Encoder(processor)
    question = replace(sample, answer=None)
    texts = encoder.chat.write([*before, question])
    opening, tails = encoder.chat.answers(question, options)
    texts[-1] += opening
    encoded = encoder.encode("".join(texts), pictures([*before, question]), sample.metadata["source"])
    spans = zip([*before, question], encoded.pieces(texts), strict=True)
    parts = [Part(each.id, each.metadata["source"], *span) for each, span in spans]
    tokens = (encoder.tokenizer(tail, add_special_tokens=False).input_ids for tail in tails)
    prompt = packed(encoded, parts, encoded.length, sample.id, sample.metadata["source"])
    return Asked(prompt, options, tuple(map(tuple, tokens)))


def behind(processor, sample: MultimodalSample, others: Sequence[MultimodalSample], length: int) -> Asked:
    """The question of `sample` after as many of the `others` as fit, it and all its candidates, into `length` tokens.

    Raises InputError where it is longer by itself.
    """
    encoder = Encoder(processor)
    alone = ask(processor, sample)
    room = length - len(alone.prompt.tokens) - max(map(len, alone.continuations))
    if room < 0:
        raise InputError(
            f"{sample.metadata['source']}: question and answer have {length - room:,} tokens, more than --length "
            f"{length:,}"
        )
    before: list[MultimodalSample] = []
    for other in others:
        if other.metadata["source"] == sample.metadata["source"]:
            continue
        size = added(encoder, before[0] if before else other, other)
        if size > room:
            break
        before.append(other)
        room -= size
    while before:
        asked = ask(processor, sample, before)
        if len(asked.prompt.tokens) + max(map(len, asked.continuations)) <= length:
            return asked
        before.pop()  # tokens that join, or do not, across samples
    return alone


def followed(prompt: Packed, tokens: Sequence[int]) -> Packed:
    """The prompt with these tokens of text behind it."""
    extra = {
        name: torch.nn.functional.pad(tensor, (0, len(tokens))) if name in encode.BY_TOKEN else tensor
        for name, tensor in (prompt.extra or {}).items()
    }
    return replace(prompt, tokens=(*prompt.tokens, *tokens), extra=extra)


def credit(sample: MultimodalSample, answer: str) -> float:
    """How right an answer is, 0 to 1."""
    if sample.metadata.get("counts"):
        return vqa_accuracy(answer, sample.metadata["counts"])
    return float(answer in (sample.answer or ()))


def score(sample: MultimodalSample, likelihoods: Sequence[float], lengths: Sequence[int] | None = None) -> Chosen:
    """Of log-likelihoods of the candidates, and their lengths in tokens where the task counts by token."""
    options = candidates(sample)
    if sample.metadata["task"] in BY_TOKEN and lengths is not None:
        likelihoods = [each / max(1, length) for each, length in zip(likelihoods, lengths, strict=True)]
    return choose(options, likelihoods, [credit(sample, option) for option in options])
