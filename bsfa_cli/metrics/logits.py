"""What skipping does to the model's predictions: KL divergence, top-1 agreement, perplexity.

Of a prompt with images only positions count whose prediction is used: those before a token of text, and the last.

Logits of 32k positions over a vocabulary of 128k never exist at once: final hidden states are kept, and the language
model head is applied to a few hundred positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import InputError
from ..models.prompts import Prompt
from .intervals import interval

LOGITS_PER_CHUNK = 2**26
FIRST_OCTAVE = 512  # positions
SUMS = ("positions", "predicted", "kl", "agree", "dense", "sparse")
POSITIONS, PREDICTED, KL, AGREE, DENSE, SPARSE = range(len(SUMS))
STATISTICS = {  # of sums [..., SUMS]
    "kl": lambda x: x[..., KL] / x[..., POSITIONS],
    "top1": lambda x: x[..., AGREE] / x[..., POSITIONS],
    "perplexity_dense": lambda x: (x[..., DENSE] / x[..., PREDICTED]).exp(),
    "perplexity_sparse": lambda x: (x[..., SPARSE] / x[..., PREDICTED]).exp(),
    "perplexity_increase": lambda x: ((x[..., SPARSE] - x[..., DENSE]) / x[..., PREDICTED]).expm1(),
}


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

    def hidden(self, prompt: Prompt | torch.Tensor) -> torch.Tensor:
        """Final hidden states [T, hidden] of one sequence, a prompt or tokens [T], in a single prefill."""
        return self.base(**Prompt.wrap(prompt).inputs, use_cache=False).last_hidden_state[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [T, vocabulary] of hidden states [T, hidden]."""
        logits = self._projection(hidden.to(self._projection.weight.dtype)).float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)


class Predictions:
    """Dense against sparse predictions, summed by text and octave of the position."""

    def __init__(self):
        self.finite = True
        self._texts: list[torch.Tensor] = []  # float64 [octaves, sums], in the order of SUMS

    @classmethod
    def of(cls, texts: Iterable[list[list[float]]]) -> Predictions:
        """What `to_json` gave."""
        found = cls()
        found._texts = [torch.tensor(text, dtype=torch.float64) for text in texts]
        return found

    def to_json(self) -> list[list[list[float]]]:
        """Sums [octaves, SUMS] of every text."""
        return [text.tolist() for text in self._texts]

    def add(self, head: Head, dense: torch.Tensor, sparse: torch.Tensor, prompt: Prompt | torch.Tensor) -> None:
        """dense, sparse: final hidden states [T, hidden] of `prompt`, which may be tokens [T]."""
        found, finite = compare(head, dense, sparse, prompt)
        self.finite = self.finite and finite
        self._texts.append(by_octave(found))

    def texts(self) -> torch.Tensor:
        """float64 [texts, sums]."""
        return torch.stack([text.sum(0) for text in self._texts])

    def summary(self) -> dict:
        """JSON: kl (nats per position), top1 (share of positions), perplexities and their relative increase; 95 %
        `intervals` of these over the `texts` (None for too few), and the losses `by_position`.
        """
        texts = self.texts()
        sums = texts.sum(0)
        return {
            "positions": int(sums[POSITIONS]),
            "texts": len(texts),
            **{name: float(statistic(sums)) for name, statistic in STATISTICS.items()},
            "intervals": {name: interval(STATISTICS[name], texts) for name in ("kl", "top1", "perplexity_increase")},
            "by_position": self._by_position(),
        }

    def kl_over(self, floor: Predictions) -> dict:
        """JSON: by how much the divergence is above that of `floor`, on the same texts, with its interval."""
        texts = self.texts()
        texts[:, KL] -= floor.texts()[:, KL]
        return {"value": float(STATISTICS["kl"](texts.sum(0))), "interval": interval(STATISTICS["kl"], texts)}

    def _by_position(self) -> list[dict]:
        octaves = max(map(len, self._texts))
        total = sum(torch.nn.functional.pad(text, (0, 0, 0, octaves - len(text))) for text in self._texts)
        return [
            {
                "from": 0 if i == 0 else FIRST_OCTAVE << (i - 1),
                "to": FIRST_OCTAVE << i,
                "positions": int(sums[POSITIONS]),
                "kl": float(sums[KL] / sums[POSITIONS]),
                "top1": float(sums[AGREE] / sums[POSITIONS]),
                "loss_dense": float(sums[DENSE] / sums[PREDICTED]),
                "loss_sparse": float(sums[SPARSE] / sums[PREDICTED]),
            }
            for i, sums in enumerate(total)
            if sums[PREDICTED]
        ]


def compare(
    head: Head, dense: torch.Tensor, sparse: torch.Tensor, prompt: Prompt | torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """(float64 [T, sums] in the order of SUMS, whether every sparse prediction is finite), by position.

    The last position predicts a token that is not there: it counts for divergence and agreement only. Positions before
    a token of an image count for nothing.
    """
    prompt = Prompt.wrap(prompt)
    tokens, found, finite = prompt.tokens, [], True
    length = len(tokens)
    chunk = max(16, LOGITS_PER_CHUNK // head.vocabulary)
    for start in range(0, length, chunk):
        rows = slice(start, min(start + chunk, length))
        expected, actual = (head.logits(hidden[rows]).log_softmax(-1) for hidden in (dense, sparse))
        finite = finite and bool(actual.isfinite().all())
        targets = tokens[rows.start + 1 : rows.stop + 1]
        sums = torch.zeros(len(expected), len(SUMS), dtype=torch.float64, device=expected.device)
        sums[:, POSITIONS], sums[: len(targets), PREDICTED] = 1, 1
        sums[:, KL] = (expected.exp() * (expected - actual)).sum(-1, dtype=torch.float64)
        sums[:, AGREE] = (expected.argmax(-1) == actual.argmax(-1)).double()
        for column, x in ((DENSE, expected), (SPARSE, actual)):
            sums[: len(targets), column] = -x[: len(targets)].gather(1, targets[:, None])[:, 0].double()
        found.append(sums.masked_fill_(~prompt.predicts[rows, None], 0))
    return torch.cat(found), finite


def by_octave(rows: torch.Tensor) -> torch.Tensor:
    """float64 [octaves, sums] of rows [T, sums]: positions below FIRST_OCTAVE, then by powers of two."""
    octaves = max(0, (len(rows) - 1).bit_length() - FIRST_OCTAVE.bit_length() + 1) + 1
    edges = torch.tensor([FIRST_OCTAVE << i for i in range(octaves)], device=rows.device)
    octave = torch.bucketize(torch.arange(len(rows), device=rows.device), edges, right=True)
    return rows.new_zeros(octaves, rows.shape[1]).index_add_(0, octave, rows).cpu()
