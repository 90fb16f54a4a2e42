"""Operating points: least mass at a rate, bounds kept, and expectations that the attention itself confirms."""

import itertools
import math

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, tile_statistics
from bsfa_kernels.thresholds import interpolate, tile_positions

from bsfa_cli.calibration import fit
from bsfa_cli.calibration.curves import GRIDS, LEVELS, ModuleCurves, Plan
from bsfa_cli.errors import OutOfReach

TILE, LENGTH, HEADS = TileShape(8, 16), 256, 4
PLAN = Plan(TILE, LENGTH, (2, 4))


def sequence(seed, module=0):
    """q, k of heads that look near with different strengths, so that tiles differ in mass."""
    generator = torch.Generator().manual_seed(1000 * module + seed)
    q = torch.randn(1, HEADS, LENGTH, 16, generator=generator)
    k = torch.randn(1, 2, LENGTH, 16, generator=generator)
    near = torch.arange(LENGTH) * 0.02
    angle = torch.stack([near.cos(), near.sin()], -1)
    strength = torch.tensor([2.0, 6.0, 8.0, 12.0])[:, None, None]
    q[..., :2], k[..., :2] = angle * strength, angle * 4
    return q, k


def curves_of(seeds, modules=2):
    result = {}
    for module in range(modules):
        curves = ModuleCurves(PLAN, HEADS, "cpu")
        for seed in seeds:
            q, k = sequence(seed, module)
            lse = block_sparse_attention(q, k, k, tile=TILE, return_lse=True).lse
            curves.add(tile_statistics(q, k, lse, tile=TILE))
        result[f"layers.{module}"] = curves.tensors
    return result


@pytest.fixture(scope="module")
def fitted():
    return curves_of((0, 1, 2))


@pytest.fixture(scope="module")
def held_out():
    return curves_of((3,))


def run(thresholds, gate, seed):
    """(kept, candidates) of attention with thresholds [N, knots] at the artifact's knots."""
    kept = candidates = 0
    knots = tuple(tile * TILE.rows + TILE.rows // 2 for tile in PLAN.knot_tiles)
    for module in range(2):
        q, k = sequence(seed, module)
        values = thresholds[module * HEADS : (module + 1) * HEADS].float()
        values = interpolate(values, knots, tile_positions(PLAN.query_tiles, TILE))
        result = block_sparse_attention(q, k, k, Gate(**{gate: values}), tile=TILE, return_counts=True)
        kept, candidates = kept + int(result.kept.sum()), candidates + int(result.candidates.sum())
    return kept, candidates


@pytest.mark.parametrize("gate", GRIDS)
@pytest.mark.parametrize("rate", [0.1, 0.4, 0.6])
def test_target_skip_is_reached_and_confirmed_by_the_attention(gate, rate, fitted, held_out):
    table, check = fit.Table.of(fitted, gate), fit.Table.of(held_out, gate)
    choice = fit.target_skip(table, rate)
    reached = fit.evaluate(table, choice, 0.99)
    assert rate <= reached.skip < rate + 0.02
    kept, candidates = run(fit.at_knots(table, PLAN, choice), gate, 3)
    expected = fit.evaluate(check, choice, 0.99)
    assert math.isclose(1 - kept / candidates, expected.skip, abs_tol=1e-9)


def test_target_skip_drops_the_least_mass_that_any_choice_could():
    """Every choice of a small table, tried."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        count = torch.randint(0, 4, (2, 2, 5), generator=generator)
        mass = (count * torch.rand(2, 2, 5, generator=generator).cumsum(-1) / 5).double()
        zero = torch.zeros(2, 2, 1)
        dropped = torch.cat([zero.long(), count.cumsum(-1)], -1)
        lost = torch.cat([zero.double(), mass.cumsum(-1)], -1)
        table = fit.Table(
            "gap", {"a": slice(0, 2)}, torch.arange(6).double(), dropped, lost, lost, torch.zeros(0),
            dropped[..., -1], torch.ones(2, 2),
        )  # fmt: skip
        total = int(dropped[..., -1].sum())
        best = {}
        for entries in itertools.product(range(6), repeat=4):
            at = torch.tensor(entries).view(2, 2, 1)
            n, m = int(dropped.gather(-1, at).sum()), float(lost.gather(-1, at).sum())
            best[n] = min(m, best.get(n, math.inf))
        for rate in (0.2, 0.5, 0.8):
            choice = fit.target_skip(table, rate)[..., None]
            n, m = int(dropped.gather(-1, choice).sum()), float(lost.gather(-1, choice).sum())
            assert n >= rate * total - 1e-6
            assert m <= min(cost for k, cost in best.items() if k >= n) + 1e-9


def test_unreachable_rates_are_refused_with_the_rate_that_can_be_had(fitted):
    table = fit.Table.of(fitted, "gap")
    with pytest.raises(OutOfReach, match=r"0\.9999 cannot be reached.*drops 0\.\d+ of the candidate"):
        fit.target_skip(table, 0.9999)


@pytest.mark.parametrize("gate", GRIDS)
def test_max_dropped_mass_bounds_every_row_at_quantile_one(gate, fitted):
    table = fit.Table.of(fitted, gate)
    most = LEVELS[10]
    choice = fit.max_dropped_mass(table, most, 1.0)
    reached = fit.evaluate(table, choice, 1.0)
    assert reached.dropped_mass_bound <= most * (1 + 1e-9) and reached.skip > 0.05
    thresholds = fit.at_knots(table, PLAN, choice)
    knots = tuple(tile * TILE.rows + TILE.rows // 2 for tile in PLAN.knot_tiles)
    q, k = sequence(0)
    values = interpolate(thresholds[:HEADS].float(), knots, tile_positions(PLAN.query_tiles, TILE))
    open_lse = block_sparse_attention(q, k, k, tile=TILE, return_lse=True).lse
    lse = block_sparse_attention(q, k, k, Gate(**{gate: values}), tile=TILE, return_lse=True).lse
    assert float((1 - (lse - open_lse).exp()).max()) <= most + 1e-5
    looser = fit.evaluate(table, fit.max_dropped_mass(table, most, 0.8), 0.8)
    assert looser.skip >= reached.skip
    with pytest.raises(OutOfReach, match="least is 0.0001"):
        fit.max_dropped_mass(table, 1e-5, 0.99)


def test_mean_dropped_mass_is_what_rows_lose(fitted, held_out):
    table = fit.Table.of(fitted, "absolute")
    choice = fit.target_skip(table, 0.5)
    expected = fit.evaluate(fit.Table.of(held_out, "absolute"), choice, 0.99, slice(0, HEADS))
    knots = tuple(tile * TILE.rows + TILE.rows // 2 for tile in PLAN.knot_tiles)
    q, k = sequence(3)
    thresholds = fit.at_knots(table, PLAN, choice)[:HEADS].float()
    values = interpolate(thresholds, knots, tile_positions(PLAN.query_tiles, TILE))
    open_lse = block_sparse_attention(q, k, k, tile=TILE, return_lse=True).lse
    result = block_sparse_attention(q, k, k, Gate(absolute=values), tile=TILE, return_lse=True, return_counts=True)
    lost = (1 - (result.lse - open_lse).exp()).unflatten(-1, (-1, TILE.rows)).mean(-1)
    assert math.isclose(float(lost[result.candidates > 0].mean()), expected.dropped_mass, rel_tol=1e-3)


def test_top_k_keeps_about_k_tiles_and_its_estimate_is_close(fitted, held_out):
    for k in (2, 4):
        thresholds = fit.top_k(fitted, PLAN, k)
        expected = fit.evaluate_positions(fit.Table.of(held_out, "absolute"), PLAN, thresholds, 0.99)
        kept, candidates = run(thresholds, "absolute", 3)
        assert math.isclose(1 - kept / candidates, expected.skip, abs_tol=0.05)
    short = [i for i, tile in enumerate(PLAN.knot_tiles) if tile * TILE.rows // TILE.keys <= 4]
    assert thresholds[:, short].eq(-torch.inf).all() and thresholds[:, short[-1] + 1 :].isfinite().all()
    with pytest.raises(OutOfReach, match="--top-k 5 lies outside of what was collected: 2, 4"):
        fit.top_k(fitted, PLAN, 5)


def test_a_top_k_between_two_that_were_collected_lies_between_them(fitted):
    few, middle, many = (fit.top_k(fitted, PLAN, k) for k in (2, 3, 4))
    assert (many <= middle).all() and (middle <= few).all()
    known = many.isfinite()
    expected = (math.log(4 / 3) * few + math.log(3 / 2) * many) / math.log(2)
    torch.testing.assert_close(middle[known], expected[known])
    assert middle[~known].eq(-torch.inf).all()


def test_a_knot_within_which_every_sample_ends_has_the_threshold_before():
    assert fit._means(torch.tensor([[2.0, 6.0, 0.0, 9.0]]), torch.tensor([1, 2, 0, 3])).tolist() == [
        [2.0, 3.0, 3.0, 3.0]
    ]


@pytest.mark.parametrize("gate", GRIDS)
def test_an_even_skip_is_even(gate, fitted):
    table = fit.Table.of(fitted, gate)
    choice = fit.even_skip(table, 0.4)
    dropped = table.dropped.gather(-1, choice[..., None])[..., 0]
    reachable = table.dropped[..., -1] >= 0.4 * table.candidates
    assert reachable.any() and (dropped >= 0.4 * table.candidates)[reachable].all()
    less = table.dropped.gather(-1, (choice - 1).clamp(min=0)[..., None])[..., 0]
    assert (less < 0.4 * table.candidates)[reachable & (choice > 0)].all()
    assert (dropped == table.dropped[..., -1])[~reachable].all()


@pytest.mark.parametrize("gate", GRIDS)
def test_one_threshold_is_one_and_reaches_its_rate(gate, fitted):
    table = fit.Table.of(fitted, gate)
    choice = fit.one_threshold(table, 0.4)
    assert len(choice.unique()) == 1
    assert fit.evaluate(table, choice, 0.99).skip >= 0.4 > fit.evaluate(table, choice - 1, 0.99).skip
    with pytest.raises(OutOfReach, match="cannot be reached"):
        fit.one_threshold(fit.Table.of(fitted, "gap"), 0.9999)
