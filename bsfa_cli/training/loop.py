"""The training loop: in chunks of a few steps, each a function of the seed, the chunk's number and the time spent.

A checkpoint stands between chunks, so a resumed run sees the data that an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bsfa_kernels.files import write_together
from safetensors import safe_open
from safetensors.torch import load_file, save

from ..data.questions import HELD_OUT
from . import curriculum
from .curriculum import KINDS, Phase, Rows

WARMUP_STEPS = 200
CHECKPOINT_SECONDS = 100.0
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Position:
    """How far training is: chunks done, and the seconds they took over all runs."""

    chunk: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Ends training, by time or, where `chunks` is given, by their number (the same result on every machine)."""

    seconds: float
    chunks: int | None = None

    def progress(self, position: Position) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(1.0, position.chunk / self.chunks if self.chunks else position.seconds / self.seconds)

    def half(self) -> Position:
        """Where the curriculum goes from short to long for the second time."""
        return Position(self.chunks // 2) if self.chunks else Position(0, self.seconds / 2)


class Trainer:
    """AdamW on the answers' tokens of a LlamaForCausalLM. `out` gets checkpoint/ and log.jsonl.

    A subclass for another kind of document has its own `kinds`, `_batches` and `_losses`.
    """

    kinds: tuple[str, ...] = KINDS
    chunk_steps = 16

    def __init__(self, model, phases: tuple[Phase, ...], budget: Budget, *, seed: int, learning_rate: float, out: Path):
        self.model, self.phases, self.budget, self.seed, self.out = model, phases, budget, seed, out
        self.learning_rate = learning_rate
        self.device = next(model.parameters()).device
        self.position = Position()
        self._printed = -math.inf
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() >= 2]
        vectors = [parameter for parameter in trained if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
            lr=learning_rate, betas=(0.9, 0.98), fused=self.device.type == "cuda",
        )  # fmt: skip
        if self.device.type == "cuda":
            for layer in model.get_decoder().layers:
                layer.compile(dynamic=False)

    def run(self, stop_after: float = math.inf) -> None:
        """Train until the budget is spent, or for `stop_after` seconds, and write a checkpoint."""
        began = saved = time.monotonic()
        while self.budget.progress(self.position) < 1 and time.monotonic() - began < stop_after:
            self._chunk()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def _chunk(self) -> None:
        start = time.monotonic()
        chunk, progress = self.position.chunk, self.budget.progress(self.position)
        rng = random.Random(f"bsfa training {self.seed} {chunk}")
        phase = curriculum.choose(self.phases, progress, rng)
        results = []
        for step, batch in enumerate(self._batches(phase, rng)):
            rate = self._rate(chunk * self.chunk_steps + step, progress)
            results.append(self._step(batch, rate))
        by_kind = _by_kind(self.kinds, *(torch.cat(column) for column in zip(*results, strict=True)))
        seconds = time.monotonic() - start
        self.position = Position(chunk + 1, self.position.seconds + seconds)
        self.log({
            "step": (chunk + 1) * self.chunk_steps, "progress": round(progress, 4),
            "seconds": round(self.position.seconds, 2), "length": phase.length, "rows": phase.rows,
            "learning_rate": rate, "tokens_per_second": round(self.chunk_steps * phase.rows * phase.length / seconds),
            "kinds": by_kind,
        })  # fmt: skip

    def _rate(self, step: int, progress: float) -> float:
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay

    def _batches(self, phase: Phase, rng: random.Random) -> Iterator[Rows]:
        """What the steps of a chunk train on."""
        generator = torch.Generator(self.device).manual_seed(rng.getrandbits(62) & ~HELD_OUT)
        rows = curriculum.draw(phase, self.chunk_steps, rng, generator)
        for step in range(self.chunk_steps):
            yield rows.slice(step * phase.rows, (step + 1) * phase.rows)

    def _step(self, batch, rate: float) -> tuple[torch.Tensor, ...]:
        """One update; returns what `_losses` does."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kind, loss, *found = self._losses(batch)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return kind, loss.detach(), *found

    def _losses(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per row: kind, mean loss of the answers, share of their tokens right, last question right."""
        with self.autocast():
            hidden = self.model.model(input_ids=rows.tokens, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, :-1])
        targets, weight = rows.tokens[:, 1:], rows.weight[:, 1:]
        logits, choices = logits.float(), torch.cat([targets[..., None], rows.others[:, 1:]], -1)
        chosen = logits.gather(-1, choices.clamp(min=0)).masked_fill(choices < 0, -torch.inf)
        loss = ((logits.logsumexp(-1) - chosen.logsumexp(-1)) * weight).sum(1)
        right = (logits.detach().argmax(-1, keepdim=True) == choices).any(-1)
        return rows.kind, loss, (right * weight).sum(1), (right | ~rows.final[:, 1:]).all(1)

    def autocast(self):
        """bfloat16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def log(self, entry: dict) -> None:
        """Append to log.jsonl; every ten seconds, print [loss/last question right] by kind."""
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        if "kinds" in entry and time.monotonic() - self._printed > 10:
            self._printed = time.monotonic()
            kinds = " ".join(f"{name} {value[0]:.2f}/{value[2]:.2f}" for name, value in entry["kinds"].items())
            print(
                f"{entry['seconds']:7.1f} s  step {entry['step']:6d}  {entry['length']:5d} tokens  "
                f"{entry['tokens_per_second'] / 1e6:.2f} M tokens/s  {kinds}", file=sys.stderr, flush=True,
            )  # fmt: skip

    def save(self) -> None:
        """Weights, moments and position, each under 16 MiB, to out/checkpoint."""
        folder = self.out / "checkpoint"
        named = dict(self.model.named_parameters())
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        metadata = {"chunk": str(self.position.chunk), "seconds": repr(self.position.seconds)}
        contents = {"weights": {name: parameter.detach() for name, parameter in named.items()}}
        for moment in MOMENTS if self.position.chunk else ():
            contents[moment] = {name: self.optimizer.state[parameter][moment] for name, parameter in trained.items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_together(
            {
                folder / f"{name}.safetensors": save(
                    {key: x.cpu().contiguous() for key, x in tensors.items()}, metadata
                )
                for name, tensors in contents.items()
            }
        )

    def load(self, folder: Path | None = None) -> None:
        """Go on from `folder`, by default out/checkpoint."""
        folder = folder or self.out / "checkpoint"
        with safe_open(folder / "weights.safetensors", "pt") as file:
            metadata = file.metadata()
        self.position = Position(int(metadata["chunk"]), float(metadata["seconds"]))
        moments = MOMENTS if self.position.chunk else ()
        tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("weights", *moments)}
        step = torch.tensor(float(self.position.chunk * self.chunk_steps), device=self.device)
        for name, parameter in self.model.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors["weights"][name])
            if not (moments and parameter.requires_grad):
                continue
            self.optimizer.state[parameter] = {
                "step": step.clone() if self.device.type == "cuda" else step.cpu().clone(),
                **{moment: tensors[moment][name].to(parameter) for moment in MOMENTS},
            }


def _by_kind(kinds: tuple[str, ...], kind: torch.Tensor, *columns: torch.Tensor) -> dict[str, list[float]]:
    """Means of the columns [loss, token accuracy, last question right] by kind."""
    one_hot = torch.nn.functional.one_hot(kind, len(kinds)).float()
    means = torch.stack([column.float() @ one_hot for column in columns], 1) / one_hot.sum(0)[:, None]
    return {
        name: [round(value, 4) for value in row]
        for name, row in zip(kinds, means.tolist(), strict=True)
        if not math.isnan(row[0])
    }
