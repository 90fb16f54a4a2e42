"""What the vision-language model is trained on when, and its batches, drawn in NumPy by workers beside the GPU.

Frames alone first: their alignment with words teaches the tower. Repeated random words keep up the heads that look back
for a match, which the text model brings. Described documents have words where others have images, and ten times as many
frames in as many tokens: looking up by number, mark and content forms on them. Looking at the latest frame ties what
images show to those words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data import frame_tasks
from ..data.frame_tasks import (
    CAPTIONING,
    IDS,
    IMAGE,
    NAMES,
    NEEDLE,
    RETRIEVAL,
    VQA,
    WORDS,
    Ask,
    Frames,
    compose,
    frames_in,
)
from ..data.frames import ATTRIBUTES, SIZES, TOKENS

LOOK, ALIGNMENT, REPEATS, DESCRIBED = "look", "alignment", "repeats", "described "
KINDS = (LOOK, ALIGNMENT, REPEATS, *NAMES, *(DESCRIBED + name for name in NAMES))
WEIGHTS = np.array([1.5, 1.0, 1.5, 1.0, 0.5])  # of NAMES among questions
DESCRIBED_QUESTIONS = 3  # for each in a document of images
SHORTEST_PERIOD, TOKENS_A_REPEAT = 8, 16  # of repeats: tokens, and those that count as one question


@dataclass(frozen=True)
class FramePhase:
    """Until the share `until` of the budget: `rows` documents of `length` tokens a step, with `questions` each, `look`
    of them about the frame just before. Of the rows, `described` have words in place of images, and `repeats` are the
    same random words again and again. Without questions, the rows are single frames.
    """

    until: float
    length: int
    rows: int
    questions: int = 0
    look: float = 0.0
    described: int = 0
    repeats: int = 0

    @property
    def revisited(self) -> bool:
        """Whether later phases come back to it: it has questions."""
        return self.questions > 0


# Short to long, and the same once more: what a short phase teaches of images reaches the long ones in minutes.
FULL = (
    FramePhase(0.06, TOKENS, 512),
    FramePhase(0.12, 1024, 64, 8, 0.6, 14, 4),
    FramePhase(0.20, 1024, 64, 8, 0.3, 10, 2),
    FramePhase(0.28, 4096, 16, 28, 0.2, 3),
    FramePhase(0.36, 16384, 4, 100, 0.1, 0),
    FramePhase(0.56, 32768, 2, 180, 0.1, 0),
    FramePhase(0.58, 65536, 1, 320, 0.1, 0),
    FramePhase(0.66, TOKENS, 512),
    FramePhase(0.76, 1024, 64, 8, 0.4, 8, 0),
    FramePhase(0.81, 4096, 16, 28, 0.2, 2),
    FramePhase(0.95, 32768, 2, 180, 0.1, 0),
    FramePhase(1.00, 65536, 1, 320, 0.1, 0),
)
TOY = (FramePhase(0.5, 512, 6, 8, 0.5, 2, 2), FramePhase(1.0, 512, 6, 8, 0.3, 2))


@dataclass(frozen=True)
class FrameBatch:
    """tokens int16 [N, T]; images [n], places in the bank in order of appearance, and marks [n] bool, which of them are
    marked; image_at [n * TOKENS], flat positions of image tokens. For each answer token: predicting (the flat position
    before it), target, question (ascending from 0). kind [Q], indices into KINDS.
    """

    tokens: np.ndarray
    images: np.ndarray
    marks: np.ndarray
    image_at: np.ndarray
    predicting: np.ndarray
    target: np.ndarray
    question: np.ndarray
    kind: np.ndarray


def draw(phase: FramePhase, seed: int, bank: np.ndarray) -> FrameBatch:
    """One step's documents, about frames of a bank with values [B, 5]."""
    rng = np.random.default_rng(seed)
    if not phase.questions:
        return _frames_alone(rng.integers(0, len(bank), phase.rows))
    rows = phase.rows - phase.described - phase.repeats
    images = rng.integers(0, len(bank), (rows, frames_in(phase.length, phase.questions)))
    shown = [
        Frames.of(values, rng.integers(max(1, len(values) // 2)), rng) for values in bank[images].astype(np.int64)
    ]  # fmt: skip
    questions = DESCRIBED_QUESTIONS * phase.questions
    shape = (phase.described, frames_in(phase.length, questions, True), len(SIZES))
    told = [
        Frames.of(values, rng.integers(max(1, len(values) // 2)), rng, described=True)
        for values in rng.integers(0, SIZES, shape)
    ]  # fmt: skip
    tokens = np.empty((phase.rows, phase.length), dtype=np.int16)
    kinds, predicting, target, question = [], [], [], []
    for row, frames in enumerate((*shown, *told)):
        described = frames.described
        asks, found = _asks(frames, questions if described else phase.questions, 0 if described else phase.look, rng)
        tokens[row], answers = compose(phase.length, frames, asks, rng)
        for kind, where in zip(found, answers, strict=True):
            positions = np.arange(where.start, where.stop)
            predicting.append(row * phase.length + positions - 1)
            target.append(tokens[row, where])
            question.append(np.full(len(positions), len(kinds)))
            kinds.append(KINDS.index(DESCRIBED + kind if described else kind))
    for row in range(rows + phase.described, phase.rows):
        tokens[row], period = _repeats(phase.length, rng)
        for positions in np.array_split(np.arange(period, phase.length), (phase.length - period) // TOKENS_A_REPEAT):
            predicting.append(row * phase.length + positions - 1)
            target.append(tokens[row, positions])
            question.append(np.full(len(positions), len(kinds)))
            kinds.append(KINDS.index(REPEATS))
    return FrameBatch(
        tokens, images.ravel(), np.concatenate([np.arange(len(f.labels)) == f.marked for f in shown]),
        np.flatnonzero(tokens.ravel() == IDS[IMAGE]), np.concatenate(predicting),
        np.concatenate(target).astype(np.int64), np.concatenate(question), np.array(kinds),
    )  # fmt: skip


def _frames_alone(images: np.ndarray) -> FrameBatch:
    none = np.empty(0, np.int64)
    tokens = np.full((len(images), TOKENS), IDS[IMAGE], np.int16)
    return FrameBatch(tokens, images, np.zeros(len(images), bool), np.arange(tokens.size), *[none] * 4)


def _repeats(length: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(tokens [length], their period), periods spread evenly over their logarithm: the short ones teach first."""
    period = int(SHORTEST_PERIOD * (length / 2 / SHORTEST_PERIOD) ** rng.random())
    segment = rng.integers(IDS[IMAGE] + 1, len(WORDS), period)
    return segment[np.arange(length) % period], period


def _asks(frames: Frames, count: int, look: float, rng: np.random.Generator) -> tuple[list[Ask], list[str]]:
    """(questions, ascending in where they stand; the kind of each, LOOK among them)."""
    total = len(frames.labels)
    unique = frames.unique()
    attributes = rng.integers(0, len(ATTRIBUTES), count)
    drawn = rng.choice(len(NAMES), count, p=WEIGHTS / WEIGHTS.sum())
    looks, later = rng.random(count) < look, rng.random(count)
    # Every frame once before any twice, and no attribute of the marked one twice: else answers stand in the text.
    targets = np.concatenate([rng.permutation(total) for _ in range(-(-count // total))])
    unasked = rng.permutation(len(ATTRIBUTES)).tolist()
    asks = []
    for index in range(count):
        kind, target, attribute = NAMES[drawn[index]], int(targets[index]), int(attributes[index])
        if looks[index]:
            asks.append((Ask(CAPTIONING, target, target + 1), LOOK))
            continue
        if kind == NEEDLE and unasked:
            target, attribute = frames.marked, unasked.pop()
        elif kind == NEEDLE:
            kind = VQA
        elif kind == RETRIEVAL and target not in unique:
            kind = CAPTIONING
        after = target + 1 + int(later[index] * (total - target))
        asks.append((Ask(kind, target, min(after, total), attribute), kind))
    asks.sort(key=lambda pair: pair[0].after)
    return [ask for ask, _ in asks], [kind for _, kind in asks]


def document_for_test(task: str, length: int, depth: int, bank: np.ndarray, rng: np.random.Generator):
    """(tokens [T], images [F], marked frame, where the answer stands): one question at the end, about a frame of that
    tenth of the document.
    """
    images = rng.permutation(len(bank))[: frames_in(length)]
    return (images, *frame_tasks.one_question(task, length, depth, bank[images].astype(np.int64), rng))
