"""PBS-Attn through the kernels against a literal transcription: permuted keys, masked by original positions."""

from __future__ import annotations

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention
from bsfa_kernels.selection import PBS


def tensors(length: int, dim=16, heads=(4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, n, length, dim, generator=generator, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])
    )
    k[:, :, ::7] += q.mean((1, 2), keepdim=True) * 3
    return (x.to(dtype) for x in (q * 2, k, v))


def literal(settings: PBS, q, k, v, scale):
    """(output, share of causal tiles of 8 x 16 with an allowed pair) of one sequence, one head of q, its k and v."""
    length, (segment, block) = len(k), (settings.segment, settings.block)
    position, order = torch.arange(length), []
    importance = torch.zeros(length, dtype=q.dtype)
    for head in q:
        for i in range(max(0, length - settings.last), length):
            importance[: i + 1] += (scale * head[i] @ k[: i + 1].T).softmax(-1)
    for start in range(0, length, segment):
        inside = position[start : start + segment]
        if len(inside) == segment:
            inside = inside[importance[inside].argsort(descending=True, stable=True)]
        order += inside.tolist()
    order = torch.tensor(order)
    outputs = []
    for head in q:
        allowed = torch.zeros(length, length, dtype=torch.bool)
        for row in range(0, length, block):
            own = row // segment * segment
            starts = list(range(0, own, block))
            pooled = head[row : row + block].mean(0)
            weights = [float(scale * pooled @ k[order[s : s + block]].mean(0)) for s in starts]
            weights = torch.tensor(weights, dtype=q.dtype).softmax(-1).tolist() if starts else []
            kept, total = [s for s in starts if 0 in order[s : s + block]], 0.0
            for s in sorted(starts, key=lambda s: -weights[s // block]):
                if total >= settings.coverage * sum(weights):
                    break
                kept.append(s)
                total += weights[s // block]
            for s in kept:
                allowed[row : row + block, order[s : s + block]] = True
            allowed[row : row + block, own : own + segment] = True
        allowed &= position <= position[:, None]
        outputs.append((scale * head @ k.T).masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
    return torch.stack(outputs)


@pytest.mark.parametrize("length", [16, 64, 150, 256])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("settings", [PBS(0.6, 32, 16, 10), PBS(0.0, 32, 32, 300), PBS(0.9, 64, 16, 5)])
def test_the_kernels_compute_what_the_paper_says(length, backend, settings):
    q, k, v = tensors(length)
    arranged = settings.arrange(q, k, v, scale=0.25, causal=True, tile=TileShape(8, 16))
    out = block_sparse_attention(
        q, arranged.k, arranged.v, scale=0.25, causal=True, tile=TileShape(8, 16), backend=backend, **arranged.options
    ).out
    for b in range(2):
        for kv_head in range(2):
            heads = slice(2 * kv_head, 2 * kv_head + 2)
            expected = literal(settings, q[b, heads], k[b, kv_head], v[b, kv_head], 0.25)
            assert (out[b, heads] - expected).abs().max() < 1e-10


def test_full_coverage_is_dense_attention_and_less_is_less():
    q, k, v = tensors(512)
    dense = block_sparse_attention(q, k, v, return_counts=True)
    kept = []
    for coverage in (0.2, 0.6, 1.0):
        arranged = PBS(coverage, 128, 128).arrange(q, k, v, scale=0.25, causal=True, tile=TileShape())
        result = block_sparse_attention(q, arranged.k, arranged.v, return_counts=True, **arranged.options)
        kept.append(int(result.kept.sum()))
    assert kept[0] < kept[1] < kept[2] and (result.out - dense.out).abs().max() < 1e-10


def test_a_gate_runs_on_permuted_keys():
    q, k, v = tensors(512)
    arranged = PBS(1.0, 128, 128).arrange(q, k, v, scale=0.25, causal=True, tile=TileShape())
    gate = Gate(gap=torch.full((4, 1), 2.0))
    gated = block_sparse_attention(q, arranged.k, arranged.v, gate, return_counts=True, **arranged.options)
    assert 0 < gated.kept.sum() < gated.candidates.sum() and gated.out.isfinite().all()


def test_a_selection_does_not_depend_on_the_tile_and_half_precision_runs():
    q, k, v = tensors(300, dtype=torch.bfloat16)
    outputs = []
    for tile in (TileShape(), TileShape(128, 64)):
        arranged = PBS().arrange(q, k, v, scale=0.25, causal=True, tile=tile)
        outputs.append(block_sparse_attention(q, arranged.k, arranged.v, scale=0.25, tile=tile, **arranged.options).out)
    assert (outputs[0] - outputs[1]).abs().max() < 0.05


@pytest.mark.parametrize(
    "settings, causal, tile, words",
    [({}, False, TileShape(), "not defined for non-causal"), ({}, True, TileShape(96, 128), "multiple of the tile's"),
     ({"segment": 200}, True, TileShape(), "multiple of block"), ({"coverage": 2}, True, TileShape(), "coverage")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(settings, causal, tile, words):
    with pytest.raises(ValueError, match=words):
        PBS(**settings).arrange(*tensors(64), scale=1.0, causal=causal, tile=tile)


@pytest.mark.gpu
def test_gpu_kernels_agree_with_the_reference():
    q, k, v = (x.cuda() for x in tensors(2000, dim=128, heads=(8, 2), dtype=torch.bfloat16))
    arranged = PBS(0.8).arrange(q, k, v, scale=0.1, causal=True, tile=TileShape())
    options = dict(scale=0.1, causal=True, return_counts=True, **arranged.options)
    result = block_sparse_attention(q, arranged.k, arranged.v, **options)
    exact = block_sparse_attention(q, arranged.k, arranged.v, backend="torch", **options)
    assert (result.out.double() - exact.out.double()).norm() < 0.02 * exact.out.double().norm()
    assert torch.equal(result.kept, exact.kept)
