"""Handlers on attention modules: who is called, with what, and the thresholds artifact applied to a model."""

import copy
import subprocess
import sys
from pathlib import Path

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
import transformers
from bsfa_kernels import TileShape, block_sparse_attention
from bsfa_kernels.integrations.plan import NO_THRESHOLDS
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds, ThresholdsError
from tiny_models import ALTERNATE, MODELS, SHAPE, WINDOW, assert_close, batch, build, chunk, logits
from transformers import DynamicCache

SCORING = {
    "llama": [None, None],
    "qwen2": [None, None],
    "qwen2-sliding": [None, f"sliding window of {WINDOW} tokens"],
    "qwen3": [None, None],
    "mistral": [f"sliding window of {WINDOW} tokens"] * 2,
    "gemma2": ["scores are soft-capped at 5"] * 2,
    "gemma3": [f"sliding window of {WINDOW} tokens", None],
    "gpt-oss": ["attention sinks"] * 2,
}


@pytest.mark.parametrize("name", MODELS)
def test_modules_say_how_they_score(name):
    model = build(name)
    model.set_attn_implementation("bsfa")
    modules = bsfa.attention_modules(model)
    assert list(modules) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [module.scoring for module in modules.values()] == SCORING[name]
    assert all(module.dense_reason is None for module in modules.values())
    for layer, module in enumerate(modules.values()):
        assert (module.layer, module.query_heads, module.kv_heads, module.head_dim) == (layer, 4, 2, 64)
        assert module.causal and module.scale == 0.125
    ids, mask = batch(100, (0, 9))
    logits(model, "bsfa", ids, mask)
    assert {(note.reason, note.expected) for note in bsfa.notes(model)} == {(NO_THRESHOLDS, True)}


def test_what_cannot_be_done_is_refused():
    model = build("llama", attention_dropout=0.1)
    model.set_attn_implementation("bsfa")
    ids, mask = batch(20, (0, 0))
    with pytest.raises(ValueError, match="dropout"):
        model.train()(ids)
    with pytest.raises(ValueError, match="backward"):
        trained = build("llama").train()
        trained.set_attn_implementation("bsfa")
        trained(ids)
    with pytest.raises(ValueError, match="output_attentions"):
        model.eval()(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.int32))


class Recorder:
    """A handler that attends as usual and remembers what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, *, scale, causal, spans):
        self.calls.append((tuple(q.shape), tuple(k.shape), scale, causal, spans))
        return block_sparse_attention(q, k, v, scale=scale, causal=causal, spans=spans).out


def test_handlers_see_prefills_until_detached():
    model = build("llama")
    ids, mask = batch(64, (0, 6))
    expected = logits(model, "bsfa", ids, mask)
    outer, inner = Recorder(), Recorder()
    path = "model.layers.1.self_attn"
    with bsfa.attach(model, {path: outer}):
        with bsfa.attach(model, {path: inner}):
            assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])
        logits(model, "bsfa", ids, mask)
        logits(model, "bsfa", ids[:, :1], mask[:, :1])
    logits(model, "bsfa", ids, mask)
    assert len(inner.calls) == len(outer.calls) == 1
    q, k, scale, causal, spans = outer.calls[0]
    assert (q, k, scale, causal) == ((2, 4, 64, 64), (2, 2, 64, 64), 0.125, True)
    assert spans.tolist() == [[0, 0, 64, 2**31 - 1], [-6, -6, 58, 2**31 - 1]]
    with pytest.raises(ValueError, match="no attention module 'model.layers.7.self_attn'"):
        bsfa.attach(model, {"model.layers.7.self_attn": outer})
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        bsfa.attach(model, {path: outer})


def thresholds(model, value, gate="gap", **changes):
    """Thresholds of `value` everywhere, for the modules of `model`."""
    modules = bsfa.attention_modules(model)
    identity = {**dict.fromkeys(MODEL_KEYS), "id": "tiny", **bsfa.model_identity(model), **changes}
    tensors = {path: torch.full((1, module.query_heads, 1), value) for path, module in modules.items()}
    return Thresholds(identity, TileShape(16, 32), True, (0,), (Point("only", gate, "test", 0.0),), tensors)


def test_apply_runs_an_artifact_and_counts(tmp_path):
    model = build("llama")
    ids, mask = batch(200, (0, 40))
    expected = logits(model, "sdpa", ids, mask)
    thresholds(model, -torch.inf).write(tmp_path / "open.safetensors")
    with bsfa.apply(model, tmp_path / "open.safetensors", count=True):
        assert model.config._attn_implementation == "bsfa"
        assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])
        counts = bsfa.active(model.model.layers[0].self_attn).counts
        assert torch.equal(counts.kept, counts.candidates) and (counts.kept > 0).all()
    with bsfa.apply(model, thresholds(model, 1e9), "only", count=True):
        closed = logits(model, "bsfa", ids, mask)
        counts = bsfa.active(model.model.layers[0].self_attn).counts
        assert (counts.kept == 0).all() and (counts.candidates > 0).all()
    assert (closed - expected)[mask.bool()].abs().max() > 0.01
    assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])


def test_a_chunked_prefill_drops_the_tiles_that_a_whole_one_drops():
    model = build("llama")
    ids, mask = batch(200, (0, 33))
    for value, gate in ((0.5, "gap"), (2.0, "absolute")):
        with bsfa.apply(model, thresholds(model, value, gate), count=True):
            whole = logits(model, "bsfa", ids, mask)
            cache = DynamicCache(config=model.config)
            # Chunk ends on the tile borders of both sequences are impossible; of the first one they suffice.
            parts = [chunk(model, ids, mask, start, end, cache) for start, end in ((0, 96), (96, 160), (160, 200))]
            assert 0 < bsfa.active(model.model.layers[0].self_attn).counts.kept.sum()
        assert_close(torch.cat(parts, 1)[0], whole[0])


@pytest.mark.parametrize(
    "changes,named",
    [(dict(query_heads=8), "query_heads"), (dict(head_dim=128), "head_dim"), (dict(rope={"rope_theta": 1.0}), "rope")],
)
def test_apply_names_what_differs_in_another_model(changes, named):
    model = build("llama")
    with pytest.raises(ThresholdsError, match=named):
        bsfa.apply(model, thresholds(model, 0.0, **changes))
    assert "bsfa_handlers" not in vars(model.model.layers[0].self_attn)


def test_apply_refuses_modules_the_model_does_not_have():
    model, other = build("llama"), build("llama", num_hidden_layers=3)
    with pytest.raises(ThresholdsError, match="model.layers.2.self_attn"):
        bsfa.apply(model, thresholds(other, 0.0, layers=2, config=None, config_hash=None, weights=None))


def test_identity_ignores_how_a_model_is_loaded_and_sees_what_it_computes():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0**-20)  # float16 flushes part of these to zero
    identity = bsfa.model_identity(model)
    model.set_attn_implementation("bsfa")
    model.config.pad_token_id = 5
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        assert bsfa.model_identity(copy.deepcopy(model).to(dtype)) == identity
        assert bsfa.model_identity(model.to(dtype)) == identity
    assert bsfa.model_identity(build("llama", rms_norm_eps=1e-3))["config_hash"] != identity["config_hash"]


def test_identity_sees_other_weights_and_none_where_they_are_not_here():
    model, other = build("llama"), build("llama")
    artifact = thresholds(model, 0.0)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.normal_()
    with pytest.raises(ThresholdsError, match="weights is"):
        bsfa.apply(other, artifact)
    assert bsfa.model_identity(other.to("meta"))["weights"] is None


def test_a_vision_tower_is_known_by_path_and_may_run_another_implementation():
    text = dict(SHAPE, **ALTERNATE, query_pre_attn_scalar=64)
    vision = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(1)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    pixels = torch.randn(1, 3, 32, 32)
    ids, _ = batch(40, (0, 0))
    ids = ids[:1]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model.get_image_features(pixels).pooler_output, model(ids).logits
        model.set_attn_implementation({"text_config": "bsfa", "vision_config": "sdpa"})
        tower = next(m for path, m in bsfa.attention_modules(model).items() if "vision" in path)
        assert (tower.causal, tower.layer, tower.query_heads, tower.head_dim) == (False, None, 2, 32)
        assert tower.dense_reason == "attn_implementation is 'sdpa'"
        assert_close(model(ids).logits, expected[1])
        model.set_attn_implementation("bsfa")
        recorder = Recorder()
        with bsfa.attach(model, {tower.path: recorder}):
            assert_close(model.get_image_features(pixels).pooler_output, expected[0])
        assert recorder.calls[0][3:] == (False, None)


def test_bsfa_and_the_kernels_package_live_side_by_side():
    """From the repository root, whose folder `kernels` must not shadow Hugging Face's package of that name."""
    code = (
        "import kernels, transformers, bsfa_kernels.integrations.transformers, bsfa_cli\n"
        "assert callable(kernels.get_kernel), kernels\n"
        "assert 'bsfa' in transformers.AttentionInterface().valid_keys()\n"
    )
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("padding", [(0, 0), (0, 41), (0, -41)], ids=["whole", "left", "right"])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt-oss"])
def test_windows_softcap_and_sinks_are_gated_by_the_specification(name, padding):
    """With thresholds that keep every tile a model is what it is densely; with others layers are the reference's."""
    model = build(name)
    ids, mask = batch(200, padding)
    expected = logits(model, "eager", ids, mask)
    with bsfa.apply(model, thresholds(model, -torch.inf), count=True):
        assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])
        assert bsfa.skip_rate(model) == 0
        assert bsfa.notes(model) == []
    with bsfa.apply(model, thresholds(model, 1.0), count=True):
        sparse = logits(model, "bsfa", ids, mask)
        rate = bsfa.skip_rate(model)
    handlers = {
        path: bsfa.SparseAttention(thresholds(model, 1.0), None, path, backend="reference")
        for path in bsfa.attention_modules(model)
    }
    model.set_attn_implementation("bsfa")
    with bsfa.attach(model, handlers):
        assert_close(sparse[mask.bool()], logits(model, "bsfa", ids, mask)[mask.bool()])
    assert rate > 0.02


def test_a_windowed_layer_in_chunks_reads_what_its_cache_still_holds():
    model = build("mistral")
    ids, mask = batch(200, (0, 33))
    expected = logits(model, "eager", ids, mask)
    with bsfa.apply(model, thresholds(model, -torch.inf)):
        cache = DynamicCache(config=model.config)
        parts = [chunk(model, ids, mask, start, end, cache) for start, end in ((0, 90), (90, 130), (130, 200))]
    assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])
    assert cache.layers[0].keys.shape[2] < WINDOW
