"""Documents of frames with questions about them, as tokens of the bundled vision-language model.

Each frame is TOKENS image tokens, and behind them "frame 417 : lantern ." with a number and a subtitle of its own; a
question stands between frames, its answer after it. Described frames, for training only, have the words for what they
show in place of the image. Five tasks, after LAVIS's families:

    video-needle  what shape (colour, ...) the one frame with a magenta border has      [found by its looks]
    vqa           what shape (colour, ...) frame 417 has                                [found by its number]
    retrieval     which frame shows a red star southwest, seven, on gray                [found by its content]
    captioning    all five attributes of frame 417                                      [found by its number]
    subtitles     which word stands with frame 417: text among images                   [found by its number]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .frames import ATTRIBUTES, SIZES, TOKENS
from .vocabulary import BEGIN, END, PAD, UNKNOWN
from .words import NOUNS

NEEDLE, VQA, RETRIEVAL, CAPTIONING, SUBTITLES = NAMES = (
    "video-needle", "vqa", "retrieval", "captioning", "subtitles"
)  # fmt: skip
MODALITIES = {name: "text" if name == SUBTITLES else "image" for name in NAMES}  # of what the answer is read from
IMAGE = "<image>"
LABELS = 1000  # numbers of frames; no more frames than that in a document
DEPTHS = 10
_OF_FRAMES = "frame : . Question What has the marked Which shows Describe ? Answer word".split()
_VALUES = [value for values in ATTRIBUTES.values() for value in values]
_SUBTITLES = [noun for noun in NOUNS if noun not in {*_OF_FRAMES, *_VALUES}]
WORDS = [
    PAD, BEGIN, END, UNKNOWN, IMAGE, *map(str, range(LABELS)), *_OF_FRAMES, *ATTRIBUTES, *_VALUES, *_SUBTITLES,
]  # fmt: skip
IDS = {word: index for index, word in enumerate(WORDS)}
FIRST_LABEL, FIRST_SUBTITLE = IDS["0"], IDS[_SUBTITLES[0]]
FIRST_VALUES = np.array([IDS[values[0]] for values in ATTRIBUTES.values()])  # of each attribute


def _ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


SAID = _ids("frame 0 : word .")
LABEL_AT, SUBTITLE_AT = -4, -2  # of a frame's tokens
FRAME_LENGTH, DESCRIBED_LENGTH = TOKENS + len(SAID), 1 + len(ATTRIBUTES) + len(SAID)
LONGEST_QUESTION = 15


@dataclass(frozen=True)
class Ask:
    """A question about frame `target` that stands behind the first `after` frames."""

    kind: str
    target: int
    after: int
    attribute: int = 0  # for video-needle and vqa


@dataclass(frozen=True)
class Frames:
    """A document's frames: labels [F] and subtitles [F], token ids; values [F, 5], indices into ATTRIBUTES; which one
    is marked; and whether they are described in words.
    """

    labels: np.ndarray
    subtitles: np.ndarray
    values: np.ndarray
    marked: int
    described: bool = False

    @classmethod
    def of(cls, values: np.ndarray, marked: int, rng: np.random.Generator, described: bool = False) -> Frames:
        """Numbers in no order, none twice, and any words."""
        labels = FIRST_LABEL + rng.permutation(LABELS)[: len(values)]
        return cls(labels, rng.integers(FIRST_SUBTITLE, len(WORDS), len(values)), values, marked, described)

    def tokens(self) -> np.ndarray:
        """[F, tokens of a frame]."""
        size = DESCRIBED_LENGTH if self.described else FRAME_LENGTH
        tokens = np.full((len(self.labels), size), IDS[IMAGE])
        tokens[:, -len(SAID) :] = SAID
        tokens[:, LABEL_AT], tokens[:, SUBTITLE_AT] = self.labels, self.subtitles
        if self.described:
            tokens[:, 0] = IDS["."]
            tokens[self.marked, 0] = IDS["marked"]
            tokens[:, 1 : 1 + len(ATTRIBUTES)] = FIRST_VALUES + self.values
        return tokens

    def unique(self) -> np.ndarray:
        """Those that no other frame looks like, ascending: only these can be asked for by description."""
        codes = self.values @ np.concatenate([[1], SIZES[:-1].cumprod()])
        _, which, counts = np.unique(codes, return_index=True, return_counts=True)
        return np.sort(which[counts == 1])

    def question(self, ask: Ask) -> tuple[list[int], int]:
        """(tokens, how many of them, before the final full stop, are the answer)."""
        label, caption = int(self.labels[ask.target]), (FIRST_VALUES + self.values[ask.target]).tolist()
        if ask.kind == RETRIEVAL:
            start, answer = [*_WHICH, *caption], [label]
        elif ask.kind == CAPTIONING:
            start, answer = [*_DESCRIBE, label], caption
        elif ask.kind == SUBTITLES:
            start, answer = [*_WHAT, IDS["word"], *_HAS, label], [int(self.subtitles[ask.target])]
        else:
            what = [*_WHAT, IDS[[*ATTRIBUTES][ask.attribute]]]
            start = [*what, *_MARKED] if ask.kind == NEEDLE else [*what, *_HAS, label]
            answer = [caption[ask.attribute]]
        return [*start, *_ANSWER, *answer, IDS["."]], len(answer)


_WHAT, _HAS, _MARKED = _ids("Question : What"), _ids("has frame"), _ids("has the marked frame")
_WHICH, _DESCRIBE, _ANSWER = _ids("Question : Which frame shows"), _ids("Question : Describe frame"), _ids("? Answer :")


def frames_in(length: int, questions: int = 1, described: bool = False) -> int:
    """How many frames there is room for beside `questions` questions."""
    size = DESCRIBED_LENGTH if described else FRAME_LENGTH
    return min(LABELS, (length - 1 - questions * LONGEST_QUESTION) // size)


def compose(
    length: int, frames: Frames, asks: Sequence[Ask], rng: np.random.Generator
) -> tuple[np.ndarray, list[slice]]:
    """(tokens int64 [length], where each answer stands, in the order of `asks`, ascending in `after`).

    Words without a frame fill up to the length, at the start.
    """
    blocks = frames.tokens()
    questions = [frames.question(ask) for ask in asks]
    spent = 1 + blocks.size + sum(len(tokens) for tokens, _ in questions)
    if spent > length:
        raise ValueError(f"{len(blocks)} frames and {len(asks)} questions do not fit into {length} tokens")
    filler = rng.integers(FIRST_SUBTITLE, len(WORDS), length - spent)
    parts, answers, done, at = [[IDS[BEGIN]], filler], [], 0, 1 + len(filler)
    for ask, (tokens, answer) in zip(asks, questions, strict=True):
        parts += [blocks[done : ask.after].ravel(), tokens]
        at += (ask.after - done) * blocks.shape[1] + len(tokens)
        answers.append(slice(at - 1 - answer, at - 1))
        done = ask.after
    parts.append(blocks[done:].ravel())
    return np.concatenate(parts).astype(np.int64), answers


def one_question(
    task: str, length: int, depth: int, values: np.ndarray, rng: np.random.Generator, ask_at: float = 1.0
) -> tuple[np.ndarray, int, int, slice]:
    """(tokens int64 [length], the frame asked about, the marked frame, where the answer stands).

    The question stands behind the share `ask_at` of the frames `values` [F, 5] and asks about one in the tenth `depth`
    of those before it.
    """
    before = max(1, round(len(values) * ask_at))
    target = min(before - 1, int((depth + rng.random()) / DEPTHS * before))
    marked = target if task == NEEDLE else int(rng.integers(before))
    frames = Frames.of(values, marked, rng)
    if task == RETRIEVAL:
        target = _nearest(frames.unique(), target, before)
    attribute = int(rng.integers(len(ATTRIBUTES)))
    tokens, (answer,) = compose(length, frames, [Ask(task, target, before, attribute)], rng)
    return tokens, target, marked, answer


def _nearest(unique: np.ndarray, target: int, before: int) -> int:
    among = unique[unique < before]
    if not len(among):
        raise ValueError("no frame can be told from the others by its description")
    return int(among[np.abs(among - target).argmin()])


def is_bundled(tokenizer) -> bool:
    """Whether `tokenizer` is the bundled vision-language model's."""
    return len(tokenizer) == len(IDS) and tokenizer.get_vocab() == IDS
