"""Multi-head latent attention: heads of V narrower than those of Q and K, from a tiny DeepSeek to the tool."""

from __future__ import annotations

from types import SimpleNamespace

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention
from bsfa_kernels.integrations import plan as planner
from bsfa_kernels.integrations.warmup import lengths
from bsfa_kernels.selection import PBS
from test_lifecycle import thresholds_for
from tiny_models import ROWS, assert_close, batch, build, chunk, logits
from transformers import DynamicCache

from bsfa_cli.models.random_weights import LABEL, LABEL_KEY, build_tokenizer
from bsfa_cli.timing import plan, sweep

MODELS = ("deepseek-v2", "deepseek-v3")


@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_a_gate_that_drops_nothing_equals_dense(name, padding):
    model = build(name)
    ids, mask = batch(400, ROWS[padding])
    expected = logits(model, "eager", ids, mask)
    with bsfa.apply(model, thresholds_for(model, -1e9), count=True):
        actual = logits(model, "bsfa", ids, mask)
        assert bsfa.skip_rate(model) == 0 and not bsfa.notes(model)
    assert_close(actual[mask.bool()], expected[mask.bool()])


def test_a_gate_drops_what_the_reference_drops():
    model = build("deepseek-v3")
    ids, mask = batch(500, (0, 37))
    dense, found, skipped = logits(model, "bsfa", ids, mask), {}, {}
    for backend in ("auto", "reference"):
        with bsfa.apply(model, thresholds_for(model, 1.0), count=True):
            for layer in model.model.layers:
                bsfa.active(layer.self_attn).backend = backend
            found[backend], skipped[backend] = logits(model, "bsfa", ids, mask), bsfa.skip_rate(model)
    assert 0.1 < skipped["auto"] < 0.9 and skipped["auto"] == skipped["reference"]
    assert_close(found["auto"][mask.bool()], found["reference"][mask.bool()])
    assert not torch.equal(found["auto"], dense)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ROWS)
def test_fused_kernels_drop_what_the_reference_drops(padding):
    sizes = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, head_dim=64, v_head_dim=128)
    model = build("deepseek-v3", ("cuda", torch.bfloat16), **sizes)
    ids, mask = batch(700, ROWS[padding], "cuda")
    found, skipped = {}, {}
    for backend in ("auto", "triton", "reference"):
        with bsfa.apply(model, thresholds_for(model, 1.0), count=True):
            for layer in model.model.layers:
                bsfa.active(layer.self_attn).backend = backend
            found[backend], skipped[backend] = logits(model, "bsfa", ids, mask).float(), bsfa.skip_rate(model)
    expected = found.pop("reference")[mask.bool()]
    assert skipped["reference"] > 0.1
    for backend, actual in found.items():
        assert abs(skipped[backend] - skipped["reference"]) < 0.02, backend
        assert (actual[mask.bool()] - expected).norm() < 0.04 * expected.norm(), backend


def test_chunked_prefill_and_decoding_equal_dense():
    model = build("deepseek-v3")
    ids, mask = batch(170, (0, 23))
    expected = logits(model, "eager", ids, mask)
    cache = DynamicCache(config=model.config)
    with bsfa.apply(model, thresholds_for(model, -1e9)):
        parts = [chunk(model, ids, mask, start, end, cache) for start, end in ((0, 70), (70, 71), (71, 170))]
    assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])


def test_modules_know_both_head_dims():
    model = build("deepseek-v2", ("cpu", torch.bfloat16), max_position_embeddings=1 << 20)
    model.set_attn_implementation("bsfa")
    module = bsfa.attention_modules(model)["model.layers.0.self_attn"]
    assert (module.head_dim, module.v_head_dim, module.dense_reason) == (48, 32, None)
    keys = (32 << 20) // ((48 + 32) * 2)  # of one KV head in a section
    assert lengths(model, 1 << 19) == [2048, keys // 4, keys // 2, 1 << 19]


@pytest.mark.parametrize("v_head_dim, served", [(128, True), (192, True), (256, False)])
def test_the_planner_gates_values_up_to_the_width_of_keys(monkeypatch, v_head_dim, served):
    asked = []

    def fused(*arguments):
        asked.append(arguments[2:4])
        return "hopper", ""

    monkeypatch.setattr(planner, "fused", fused)
    q, v = (
        SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16, shape=(1, 2, 64, n))
        for n in (192, v_head_dim)
    )
    handler = SimpleNamespace(least_rows=64, fused_tile=TileShape(), knows_scoring=True)
    step = planner.plan(planner.Call(q, q, v, True, False, False, None, None, False), handler)
    if served:
        assert step == (planner.Route.GATED, None, True) and set(asked) == {(192, v_head_dim)}
    else:
        assert step == (planner.Route.FALLBACK, "values are wider than keys", False)


def test_permuted_keys_take_their_values_along():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 600, n, generator=generator) for n in (24, 24, 16))
    options = dict(scale=0.2, causal=True, tile=TileShape(64, 128))
    arranged = PBS(coverage=1.0).arrange(q, k, v, **options)
    assert arranged.v.shape[3] == 16
    out = block_sparse_attention(q, arranged.k, arranged.v, Gate(), **arranged.options, **options).out
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, **options).out)


def test_a_profile_counts_both_products():
    shape = plan.Shape("mla", 2, 2, 48, v_head_dim=32)
    small = plan.Plan("small", (shape,), (640,), (0.5,), baselines=("math",))
    cell = sweep.cell(small, shape, 640, torch.device("cpu"), seconds=0.01)
    assert cell["shape"]["v_head_dim"] == 32 and cell["flops_dense"] == 2 * 2 * (48 + 32) * 640 * 641 // 2
    rows = {row["name"]: row for row in cell["contenders"]}
    half = rows["bsfa, 50 % skipped"]
    assert half["finite"] and half["bound"] == pytest.approx(80 / (48 + 32 * half["kept_share"]))
    assert rows["bsfa, 0 % skipped"]["bound"] == 1 and cell["error_at_zero"] < 1e-4
    with pytest.raises(plan.UsageError, match=r"v_head_dim must be from 1 to head_dim \(48\), got 64"):
        plan.Shape("wide", 2, 2, 48, v_head_dim=64)
    with pytest.raises(plan.UsageError, match="structured data have no v_head_dim of their own"):
        sweep.tensors("structured", shape, 640, torch.device("cpu"), torch.float32, 0)


def test_from_calibration_to_verification(run, tmp_path):
    model = build(
        "deepseek-v3", vocab_size=257, pad_token_id=None, bos_token_id=256, eos_token_id=256,
        max_position_embeddings=4096, **{LABEL_KEY: LABEL},
    )  # fmt: skip
    folder, file = tmp_path / "model", tmp_path / "t.safetensors"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    small = ("--length", "768", "--device", "cpu")
    assert run("calibrate", folder, "-o", tmp_path / "run", "--samples", "3", *small).code == 0
    exported = run("export", tmp_path / "run", "-o", file, "--gate", "absolute", "--target-skip", "0.3")
    assert exported.code == 0, exported.err
    loose = ("--max-kl-over-floor", "10", "--min-top1", "0", "--max-dropped-mass", "1")
    verified = run("verify", folder, "--thresholds", file, "--samples", "1", *small, *loose)
    assert "kernel torch against the float64 reference" in verified.err and "0 tiles decided" in verified.err
    captured = tmp_path / "captured.safetensors"
    assert run("capture", folder, "-o", captured, "--length", "512", "--device", "cpu").code == 0
    compared = run(
        "compare",
        "--captured",
        captured,
        "--methods",
        "pbs",
        "--setting",
        "pbs=0.9",
        "--device",
        "cpu",
        "--seconds",
        "0.01",
    )
    assert compared.code == 0, compared.err
