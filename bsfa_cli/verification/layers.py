"""What skipping does inside each layer: output error and dropped softmax mass, by query head."""

from __future__ import annotations

import torch
from bsfa_kernels import Attention, Gate
from bsfa_kernels.integrations.groups import exact_attention
from bsfa_kernels.integrations.sparse import SparseAttention
from bsfa_kernels.integrations.visual_tokens import VisualTokens
from bsfa_kernels.modality import MODALITIES
from bsfa_kernels.reference import Scoring

from .kernel import KernelCheck, check_kernel

BINS = 4096


class DroppedMass:
    """Softmax mass that rows lost: mean, 99th percentile and worst, by head, summed on the device.

    Percentiles come from a histogram over the square root of the mass, so they are upper bounds that are off by at
    most (2 * sqrt(mass) + 1 / BINS) / BINS: 5e-5 at a mass of 0.01.
    """

    def __init__(self, heads: int, device: torch.device):
        self.rows = 0
        self.total = torch.zeros(heads, dtype=torch.float64, device=device)
        self.worst = torch.zeros(heads, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(heads, BINS + 1, dtype=torch.float64, device=device)

    def add(self, dropped: torch.Tensor) -> None:
        """dropped [heads, rows], 0 .. 1."""
        self.rows += dropped.shape[1]
        self.total += dropped.sum(1, dtype=torch.float64)
        self.worst = torch.maximum(self.worst, dropped.amax(1).double())
        # Two log-sum-exps of the same row differ by rounding; that is not mass.
        bins = (dropped.sqrt() * BINS).ceil().long().masked_fill(dropped < 1e-6, 0)
        self.histogram.scatter_add_(1, bins, torch.ones_like(dropped, dtype=torch.float64))

    def by_head(self) -> list[dict[str, float]]:
        tails = [_percentile(row) for row in self.histogram.cpu()]
        return [
            {"mean": total / max(self.rows, 1), "p99": tail, "worst": worst}
            for total, tail, worst in zip(self.total.tolist(), tails, self.worst.tolist(), strict=True)
        ]

    @staticmethod
    def overall(parts: list[DroppedMass]) -> dict[str, float]:
        """One summary over all heads of several modules."""
        rows = sum(part.rows * len(part.total) for part in parts)
        return {
            "mean": sum(float(part.total.sum()) for part in parts) / max(rows, 1),
            "p99": _percentile(sum(part.histogram.sum(0).cpu() for part in parts)),
            "worst": max(float(part.worst.max()) for part in parts),
        }


def _percentile(histogram: torch.Tensor, share: float = 0.99) -> float:
    total = float(histogram.sum())
    if not total:
        return 0.0
    index = int((histogram.cumsum(0) < share * total).sum())
    return (index / BINS) ** 2


class MeasuringAttention:
    """A handler that attends at an operating point and, on the same queries, keys and values, densely beside it.

    Errors are therefore each layer's own, on the inputs it really gets in the sparse model. `language`: what is known
    of the tokens that stand for images; None in a vision tower.
    """

    knows_scoring = True

    def __init__(self, sparse: SparseAttention, check_kernel: bool, language: VisualTokens | None = None):
        self.sparse = sparse
        # What thresholds are chosen by and what results are told apart by are the same tokens.
        self.visual = None if language is None else sparse.visual or language
        self.modal: torch.Tensor | None = None  # float64 [modalities, kept, candidates, dropped mass, rows]
        self.kernel: KernelCheck | None = None
        self.dropped: DroppedMass | None = None
        self.scores: str | None = None  # that ran
        self._check_kernel = check_kernel
        self._sums = None

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring) -> torch.Tensor:
        common = dict(scale=scale, causal=causal, spans=spans, return_lse=True, **scoring)
        sparse = self.sparse.attend(q, k, v, return_counts=True, **common)
        dense = whole = exact_attention(q, k, v, backend=self.sparse.backend, **common)
        self.scores = self.sparse.scores_of(q, v)
        if self.scores != "exact":  # the same scores with nothing skipped: what they cost by themselves
            whole = self.sparse.run(q, k, v, Gate(), **common)
        if self._sums is None:
            heads = q.shape[1]
            self.dropped = DroppedMass(heads, q.device)
            self._sums = torch.zeros(6, heads, dtype=torch.float64, device=q.device)
        lost = -torch.expm1(sparse.lse - whole.lse)
        finite = sparse.out.isfinite().flatten(2).all(2).all(0) & lost.isfinite().flatten(2).all(2).all(0)
        self.dropped.add(lost.nan_to_num(1.0).clamp(0, 1).transpose(0, 1).flatten(1))
        self._sums[0] += sparse.kept.sum((0, 2))
        self._sums[1] += sparse.candidates.sum((0, 2))
        self._sums[4] += ~finite
        for head in range(q.shape[1]):  # one head at a time: float32 copies of a whole layer would be large
            exact = dense.out[:, head].float()
            self._sums[2, head] += (sparse.out[:, head].float() - exact).square().sum(dtype=torch.float64)
            self._sums[3, head] += exact.square().sum(dtype=torch.float64)
            if whole is not dense:
                self._sums[5, head] += (whole.out[:, head].float() - exact).square().sum(dtype=torch.float64)
        if self.visual is not None:
            self._tell_apart(sparse, lost, spans)
        if self._check_kernel and self.kernel is None:
            self.kernel = check_kernel(
                self.sparse, q, k, v, Scoring(scale, causal, scoring.get("window"), scoring.get("softcap")),
                scoring.get("sinks"),
            )  # fmt: skip
        return sparse.out

    def _tell_apart(self, sparse: Attention, lost: torch.Tensor, spans: torch.Tensor | None) -> None:
        """Add one whole sequence's tiles and dropped mass [1, Hq, T] to the sums of their query tiles' modalities."""
        (batch, heads, length), rows, tiles = lost.shape, self.sparse.thresholds.tile.rows, sparse.kept.shape[2]
        modality = self.visual.tiles(0, batch, length, rows, tiles, spans, lost.device)
        if modality is None or batch != 1:
            return
        if self.modal is None:
            self.modal = torch.zeros(len(MODALITIES), 4, dtype=torch.float64, device=lost.device)
        padded = torch.nn.functional.pad(lost[0].double().clamp(0, 1).sum(0), (0, tiles * rows - length))
        counts = heads * (length - rows * torch.arange(tiles, device=lost.device)).clamp(0, rows)
        sums = (sparse.kept[0].sum(0), sparse.candidates[0].sum(0), padded.unflatten(0, (tiles, rows)).sum(1), counts)
        self.modal.index_add_(0, modality, torch.stack([x.double() for x in sums], 1))

    @property
    def ran(self) -> bool:
        return self._sums is not None

    def summary(self) -> dict:
        """JSON: path, tiles, skip, error (relative L2), the scores that ran and their error with nothing skipped (0 for
        exact ones), dropped mass, and the same for each head.
        """
        kept, candidates, error, norm, bad, rounding = self._sums.tolist()
        sums = zip(kept, candidates, error, norm, rounding, self.dropped.by_head(), strict=True)
        heads = [
            {
                "skip": skip_rate(k, c),
                "error": (e / n) ** 0.5 if n else 0.0,
                "scores_error": (r / n) ** 0.5 if n else 0.0,
                "dropped_mass": mass,
            }
            for k, c, e, n, r, mass in sums
        ]
        return {
            "path": self.sparse.path,
            "kept": int(sum(kept)),
            "candidates": int(sum(candidates)),
            "skip": skip_rate(sum(kept), sum(candidates)),
            "error": (sum(error) / sum(norm)) ** 0.5 if sum(norm) else 0.0,
            "scores": self.scores,
            "scores_error": (sum(rounding) / sum(norm)) ** 0.5 if sum(norm) else 0.0,
            "dropped_mass": DroppedMass.overall([self.dropped]),
            "finite": not any(bad),
            "heads": heads,
        }


def by_modality(handlers: list[MeasuringAttention]) -> dict[str, dict] | None:
    """JSON: {modality of the query tile: kept, candidates, skip, dropped_mass (mean over rows)}, over all modules; None
    where no token stands for an image.
    """
    told = [handler.modal.cpu() for handler in handlers if handler.modal is not None]
    if not told or not float(sum(told)[1:, 3].sum()):
        return None
    return {
        name: {
            "kept": int(kept), "candidates": int(candidates), "skip": skip_rate(kept, candidates),
            "dropped_mass": lost / rows,
        }
        for name, (kept, candidates, lost, rows) in zip(MODALITIES, sum(told).tolist(), strict=True)
        if rows
    }  # fmt: skip


def skip_rate(kept: float, candidates: float) -> float:
    return 1 - kept / candidates if candidates else 0.0
