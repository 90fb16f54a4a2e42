"""The largest skip rate at which a model still predicts well enough, by bisection over the points of a run.

    limit = Limit.parse("top1=0.99")
    found = Search(loaded, run, texts, "gap", 0.99).largest(limit)    # Found, or None: no rate is good enough

A rate is good enough when the far end of the metric's 95 % interval is: with few texts it is wide, and the rate found
is low. Neighbouring positions are alike, so the interval is over blocks of positions. Bisection takes the metric to get
no better as more is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules

from ..calibration import fit, points
from ..calibration.store import Run
from ..errors import MachineError, UsageError
from ..metrics.logits import AGREE, DENSE, POSITIONS, PREDICTED, SPARSE, Head, compare
from ..metrics.logits import KL as KL_SUM
from ..metrics.statistics import Z, wilson
from ..models.load import LoadedModel
from ..models.prompts import Prompt
from ..suites.run import dense_handlers, exact_instead

TOP1, KL, PERPLEXITY = "top1", "kl", "perplexity-increase"
METRICS = {TOP1: True, KL: False, PERPLEXITY: False}  # whether larger is better
BLOCK = 128  # positions
STEP = 0.01  # of the skip rate


@dataclass(frozen=True)
class Limit:
    """What a metric must stay above (top1) or below (kl, perplexity-increase)."""

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Of "top1=0.99". Raises UsageError."""
        metric, _, value = text.partition("=")
        try:
            limit = cls(metric.strip(), float(value))
        except ValueError:
            limit = None
        if limit is None or limit.metric not in METRICS or not 0 <= limit.value < math.inf:
            raise UsageError(f"--largest-skip-with takes {', '.join(METRICS)}, =, and a number from 0 on; got {text!r}")
        if limit.metric == TOP1 and limit.value > 1:
            raise UsageError(f"--largest-skip-with {text}: top1 is a share of positions, at most 1")
        return limit

    @property
    def name(self) -> str:
        return f"{self.metric}-{self.value:.10g}"

    def kept(self, measured: Measured) -> bool:
        """By the end of the interval; a number that is not one keeps no limit."""
        sign = 1 if METRICS[self.metric] else -1
        return sign * measured.worst >= sign * self.value


@dataclass(frozen=True)
class Measured:
    """A metric on the texts, and the end of its interval at which the model would be worse."""

    value: float
    worst: float


@dataclass(frozen=True)
class Found:
    """The skip rate asked of the run, and what was measured with it."""

    rate: float
    measured: Measured
    positions: int

    def to_json(self, limit: Limit) -> dict:
        return asdict(limit) | {"rate": self.rate, "positions": self.positions} | asdict(self.measured)


class Search:
    """Dense predictions of `loaded` on `texts`, which have `tokens`, and sparse ones at any skip rate of `run`.

    `step` is called after every forward pass. Raises InputError as `points.export` and `Head`.
    """

    @torch.no_grad()
    def __init__(
        self, loaded: LoadedModel, run: Run, texts: list, gate: str, quantile: float,
        step: Callable[[], None] = lambda: None, scores: str | None = None, max_int8_error: float | None = None,
        by_modality: bool = False,
    ):  # fmt: skip
        self.by_modality = by_modality
        self.model, self.run, self.gate, self.quantile, self.step = loaded.model, run, gate, quantile, step
        self._scores = dict(scores=scores, max_int8_error=max_int8_error)
        self._modules = attention_modules(self.model)
        self._head = Head(self.model)
        self._prompts = [Prompt.of(text, self.model) for text in texts]
        self._exact = []
        with attach(self.model, dense_handlers(self.model)):
            for prompt in self._prompts:
                self._exact.append(self._head.hidden(prompt))
                step()
        _, curves = run.load("fit")
        self.rates = int(fit.Table.of(curves, gate).reach / STEP + 1e-9)  # how many steps the gate can reach
        self._seen: dict[int, dict[str, Measured]] = {}

    @property
    def positions(self) -> int:
        return sum(int(prompt.predicts.sum()) for prompt in self._prompts)

    def passes(self) -> int:
        """How many forward passes one limit takes at most, the dense ones included."""
        return len(self._prompts) * (1 + self.rates.bit_length())

    def largest(self, limit: Limit) -> Found | None:
        """The largest rate, in steps of STEP, that keeps `limit`; None where not even the first does."""
        low, high = 0, self.rates + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if limit.kept(self.at(middle)[limit.metric]) else (low, middle)
        return Found(round(low * STEP, 10), self.at(low)[limit.metric], self.positions) if low else None

    @torch.no_grad()
    def at(self, steps: int) -> dict[str, Measured]:
        """{metric: what is measured} at a skip rate of `steps` * STEP."""
        if steps not in self._seen:
            request = points.Request("target-skip", round(steps * STEP, 10), self.gate)
            artifact, *_ = points.export(
                self.run, [request], self.quantile, by_modality=self.by_modality, **self._scores
            )
            blocks = []
            with attach(self.model, SparseAttention.for_model(artifact, self._modules)):
                for prompt, exact in zip(self._prompts, self._exact, strict=True):
                    blocks += self._blocks(exact, self._head.hidden(prompt), prompt)
                    self.step()
            instead = [] if artifact.points[0].scores == "exact" else exact_instead(self.model)
            if instead:
                raise MachineError("; ".join(instead))
            self._seen[steps] = measure(torch.tensor(blocks, dtype=torch.float64))
        return self._seen[steps]

    def _blocks(self, dense_hidden, sparse_hidden, prompt: Prompt) -> list[list[float]]:
        """Positions, of them predicted tokens, and sums of agreement, KL and lost log-likelihood, of every block that
        has any.
        """
        rows, _ = compare(self._head, dense_hidden, sparse_hidden, prompt)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % BLOCK))
        sums = padded.unflatten(0, (-1, BLOCK)).sum(1)
        sums = sums[sums[:, POSITIONS] > 0]
        lost = sums[:, SPARSE] - sums[:, DENSE]
        return torch.stack([*sums[:, [POSITIONS, PREDICTED, AGREE, KL_SUM]].T, lost], 1).tolist()


def measure(blocks: torch.Tensor) -> dict[str, Measured]:
    """{metric: Measured} of float64 [blocks, 5]: positions, predicted tokens, sums of agreement, KL and lost
    log-likelihood.
    """
    positions, predicted, agree, kl, lost = blocks.unbind(1)
    share, spread = _ratio(agree, positions)
    # Blocks that all agree say nothing about the spread, yet a finite number of positions leaves some doubt.
    doubt, _ = wilson(round(float(agree.sum())), round(float(positions.sum())))
    divergence, divergence_spread = _ratio(kl, positions)
    increase, increase_spread = _ratio(lost, predicted)
    return {
        TOP1: Measured(share, min(share - Z * spread, doubt)),
        KL: Measured(divergence, divergence + Z * divergence_spread),
        PERPLEXITY: Measured(_growth(increase), _growth(increase + Z * increase_spread)),
    }


def _growth(log_ratio: float) -> float:
    return math.expm1(log_ratio) if log_ratio < 700 else math.inf


def _ratio(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """(the mean, its standard error) of what blocks hold `sums` of in `counts` places; infinite for one block."""
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, math.inf
    variance = len(sums) / (len(sums) - 1) * float((sums - mean * counts).square().sum())
    return mean, math.sqrt(variance) / float(counts.sum())
