"""What leaving out a tile does to the residual stream: the weights that calibration shares skipping out by."""

import pytest
import torch
from bsfa_kernels import TileShape

from bsfa_cli.calibration import effect, fit, run
from bsfa_cli.calibration.curves import ModuleCurves, Plan
from bsfa_cli.data.texts import Sample
from bsfa_cli.models.load import load_model

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 8, 24


def test_a_weight_is_the_length_of_what_a_tile_adds():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(HEADS * DIM, HIDDEN, bias=False)
    value = torch.randn(KV_HEADS, 5, DIM, generator=generator)
    out = torch.randn(HEADS, 3, DIM, generator=generator)
    stream = torch.tensor([1.0, 2.0, 4.0])
    found = effect.weights(effect.output_gram(module, HEADS), value, out, stream)
    for h, t, j in ((0, 0, 0), (3, 2, 4), (1, 1, 2)):
        part = module.o_proj.weight.detach()[:, h * DIM : (h + 1) * DIM]
        expected = (part @ (value[h // 2, j] - out[h, t])).norm() / stream[t]
        assert float(found[h, t, j]) == pytest.approx(float(expected), rel=1e-4)
    assert effect.output_gram(torch.nn.Module(), HEADS) is None


def test_the_mean_of_a_last_tile_is_over_its_own_rows():
    x = torch.arange(10.0)[None, :, None]
    assert effect.tile_means(x, 4)[0, :, 0].tolist() == [1.5, 5.5, 8.5]


@pytest.fixture(scope="module")
def curves(random_model):
    """Of one sequence, for every module of a model."""
    loaded = load_model(random_model, device="cpu")
    plan, modules = Plan(TileShape(64, 128), 1024, (2,)), run.chosen_modules(loaded.model, None)[0]
    found = {path: ModuleCurves(plan, module.query_heads, "cpu") for path, module in modules.items()}
    run.forward(loaded.model, Sample("a", tuple(i * 37 % 251 for i in range(1024)), ""), found, "cpu")
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
    return {path: module.tensors for path, module in found.items()}


def test_calibration_weighs_mass_by_effect(curves):
    for tensors in curves.values():
        mass, moved = tensors["gap.mass"].double(), tensors["gap.effect"].double()
        assert ((moved > 0) <= (mass > 0)).all() and (moved > 0).any()
        ratio = moved.sum() / mass.sum()
        assert 0 < ratio < effect.LARGEST and ratio != 1


def test_sharing_by_effect_moves_the_stream_less_and_drops_more_mass(curves):
    table = fit.Table.of(curves, "gap")
    by_mass, by_effect = fit.mass_skip(table, 0.3), fit.effect_skip(table, 0.3)

    def total(values, choice):
        return float(values.gather(-1, choice[..., None]).sum())

    assert total(table.effect, by_effect) < total(table.effect, by_mass)
    assert total(table.mass, by_mass) < total(table.mass, by_effect)
    for choice in (by_mass, by_effect):
        assert total(table.dropped, choice) >= 0.3 * float(table.candidates.sum())
