"""What leaving out tiles does to the model's predictions: KL divergence to second order, by one backward pass a sample.

Without the tiles D the output of a row of a head moves, exactly, by

    d = sum over keys j in D of p[j] (out - v[j]) / (1 - softmax mass in D)

Let g be the gradient, by that output, of the sum over all positions of log p(y), where every target y is drawn from the
model's own prediction. Draws are independent and their scores have mean 0, so terms between positions vanish, and
(g . d)^2 / 2 has for its expectation the KL divergence, summed over all positions, between the predictions without and
with the change: Fisher's information along d. One draw a sample is a noisy estimate of a row; what is kept is the sum
over the rows of a query head in an octave of the position, and over samples, for every threshold of a gate's grid.

What this leaves out: that the changes of several rows, heads and layers may add up or cancel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from bsfa_kernels import TileStatistics, block_sparse_attention, tile_statistics
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import attach
from torch.utils.checkpoint import checkpoint

from ..data.texts import Sample
from ..errors import InputError
from ..metrics.logits import LOGITS_PER_CHUNK, Head
from ..models.prompts import Prompt
from ..suites.run import dense_handlers
from .curves import FIXED_POINT, GRIDS, ModuleCurves

SCORES_AT_ONCE = 1 << 25
MOST = 1.0  # nats that a row counts at most: the second order says nothing of larger changes, and sums stay in int64


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
    pass adds to the `kl` of `curves`.
    """

    knows_scoring = True

    def __init__(self, curves: ModuleCurves):
        self.curves = curves
        self.blind = False  # whether it attended without a gradient: its tiles would seem to cost nothing

    def __call__(
        self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring
    ) -> torch.Tensor:  # fmt: skip
        """As `Collector.__call__`."""
        if q.shape[0] != 1 or q.shape[2] != k.shape[2]:
            raise ValueError(f"calibration takes one whole sequence at a time, got {list(q.shape)}, {list(k.shape)}")
        out = dense.attention(q, k, v, scale=scale, causal=causal, spans=spans, **scoring)
        look = partial(self._look, dict(scale=scale, causal=causal, spans=spans), scoring)
        self.blind = self.blind or not out.requires_grad
        return Watched.apply(out, q, k, v, look) if out.requires_grad else out

    @torch.no_grad()
    def _look(self, options: dict, scoring: dict, gradient, out, q, k, v) -> None:
        options = options | {key: value for key, value in scoring.items() if key != "sinks"}
        tile = self.curves.plan.tile
        lse = block_sparse_attention(
            q, k, v, return_lse=True, sinks=scoring.get("sinks"), tile=tile, **options
        ).lse  # fmt: skip
        query_tiles = -(-q.shape[2] // tile.rows)
        statistics = TileStatistics(*(x[:, :, :query_tiles] for x in tile_statistics(q, k, lse, tile=tile, **options)))
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            one = (x[0, head].float() for x in (gradient, out, q))
            shared = (x[0, head // group].float() for x in (k, v))
            _add(self.curves, head, statistics, lse[0, head], *one, *shared, options)


def _add(curves: ModuleCurves, head: int, statistics: TileStatistics, lse, gradient, out, q, k, v, options) -> None:
    """Add one head's costs: gradient, out, q [T, D], k, v [T, D], lse [T], all float32."""
    tile, length = curves.plan.tile, len(q)
    candidate = statistics.gap[0, head].isfinite()
    cells = {
        gate: torch.bucketize(torch.where(candidate, value[0, head], torch.inf), curves.grids[gate], right=True)
        for gate, value in (("gap", statistics.gap), ("absolute", statistics.maximum))
    }
    rows = max(1, SCORES_AT_ONCE // (length * tile.rows)) * tile.rows
    for start in range(0, length, rows):
        chunk = slice(start, min(start + rows, length))
        end = chunk.stop if options["causal"] else length
        p = _weights(q[chunk], k[:end], lse[chunk], start, options)  # [rows, end]
        g = gradient[chunk]
        moved = p * ((g * out[chunk]).sum(-1, keepdim=True) - g @ v[:end].T)
        moved, mass = (_by_tile(x, tile.keys).double() for x in (moved, p))  # [rows, key tiles]
        query_tile = torch.arange(chunk.start, chunk.stop, device=q.device) // tile.rows
        for gate, cell in cells.items():
            at, entries = cell[query_tile, : mass.shape[1]], len(GRIDS[gate]) + 1
            moved_below, mass_below = (_below(x, at, entries) for x in (moved, mass))
            change = moved_below / (1 - mass_below).clamp(min=1e-6)
            cost = ((change.square() / 2).clamp(max=MOST) * FIXED_POINT).round_().long()
            octaves = curves.octaves[query_tile]
            curves.tensors[f"{gate}.kl"][head].index_add_(0, octaves, cost)


def _weights(q, k, lse, start: int, options: dict) -> torch.Tensor:
    """float32 [rows, keys]: softmax weights of the rows from `start` on."""
    scores = options["scale"] * (q @ k.T)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    weights = (scores - lse[:, None]).exp()
    if options["causal"]:
        weights = weights.tril_(start)
    if options.get("window") is not None:
        weights = weights.triu_(start - options["window"] + 1)
    return weights


def _by_tile(x: torch.Tensor, keys: int) -> torch.Tensor:
    """Sums of x [rows, T] over every `keys` columns."""
    tiles = -(-x.shape[1] // keys)
    return torch.nn.functional.pad(x, (0, tiles * keys - x.shape[1])).unflatten(1, (tiles, keys)).sum(-1)


def _below(x: torch.Tensor, cell: torch.Tensor, entries: int) -> torch.Tensor:
    """[rows, entries]: at entry i the sum of x [rows, key tiles] over the tiles whose cell is below i."""
    sums = x.new_zeros(len(x), entries).scatter_add_(1, cell, x)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1].cumsum(1)], 1)


def backward(model, sample: Sample, curves: Mapping[str, ModuleCurves], head: Head) -> None:
    """One forward and backward pass over `sample`, layers recomputed on the way back, adding to `curves`.

    Raises InputError where a gradient is not finite, or reaches a module not at all.
    """
    prompt = Prompt.of(sample, model)
    probes = {path: Probe(module) for path, module in curves.items()}
    blocks = dict.fromkeys(path.rpartition(".")[0] for path in curves)
    with torch.enable_grad(), attach(model, dense_handlers(model) | probes), _prepared(model, blocks):
        for tensor in prompt.inputs.values():
            if tensor.is_floating_point():
                tensor.requires_grad_()  # from pixels on too
        hidden = head.hidden(prompt)
        blind = [path for path, probe in probes.items() if probe.blind]
        if blind or not hidden.requires_grad:
            raise InputError(f"no gradient reaches {', '.join(blind[:3]) or 'the embeddings'}: leave out --gradients")
        gradient = _score(head, hidden.detach(), sample.id)
        if not bool(gradient.isfinite().all()):
            raise InputError(f"the gradient is not finite on sample {sample.id}; try --dtype float32 or bfloat16")
        hidden.backward(gradient)


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
