"""What dropping tiles costs the predictions, read from one backward pass: against brute force, and as a recipe."""

import copy
import dataclasses
import json

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention
from bsfa_kernels.dropping import MOST
from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

from bsfa_cli.calibration import divergence, fit, run
from bsfa_cli.calibration.curves import FIXED_POINT, GRIDS, ModuleCurves, Plan, octave
from bsfa_cli.data.texts import Sample
from bsfa_cli.errors import InputError
from bsfa_cli.experiments import gradients as experiment
from bsfa_cli.metrics.logits import Head, Predictions
from bsfa_cli.models.load import load_model
from bsfa_cli.suites.run import dense_handlers

TILE, LENGTH = TileShape(32, 64), 320
PLAN = Plan(TILE, LENGTH, (2,), gradients=True)
ENTRIES = {"gap": (72, 80, 88), "absolute": (46, 49, 52)}


SCORINGS = ({}, {"window": 200}, {"softcap": 5.0}, {"sinks": torch.tensor([0.5, 2.0])})


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_a_cost_is_that_of_the_output_which_the_gate_gives(scoring):
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(1, heads, LENGTH, 16, generator=generator) for heads in (2, 1, 1, 2))
    k[:, :, 64:192] *= 0.3  # keys that matter less
    curves = ModuleCurves(PLAN, 2, "cpu")
    options = dict(scale=0.5, causal=True, spans=None, **scoring)
    out = divergence.Probe(curves)(q.requires_grad_(), k, v, **options)
    q = q.detach()
    exact = block_sparse_attention(q, k, v, tile=TILE, **options).out
    torch.testing.assert_close(out.detach(), exact, atol=1e-5, rtol=1e-5)
    out.backward(gradient)
    octaves = torch.tensor([octave(row // TILE.rows) for row in range(LENGTH)])
    dropped = 0
    for gate, entries in ENTRIES.items():
        for entry in entries:
            result = block_sparse_attention(
                q, k, v, Gate(**{gate: GRIDS[gate][entry - 1]}), tile=TILE, return_counts=True, **options
            )
            dropped += int((result.candidates - result.kept).sum())
            cost = ((gradient * (result.out - exact)).sum(-1).square() / 2).clamp(max=MOST)[0].double()
            expected = torch.zeros(2, PLAN.octaves, dtype=torch.float64).index_add_(1, octaves, cost)
            found = curves.tensors[f"{gate}.kl"][..., entry].double() / FIXED_POINT
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        assert not curves.tensors[f"{gate}.kl"][..., 0].any()
    assert dropped > 10


@pytest.fixture(scope="module")
def loaded(random_model):
    return load_model(random_model, device="cpu")


def test_the_sum_of_costs_is_the_divergence_that_is_measured(loaded):
    """One draw of targets estimates it: within a factor of two over so many rows."""
    model, length = copy.deepcopy(loaded.model), 768
    plan, module = Plan(TILE, length, (2,), gradients=True), attention_modules(model)
    path = list(module)[0]
    curves = {path: ModuleCurves(plan, module[path].query_heads, "cpu")}
    gap, measured = -0.5, Predictions()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # predictions that are sure of something
        model.get_submodule(path).o_proj.weight.mul_(5)
        head = Head(model)
    thresholds = Thresholds(
        dict.fromkeys(MODEL_KEYS) | {"id": "any"}, TILE, True, (0,), (Point("only", "gap", "by-hand", gap),),
        {path: torch.full((1, module[path].query_heads, 1), gap)},
    )  # fmt: skip
    # One head only: costs of several do not add up.
    thresholds.tensors[path][:, 1:] = -torch.inf
    handlers = SparseAttention.for_model(thresholds, module)
    for i in range(3):
        sample = Sample(f"text {i}", tuple((j * 37 + i * 101) % 251 for j in range(length)), "")
        divergence.backward(model, sample, curves, head)
        tokens = torch.tensor(sample.tokens)
        with torch.no_grad():
            with attach(model, dense_handlers(model)):
                exact = head.hidden(tokens)
            with attach(model, handlers):
                measured.add(head, exact, head.hidden(tokens), tokens)
    entry = 1 + GRIDS["gap"].index(gap)
    predicted = float(curves[path].tensors["gap.kl"][0, :, entry].sum()) / FIXED_POINT
    found = measured.summary()["kl"] * 3 * length
    assert found > 1e-4
    assert 0.5 < predicted / found < 2


def test_nothing_is_left_on_the_model(loaded):
    model = loaded.model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    path, module = next(iter(attention_modules(model).items()))
    plan = Plan(TILE, 256, (2,), gradients=True)
    sample = Sample("text", tuple(range(1, 257)), "")
    with torch.no_grad():
        head = Head(model)
    found = []
    for _ in range(2):
        curves = ModuleCurves(plan, module.query_heads, "cpu")
        divergence.backward(model, sample, {path: curves}, head)
        found.append(curves.tensors["gap.kl"])
    assert torch.equal(*found) and bool(found[0].any())  # the same draw each time
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert all(parameter.grad is None for parameter in model.parameters())
    for each in model.modules():
        assert "forward" not in vars(each) and not each._forward_hooks and "bsfa_handlers" not in vars(each)


def test_a_module_that_no_gradient_reaches_is_refused(loaded):
    path, module = next(iter(attention_modules(loaded.model).items()))
    curves = {path: ModuleCurves(Plan(TILE, 256, (2,), gradients=True), module.query_heads, "cpu")}
    with torch.no_grad():
        head = Head(loaded.model)
        blind = type("Blind", (), {"hidden": lambda _, tokens: torch.no_grad()(head.hidden)(tokens)})()
    with pytest.raises(InputError, match="no gradient reaches model.layers.0.self_attn; give --no-gradients"):
        divergence.backward(loaded.model, Sample("text", tuple(range(256)), ""), curves, blind)
    assert not curves[path].tensors["gap.kl"].any()


def test_a_gradient_that_overflows_inside_the_model_is_refused(loaded):
    def overflow(_, __, out):
        out.register_hook(lambda gradient: gradient * torch.inf)
        return out

    path, module = next(iter(attention_modules(loaded.model).items()))
    curves = {path: ModuleCurves(Plan(TILE, 256, (2,), gradients=True), module.query_heads, "cpu")}
    with torch.no_grad():
        head = Head(loaded.model)
    hook = loaded.model.get_submodule(path.rpartition(".")[0]).register_forward_hook(overflow)
    try:
        with pytest.raises(InputError, match="a gradient is not finite on sample text; try --dtype"):
            divergence.backward(loaded.model, Sample("text", tuple(range(256)), ""), curves, head)
    finally:
        hook.remove()


def test_rows_that_see_one_another_both_ways_are_refused():
    q = torch.zeros(1, 2, 64, 16)
    with pytest.raises(InputError, match="gradients do not know images whose tokens see one another"):
        divergence.Probe(ModuleCurves(PLAN, 2, "cpu"))(q, q, q, scale=1, causal=True, spans=None, groups=object())


@pytest.mark.gpu
def test_a_gpu_finds_what_the_specification_finds(random_model):
    """Sums of bfloat16's products in float32 on either side, in another order. Where nearly all of a row's mass is
    dropped, what is left is a difference of such sums: 0.17 % of all costs on SmolLM2 (H200, checks/gradients-8k).
    """
    loaded, length = load_model(random_model, device="cuda", dtype="bfloat16"), 4000
    plan, modules = Plan(TileShape(), length, (2,), gradients=True), attention_modules(loaded.model)
    with torch.no_grad():
        head = Head(loaded.model)
    found = []
    for backend in ("triton", "torch", "triton"):
        curves = {path: ModuleCurves(plan, module.query_heads, "cuda") for path, module in modules.items()}
        sample = Sample("text", tuple(i * 37 % 251 for i in range(length)), "")
        divergence.backward(loaded.model, sample, curves, head, backend)
        found.append(torch.cat([each.tensors["absolute.kl"].flatten(0, 1) for each in curves.values()]).double())
    assert found[1].sum() > 0 and torch.equal(found[0], found[2])
    assert (found[0] - found[1]).abs().sum() < 1e-2 * found[1].sum()


def test_the_experiment_times_both_passes(random_model, tmp_path, monkeypatch):
    out = tmp_path / "g.json"
    given = ("--model", random_model, "--length", 320, "--samples", 1, "--device", "cpu", "--against-torch")
    given += ("--out", out)
    monkeypatch.setattr("sys.argv", ["gradients", *map(str, given)])
    assert experiment.main() == 0
    result = json.loads(out.read_text())
    seconds = result["median_seconds"]
    assert set(seconds) == {"backward", "forward", "torch"} and min(seconds.values()) > 0
    assert result["samples"][0]["difference"] == {"absolute": 0.0, "gap": 0.0}  # on a CPU both are the specification


@pytest.fixture(scope="module")
def table(loaded):
    modules, _ = run.chosen_modules(loaded.model, None)
    plan = Plan(TileShape(64, 128), 1024, (2,), gradients=True)
    found = {path: ModuleCurves(plan, module.query_heads, "cpu") for path, module in modules.items()}
    sample = Sample("a", tuple(i * 37 % 251 for i in range(1024)), "")
    with torch.no_grad():
        head = Head(loaded.model)
    run.forward(loaded.model, sample, found, "cpu")
    divergence.backward(loaded.model, sample, found, head)
    return fit.Table.of({path: module.tensors for path, module in found.items()}, "gap")


def test_sharing_by_kl_costs_the_predictions_less(table):
    by_mass, by_kl = fit.mass_skip(table, 0.3), fit.kl_skip(table, 0.3)

    def total(values, choice):
        return float(values.gather(-1, choice[..., None]).sum())

    assert total(table.kl, by_kl) < total(table.kl, by_mass)
    assert total(table.mass, by_mass) < total(table.mass, by_kl)
    for choice in (by_mass, by_kl):
        assert total(table.dropped, choice) >= 0.3 * float(table.candidates.sum())


def test_a_run_without_gradients_is_refused(table):
    with pytest.raises(fit.OutOfReach, match="calibrate --gradients"):
        fit.kl_skip(dataclasses.replace(table, kl=None), 0.3)


def test_from_calibrate_to_export(random_model, run, one_sentence, tmp_path):
    arguments = ("calibrate", random_model, "--data", "builtin:mixed", "--samples", 2, "--length", 512)
    arguments += ("--device", "cpu")
    assert run(*arguments, "-o", tmp_path / "run", "--gradients").code == 0
    one_sentence(run(*arguments, "-o", tmp_path / "run", "--no-gradients"), 2, "another run", "gradients")
    assert run(*arguments, "-o", tmp_path / "run").code == 0  # goes on as it began
    out = tmp_path / "t.safetensors"
    result = run(
        "export", tmp_path / "run", "-o", out, "--kl-skip", 0.2, "--target-skip", 0.2, "--mass-skip", 0.2, "--json"
    )
    assert result.code == 0, result.err
    points = {point["name"]: point for point in json.loads(result.out)["points"]}
    assert "kl-skip-20 costs predictions about" in result.err and "on held-out samples; verify" in result.err
    assert points["kl-skip-20"]["recipe"] == "kl-skip" and points["kl-skip-20"]["fitted"]["skip"] >= 0.2
    assert points["skip-20"]["recipe"] == "kl-skip" and points["mass-skip-20"]["recipe"] == "mass-skip"
    stored = Thresholds.read(out)
    for values in stored.tensors.values():
        by_kl, shared, by_mass = (values[[point.name for point in stored.points].index(name)]
                                  for name in ("kl-skip-20", "skip-20", "mass-skip-20"))  # fmt: skip
        assert torch.equal(by_kl, shared) and not torch.equal(by_kl, by_mass)
    assert run(*arguments, "-o", tmp_path / "plain").code == 0
    one_sentence(run("export", tmp_path / "plain", "-o", out, "--kl-skip", 0.2), 1, "calibrate --gradients")
    result = run("export", tmp_path / "plain", "-o", out, "--target-skip", 0.2, "--mass-skip", 0.2, "--json")
    assert [point["recipe"] for point in json.loads(result.out)["points"]] == ["target-skip", "mass-skip"]
    plain = Thresholds.read(out)
    for path, values in plain.tensors.items():
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], stored.tensors[path][1])
