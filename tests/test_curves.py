"""Calibration curves against a slow literal transcription of their definition."""

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, tile_statistics

from bsfa_cli.calibration.curves import FIXED_POINT, GRIDS, LEVELS, ModuleCurves, Plan, knot_tiles, octave


def statistics(length, tile, seed=0, heads=4, spread=6.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, length, 16, generator=generator) * spread**0.5
    k = torch.randn(1, 2, length, 16, generator=generator) * spread**0.5
    lse = block_sparse_attention(q, k, k, tile=tile, return_lse=True).lse
    return q, k, tile_statistics(q, k, lse, tile=tile)


def literal(samples, moved, plan, heads):
    """{name: tensor}, one query tile and one key tile at a time."""
    out = {name: tensor.clone() for name, tensor in ModuleCurves(plan, heads, "cpu").tensors.items()}
    for stats, weight in zip(samples, moved, strict=True):
        maximum, gap, mean, worst = (x[0] for x in stats)
        for h in range(heads):
            for t in range(gap.shape[1]):
                candidates = [j for j in range(gap.shape[2]) if gap[h, t, j].isfinite()]
                p = octave(t)
                if candidates and h == 0:
                    out["tiles"][p] += 1
                for gate, values in (("gap", gap), ("absolute", maximum)):
                    grid = GRIDS[gate]
                    dropped_at = [[j for j in candidates if values[h, t, j] < threshold] for threshold in grid]
                    for j in candidates:
                        cell = sum(values[h, t, j] >= threshold for threshold in grid)
                        out[f"{gate}.count"][h, p, cell] += 1
                        out[f"{gate}.mass"][h, p, cell] += round(float(mean[h, t, j].double() * FIXED_POINT))
                        effect = (mean[h, t, j] * weight[h, t, j]).double()
                        out[f"{gate}.effect"][h, p, cell] += round(float(effect * FIXED_POINT))
                    for m, level in enumerate(LEVELS) if candidates else ():
                        bounds = [sum(worst[h, t, j].double().item() for j in dropped) for dropped in dropped_at]
                        out[f"{gate}.reach"][h, p, m, sum(bound <= level for bound in bounds)] += 1
                diagonal = t * plan.tile.rows // plan.tile.keys
                if t in plan.knot_tiles and (candidates or diagonal <= 1):
                    out["top_k.samples"][plan.knot_tiles.index(t)] += h == 0
                    ranked = sorted((maximum[h, t, j].item() for j in range(diagonal)), reverse=True)
                    for i, k in enumerate(plan.ranks):
                        middle = (ranked[k - 1] + ranked[k]) / 2 if len(ranked) > k else -torch.inf
                        out["top_k.sum"][i, h, plan.knot_tiles.index(t)] += middle
    return out


@pytest.mark.parametrize("tile", [TileShape(8, 16), TileShape(16, 8)], ids=str)
def test_curves_equal_the_literal_count(tile):
    plan = Plan(tile, 140, (1, 3, 8))
    curves = ModuleCurves(plan, 2, "cpu")
    samples = [statistics(length, tile, seed, heads=2)[2] for seed, length in enumerate((140, 75))]
    # Values that equal a threshold are kept: put those of one sample on the grids.
    samples[1] = samples[1]._replace(gap=samples[1].gap.mul(4).round() / 4, maximum=samples[1].maximum.round())
    moved = [torch.rand(sample.gap.shape[1:], generator=torch.Generator().manual_seed(1)) for sample in samples]
    for sample, weight in zip(samples, moved, strict=True):
        curves.add(sample, weight)
    for name, expected in literal(samples, moved, plan, 2).items():
        assert torch.allclose(curves.tensors[name].double(), expected.double(), rtol=0, atol=1e-9), name


def test_order_and_slicing_do_not_change_a_bit(monkeypatch):
    tile = TileShape(8, 16)
    plan = Plan(tile, 200, (2,))
    samples = [statistics(length, tile, seed)[2] for seed, length in enumerate((200, 131, 64))]
    forward, backward = ModuleCurves(plan, 4, "cpu"), ModuleCurves(plan, 4, "cpu")
    for sample in samples:
        forward.add(sample)
    monkeypatch.setattr("bsfa_cli.calibration.curves.TILES_AT_ONCE", 1)
    for sample in reversed(samples):
        backward.add(sample)
    for name in forward.tensors:
        if name != "top_k.sum":
            assert torch.equal(forward.tensors[name], backward.tensors[name]), name
    torch.testing.assert_close(forward.tensors["top_k.sum"], backward.tensors["top_k.sum"])


@pytest.mark.parametrize("gate, index", [("gap", 60), ("gap", 80), ("absolute", 105), ("absolute", 110)])
def test_the_curve_predicts_what_the_gate_drops(gate, index):
    """Thresholds on the grid: the attention itself keeps exactly the tiles that the curve says."""
    tile, threshold = TileShape(8, 16), GRIDS[gate][index]
    q, k, stats = statistics(256, tile, spread=16.0)
    plan = Plan(tile, 256, ())
    curves = ModuleCurves(plan, 4, "cpu")
    curves.add(stats)
    values = torch.full((4, plan.query_tiles), float(threshold))
    result = block_sparse_attention(q, k, k, Gate(**{gate: values}), tile=tile, return_counts=True)
    count = curves.tensors[f"{gate}.count"]
    assert count.sum() == result.candidates.sum()
    dropped = count[..., : index + 1].sum((1, 2))
    assert torch.equal(dropped, (result.candidates - result.kept).sum((0, 2)))
    assert 0 < dropped.sum() < count.sum()


def test_knots_bracket_every_octave():
    tiles = knot_tiles(512)
    assert tiles[0] == 0 and tiles[-1] == 511 and len(knot_tiles(2048)) <= 60
    for p in range(9):
        assert {max(2**p, 2) if p else 0, 2 ** (p + 1) - 1} <= set(tiles)
    assert knot_tiles(1) == (0,) and knot_tiles(100)[-1] == 99


@pytest.mark.gpu
def test_a_gpu_counts_the_same_bits_and_is_never_waited_for():
    tile = TileShape(64, 128)
    plan = Plan(tile, 4000, (4, 16))
    stats = statistics(4000, tile)[2]
    host, device = ModuleCurves(plan, 4, "cpu"), ModuleCurves(plan, 4, "cuda")
    host.add(stats)
    stats = type(stats)(*(x.cuda() for x in stats))
    device.add(stats)  # the first call may set libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        device.add(stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, tensor in host.tensors.items():
        assert torch.equal(device.tensors[name].cpu(), 2 * tensor), name
