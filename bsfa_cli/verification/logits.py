"""What skipping does to the model's predictions: KL divergence, top-1 agreement, perplexity.

Logits of 32k positions over a vocabulary of 128k never exist at once: final hidden states are kept, and the language
model head is applied to a few hundred positions at a time.
"""

from __future__ import annotations

import torch

from ..errors import InputError

LOGITS_PER_CHUNK = 2**26


class Head:
    """The step from final hidden states to logits, checked against the model's own.

    Raises InputError where the model computes its logits in a way that is not known here, or they are not finite.
    """

    def __init__(self, model):
        config = model.config.get_text_config()
        self.base = model.base_model
        self._projection = model.get_output_embeddings()
        self.vocabulary = self._projection.weight.shape[0]
        self._softcap = getattr(config, "final_logit_softcapping", None)
        # Granite divides its logits, Cohere multiplies them.
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        tokens = torch.arange(8, device=model.device)[None] % config.vocab_size
        expected = model(input_ids=tokens, use_cache=False).logits[0].float()
        if not expected.isfinite().all():
            raise InputError(f"{type(model).__name__} gives logits that are not finite, with every tile kept")
        error = (self.logits(self.hidden(tokens[0])) - expected).abs().max()
        if not error <= 0.02 * expected.abs().max():
            raise InputError(f"{type(model).__name__} computes its logits in a way that bsfa verify does not know")

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, hidden] of one sequence of tokens [T], in a single prefill."""
        return self.base(input_ids=tokens[None], use_cache=False).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [T, vocabulary] of hidden states [T, hidden]."""
        logits = self._projection(hidden.to(self._projection.weight.dtype)).float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class Predictions:
    """Dense against sparse predictions, summed over positions and samples."""

    def __init__(self):
        self.positions = self.predicted = 0
        self._sums = {"kl": 0.0, "agree": 0.0, "dense": 0.0, "sparse": 0.0}
        self.finite = True

    def add(self, head: Head, dense: torch.Tensor, sparse: torch.Tensor, tokens: torch.Tensor) -> None:
        """dense, sparse: final hidden states [T, hidden] of `tokens` [T]."""
        length = len(tokens)
        self.positions += length
        self.predicted += length - 1
        chunk = max(16, LOGITS_PER_CHUNK // head.vocabulary)
        for start in range(0, length, chunk):
            rows = slice(start, min(start + chunk, length))
            expected, actual = (head.logits(hidden[rows]).log_softmax(-1) for hidden in (dense, sparse))
            self._add_chunk(expected, actual, tokens[rows.start + 1 : rows.stop + 1])

    def _add_chunk(self, expected, actual, targets) -> None:
        self.finite = self.finite and bool(actual.isfinite().all())
        sums = torch.stack([
            (expected.exp() * (expected - actual)).sum(dtype=torch.float64),
            (expected.argmax(-1) == actual.argmax(-1)).sum().double(),
            *(-x[: len(targets)].gather(1, targets[:, None]).sum(dtype=torch.float64) for x in (expected, actual)),
        ])  # fmt: skip
        for name, value in zip(self._sums, sums.tolist(), strict=True):
            self._sums[name] += value

    def summary(self) -> dict[str, float]:
        """JSON: kl (nats per position), top1 (share of positions), perplexities and their relative increase."""
        dense, sparse = (self._sums[name] / max(self.predicted, 1) for name in ("dense", "sparse"))
        return {
            "positions": self.positions,
            "kl": self._sums["kl"] / self.positions,
            "top1": self._sums["agree"] / self.positions,
            "perplexity_dense": _exp(dense),
            "perplexity_sparse": _exp(sparse),
            "perplexity_increase": _exp(sparse - dense) - 1,
        }


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())
