"""python -m bsfa_cli.training.vision --minutes 18 --stop-after 8.7 --text-model bsfa_cli/models/retrieval --out DIR

Trains the bundled vision-language model on one GPU. DIR gets log.jsonl and checkpoint/; `--resume DIR/checkpoint` goes
on from there, in another folder or the same. `--export MODEL --resume DIR/checkpoint` writes the Hugging Face
checkpoint and needs no GPU.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from ..data import frame_tasks
from ..data.frame_questions import pixel_values
from ..data.frames import SIDE, SIZES, render
from . import frame_curriculum, frame_model
from .frame_curriculum import FrameBatch, FramePhase
from .loop import Budget, Trainer

BANK, TEST_BANK = 32768, 4096  # frames
EVALUATED = {1024: 80, 8192: 40, 16384: 40, 32768: 40, 65536: 20}  # documents a task, by length
TEST_SEED = 1 << 32


def render_bank(count: int, held_out: bool, pool) -> tuple[np.ndarray, np.ndarray]:
    """(values int8 [count, 5], pixels uint8 [count, SIDE, SIDE, 3]) of frames with any attributes."""
    values = np.random.default_rng(int(held_out)).integers(0, SIZES, (count, len(SIZES)), np.int8)
    pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
    chunks = np.array_split(np.arange(count), max(1, count // 256))
    rendered = pool.imap(partial(_render_some, values=values, held_out=held_out), chunks)
    for chunk, part in zip(chunks, rendered, strict=True):
        pixels[chunk] = part
    return values, pixels


def _render_some(places: np.ndarray, values: np.ndarray, held_out: bool) -> np.ndarray:
    first = TEST_SEED if held_out else 0
    return np.stack([render(values[place], first + int(place), held_out=held_out) for place in places])


class FrameTrainer(Trainer):
    """Trains a LlavaForConditionalGeneration on documents of a bank's frames: values [B, 5], pixels uint8 [B, ...].
    `pool` draws batches in other processes.
    """

    kinds = frame_curriculum.KINDS
    chunk_steps = 48  # workers begin anew with each chunk

    def __init__(self, model, phases: tuple[FramePhase, ...], budget: Budget, *, values, pixels, pool, **options):
        super().__init__(model, phases, budget, **options)
        self.values, self.pool = values, pool
        self.shown, self.pixels = (torch.from_numpy(array).to(self.device) for array in (values, pixels))
        self.embedding_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def _batches(self, phase: FramePhase, rng: random.Random) -> Iterator[FrameBatch]:
        steps = [(phase, rng.getrandbits(62)) for _ in range(self.chunk_steps)]
        yield from self.pool.imap(partial(_draw, bank=self.values), steps)

    def _losses(self, batch: FrameBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per question, then per frame: kind, mean loss of its answer, share of its tokens right, all of them right.

        A frame is asked which words its mean output points to. The language model's questions alone teach the tower
        colours and shapes, and left handwritten digits at chance for eight minutes.
        """
        llava, images = self.model.model, self._send(batch.images)
        with self.autocast():
            frames = frame_model.marked_frames(self.pixels[images], self._send(batch.marks))
            # As LlavaModel.get_image_features: the last layer's states without the class token.
            seen = llava.vision_tower(pixel_values(frames)).last_hidden_state[:, 1:]
            seen = llava.multi_modal_projector(seen).to(self.embedding_dtype)
        aligned = self._alignment(seen, self.shown[images].long())
        if not len(batch.kind):
            return aligned
        return tuple(torch.cat(pair) for pair in zip(self._answers(batch, seen), aligned, strict=True))

    def _answers(self, batch: FrameBatch, seen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same per question alone; `seen` [n, TOKENS, hidden] stands for the image tokens."""
        tokens, image_at, predicting, target, question, kind = (
            self._send(part)
            for part in (batch.tokens, batch.image_at, batch.predicting, batch.target, batch.question, batch.kind)
        )
        language = self.model.model.language_model
        with self.autocast():
            embedded = self.model.get_input_embeddings()(tokens.long()).to(self.embedding_dtype).flatten(0, 1)
            embedded = embedded.index_copy(0, image_at, seen.flatten(0, 1)).view(*tokens.shape, -1)
            hidden = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[predicting])
        token_loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        right = (logits.detach().argmax(-1) == target).float()
        sums = torch.zeros(len(batch.kind), 3, device=self.device)
        parts = torch.stack([token_loss, right, torch.ones_like(right)], 1)
        loss, correct, count = sums.index_add(0, question, parts).unbind(1)
        return kind, loss / count, (correct / count).detach(), (correct == count).detach()

    def _alignment(self, seen: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same per frame, of `values` [F, 5]. The words stay where they are: images come to them."""
        logits = frame_model.alignment_logits(seen, self.model.get_input_embeddings().weight.detach())
        losses = [
            torch.nn.functional.cross_entropy(part, value, reduction="none")
            for part, value in zip(logits, values.T, strict=True)
        ]
        right = torch.stack([part.argmax(-1) for part in logits], 1) == values
        kind = torch.full((len(values),), self.kinds.index(frame_curriculum.ALIGNMENT), device=self.device)
        return kind, torch.stack(losses, 1).mean(1), right.float().mean(1), right.all(1)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        """To the device; without waiting for what it is doing."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def _draw(step: tuple[FramePhase, int], bank: np.ndarray) -> FrameBatch:
    return frame_curriculum.draw(*step, bank)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.training.vision", description=__doc__)
    parser.add_argument("--minutes", type=float, default=18.0, help="training time over all runs, without evaluation")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, help="minutes after which this run's training ends"
    )
    parser.add_argument("--out", type=Path, help="folder for checkpoint/ and log.jsonl")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="checkpoint folder to go on from")
    parser.add_argument(
        "--text-model", type=Path, metavar="MODEL", help="begin with the layers and words of this Llama checkpoint"
    )
    parser.add_argument("--export", type=Path, metavar="MODEL", help="write the model of --resume there, and end")
    parser.add_argument("--chunks", type=int, help="train this many chunks of 48 steps instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--toy", action="store_true", help="a smaller model at 512 tokens, for a CPU")
    options = parser.parse_args()
    if (options.export or options.out) is None or (options.export and not options.resume):
        parser.error("expected --out DIR, or --export MODEL with --resume CHECKPOINT")
    logging.set_verbosity_error()
    shape, phases = (
        (frame_model.TOY, frame_curriculum.TOY) if options.toy else (frame_model.FULL, frame_curriculum.FULL)
    )
    model = frame_model.build(shape, options.seed)
    if options.text_model:
        frame_model.begin_with(model, options.text_model, options.seed)
    if options.export:
        trainer = FrameTrainer(
            model, phases, Budget(1.0), values=np.empty(0), pixels=np.empty(0), pool=None, seed=0,
            learning_rate=0.0, out=options.export,
        )  # fmt: skip
        trainer.load(options.resume)
        frame_model.export(model, options.export)
        return

    # Forked before CUDA is up.
    with multiprocessing.get_context("fork").Pool(max(1, len(os.sched_getaffinity(0)) - 1)) as pool:
        few = 16 if options.toy else 1
        values, pixels = render_bank(BANK // few, False, pool)
        test_values, test_pixels = render_bank(TEST_BANK // few, True, pool)
        print(f"{len(values)} frames rendered after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        if device.type == "cuda":
            # A layer that cannot be compiled runs uncompiled: slower, but the lease is not lost.
            torch._dynamo.config.suppress_errors = True
        trainer = FrameTrainer(
            model.to(device), phases, Budget(60 * options.minutes, options.chunks), values=values, pixels=pixels,
            pool=pool, seed=options.seed, learning_rate=options.learning_rate, out=options.out,
        )  # fmt: skip
        if options.resume:
            trainer.load(options.resume)
            print(f"going on after {trainer.position.seconds:.0f} s of training", file=sys.stderr)
        trainer.run(60 * options.stop_after - (time.monotonic() - began))
    evaluate(trainer, {640: 4} if options.toy else EVALUATED, test_values, torch.from_numpy(test_pixels).to(device))
    if device.type == "cuda":
        print(f"most GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", file=sys.stderr)


def evaluate(trainer: FrameTrainer, lengths: dict[int, int], values: np.ndarray, pixels: torch.Tensor) -> None:
    """Accuracy of the model as it is exported, on held-out frames and digits, to the log."""
    model = frame_model.exported(trainer.model).to(trainer.device).eval()
    for length, documents in lengths.items():
        start = time.monotonic()
        found = {
            name: frame_model.accuracy(model, name, length, documents, values, pixels) for name in frame_tasks.NAMES
        }
        trainer.log({"evaluated": length, "documents": documents, "exact_and_token_accuracy": found})
        parts = "  ".join(f"{name} {exact:.3f}" for name, (exact, _) in found.items())
        print(f"exact at {length:5d}: {parts}  ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
