"""Questions about frames, for the bundled vision-language model: tokens and pixel values, teacher-forced.

    plan = FramePlan(("video-needle", "retrieval"), (32768,), questions=20)
    for question in plan.questions_for(tokenizer): question.tokens, question.extra["pixel_values"]

A question is a function of the plan's seed, its task, length and number, up to what Pillow's versions draw otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch

from ..errors import UsageError
from . import frame_tasks, tasks
from .frame_tasks import WORDS
from .frames import SIZES, render
from .questions import Plan, TokenQuestion

SHORTEST = 1 + frame_tasks.LONGEST_QUESTION + 4 * frame_tasks.FRAME_LENGTH


@dataclass(frozen=True)
class FrameQuestion(TokenQuestion):
    """A TokenQuestion with images: `values` [F, 5] of its frames, indices into ATTRIBUTES; `marked` has a border.
    `depth` is the tenth of the frames before the question that it asks about.
    """

    values: np.ndarray
    marked: int
    seed: int
    held_out: bool

    @property
    def modality(self) -> str:
        """Of what the answer is read from: image or text."""
        return frame_tasks.MODALITIES[self.task]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(WORDS[token] for token in self.batch.answers[0].tolist())

    @property
    def extra(self) -> Mapping[str, torch.Tensor]:
        """pixel_values float32 [F, 3, SIDE, SIDE]; those of the question last asked for are kept."""
        return {"pixel_values": _pixel_values(self.values.tobytes(), self.marked, self.seed, self.held_out)}


class FramePlan(Plan):
    """As `Plan`, of tasks on frames."""

    def __post_init__(self):
        for name in self.tasks:
            if name not in frame_tasks.NAMES:
                raise UsageError(
                    f"{name!r} is no task about frames; there are {', '.join(frame_tasks.NAMES)}, which are asked on "
                    "their own, without tasks about text"
                )
        if not 0 < self.ask_at <= 1:
            raise UsageError(f"a question stands at a share of the length above 0 and at most 1, got {self.ask_at:g}")
        longest = frame_tasks.LABELS * frame_tasks.FRAME_LENGTH
        for length in self.lengths:
            if not SHORTEST <= length <= longest:
                raise UsageError(f"tasks about frames have {SHORTEST} to {longest} tokens, got {length}")

    def questions_for(self, tokenizer) -> Iterator[FrameQuestion]:
        """Raises UsageError as `check`."""
        self.check(tokenizer)
        for place in self.places():
            yield self.draw(*place)

    def check(self, tokenizer) -> None:
        """Raise UsageError for the tokenizer of another model, or where Pillow is missing."""
        if find_spec("PIL") is None:
            raise UsageError("tasks about frames need Pillow: pip install pillow")
        if not frame_tasks.is_bundled(tokenizer):
            raise UsageError(
                f"{', '.join(self.tasks)}: only the bundled vision-language model is asked about frames "
                "(MODEL bsfa/frames-llava)"
            )

    def draw(self, task: str, length: int, index: int) -> FrameQuestion:
        """Question `index` of a task and length."""
        name = f"bsfa {self.seed} {task} {length} {index} {self.held_out}"
        rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:16]))
        depth = index % frame_tasks.DEPTHS
        values = rng.integers(0, SIZES, (frame_tasks.frames_in(length), len(SIZES)))
        tokens, _, marked, answer = frame_tasks.one_question(task, length, depth, values, rng, self.ask_at)
        row = torch.from_numpy(tokens)[None]
        mask = torch.zeros_like(row, dtype=torch.bool)
        mask[:, answer] = True
        others = torch.full((*row.shape, tasks.OTHERS), -1)
        batch = tasks.Batch(row, mask, answer.stop - answer.start, others, length - answer.stop - 1)
        seed = int(rng.integers(1 << 40))
        return FrameQuestion(task, length, depth, batch, values.astype(np.int8), marked, seed, self.held_out)

    def document(self, task: str, length: int, index: int, tokenizer) -> tuple[list[int], Mapping[str, torch.Tensor]]:
        """Tokens of a document, its question and its answer; and its pixel values."""
        question = self.draw(task, length, index)
        return question.tokens, question.extra

    def write(self, task: str, length: int, index: int, tokenizer):
        """Raises UsageError: a question about frames is no text."""
        raise UsageError("questions about frames cannot be written as text")


def pixel_values(frames: torch.Tensor) -> torch.Tensor:
    """float32 [F, 3, SIDE, SIDE], -1 to 1, of uint8 [F, SIDE, SIDE, 3]: what the model's image processor gives."""
    return frames.permute(0, 3, 1, 2).float().div(127.5).sub(1)


@lru_cache(maxsize=1)
def _pixel_values(values: bytes, marked: int, seed: int, held_out: bool) -> torch.Tensor:
    found = np.frombuffer(values, np.int8).reshape(-1, len(SIZES))
    frames = [
        render(row, seed + index, held_out=held_out, marked=index == marked) for index, row in enumerate(found)
    ]  # fmt: skip
    return pixel_values(torch.from_numpy(np.stack(frames)))
