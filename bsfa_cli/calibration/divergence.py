"""What leaving out tiles does to the model's predictions: KL divergence to second order, by one backward pass a sample.

Without the tiles D the output of a row of a head moves, exactly, by

    d = sum over keys j in D of p[j] (out - v[j]) / (1 - softmax mass in D)

Let g be the gradient, by that output, of the sum over all positions of log p(y), where every target y is drawn from the
model's own prediction. Draws are independent and their scores have mean 0, so terms between positions vanish, and
(g . d)^2 / 2 has for its expectation the KL divergence, summed over all positions, between the predictions without and
with the change: Fisher's information along d. One draw a sample is a noisy estimate of a row; what is kept is the sum
over the rows of a query head in an octave of the position, and over samples, for every threshold of a gate's grid.

`bsfa_kernels.drop_costs` computes these, on a GPU by streaming keys and values as attention does. What this leaves out:
that the changes of several rows, heads and layers may add up or cancel.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from bsfa_kernels import block_sparse_attention, drop_costs, tile_statistics
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import attach
from torch.utils.checkpoint import checkpoint

from ..data.texts import Sample
from ..errors import InputError
from ..metrics.logits import LOGITS_PER_CHUNK, Head
from ..models.prompts import Prompt
from ..suites.run import dense_handlers
from .curves import FIXED_POINT, ModuleCurves


class Watched(torch.autograd.Function):
    """`out` as it is; on the way back `look(gradient, out, q, k, v)` is called. Saved tensors obey checkpointing."""

    @staticmethod
    def forward(ctx, out, q, k, v, look):
        ctx.save_for_backward(out, q, k, v)
        ctx.look = look
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient):
        ctx.look(gradient, *ctx.saved_tensors)
        return gradient, None, None, None, None


class Probe:
    """A handler for `bsfa_kernels.integrations.transformers.attach`: differentiable dense attention, whose backward
    pass adds to the `kl` of `curves`. `backend` is that of `drop_costs`.
    """

    knows_scoring = True

    def __init__(self, curves: ModuleCurves, backend: str = "auto"):
        self.curves, self._backend = curves, backend
        self.blind = False  # whether it attended without a gradient: its tiles would seem to cost nothing
        self.finite: list[torch.Tensor] = []  # whether each gradient was

    def __call__(
        self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, groups=None, **scoring
    ) -> torch.Tensor:  # fmt: skip
        """As `Collector.__call__`. Raises InputError for rows that stand in groups."""
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(f"calibration takes one whole sequence at a time, got {list(q.shape)}, {list(k.shape)}")
        if groups is not None:
            raise InputError("gradients do not know images whose tokens see one another both ways; give --no-gradients")
        out = dense.attention(q, k, v, scale=scale, causal=causal, spans=spans, **scoring)
        look = partial(self._look, dict(scale=scale, causal=causal), spans, scoring)
        self.blind = self.blind or not out.requires_grad
        return Watched.apply(out, q, k, v, look) if out.requires_grad else out

    @torch.no_grad()
    def _look(self, options: dict, spans: torch.Tensor | None, scoring: dict, gradient, out, q, k, v) -> None:
        self.finite.append(gradient.isfinite().all())
        curves, tile = self.curves, self.curves.plan.tile
        options = options | {key: value for key, value in scoring.items() if key != "sinks"} | dict(tile=tile)
        lse = block_sparse_attention(
            q, k, v, spans=spans, return_lse=True, sinks=scoring.get("sinks"), **options
        ).lse  # fmt: skip
        query_tiles = -(-q.shape[2] // tile.rows)  # with spans the statistics may have one more, an empty one
        statistics = tile_statistics(q, k, lse, spans=spans, **options)
        maximum, gap = (x[:, :, :query_tiles] for x in (statistics.maximum, statistics.gap))
        cells = [curves.cells("gap", gap, gap), curves.cells("absolute", maximum, gap)]
        entries = [curves.tensors[f"{gate}.kl"].shape[2] for gate in ("gap", "absolute")]
        costs = drop_costs(
            q, k, v, out, gradient, lse, cells, entries, unit=FIXED_POINT, backend=self._backend, **options
        )  # fmt: skip
        for gate, cost in zip(("gap", "absolute"), costs, strict=True):
            curves.tensors[f"{gate}.kl"].index_add_(1, curves.octaves[:query_tiles], cost[0])


def backward(
    model, sample: Sample, curves: Mapping[str, ModuleCurves], head: Head, backend: str = "auto"
) -> None:  # fmt: skip
    """One forward and backward pass over `sample`, layers recomputed on the way back, adding to `curves`. `backend` is
    that of `bsfa_kernels.drop_costs`.

    Raises InputError where a gradient is not finite, or reaches a module not at all.
    """
    prompt = Prompt.of(sample, model)
    probes = {path: Probe(module, backend) for path, module in curves.items()}
    blocks = dict.fromkeys(path.rpartition(".")[0] for path in curves)
    handlers = dense_handlers(model) | probes
    with torch.enable_grad(), attach(model, handlers), _prepared(model, blocks), _reproducible():
        for tensor in prompt.inputs.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()  # from pixels on too
        hidden = head.hidden(prompt)
        blind = [path for path, probe in probes.items() if probe.blind]
        if blind or not hidden.requires_grad:
            raise InputError(f"no gradient reaches {', '.join(blind[:3]) or 'the embeddings'}; give --no-gradients")
        gradient = _score(head, hidden.detach(), sample.id)
        if not bool(gradient.isfinite().all()):
            raise InputError(f"a gradient is not finite on sample {sample.id}; try --dtype bfloat16, or --no-gradients")
        hidden.backward(gradient)
        if not all(bool(each) for probe in probes.values() for each in probe.finite):
            raise InputError(f"a gradient is not finite on sample {sample.id}; try --dtype bfloat16, or --no-gradients")


def _score(head: Head, hidden: torch.Tensor, name: str) -> torch.Tensor:
    """Gradient of the log-probability of drawn targets by the final hidden states [T, hidden]."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradient = torch.empty_like(hidden)
    chunk = max(16, LOGITS_PER_CHUNK // head.vocabulary)
    for start in range(0, len(hidden), chunk):
        part = hidden[start : start + chunk].requires_grad_()
        log_p = head.logits(part).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (gradient[start : start + chunk],) = torch.autograd.grad(log_p.gather(1, drawn).sum(), part)
    return gradient


@contextmanager
def _reproducible() -> Iterator[None]:
    """PyTorch's backward passes sum in the same order each time, as those of attention on a GPU otherwise do not, so
    that a run ends in the same bytes however it came there. What has no such order runs as ever.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging, and takes time
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filling


@contextmanager
def _prepared(model, blocks) -> Iterator[None]:
    """Gradients flow from the embeddings on and to no weight, and `blocks` keep only what comes into them."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        for parameter in wanted:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        stack.callback(hook.remove)
        for path in blocks:
            block = model.get_submodule(path)
            stack.callback(vars(block).pop, "forward", None)
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
