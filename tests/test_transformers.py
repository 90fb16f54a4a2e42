"""attn_implementation="bsfa" against the dense implementations of transformers, on tiny random models."""

import subprocess
import sys
import warnings
from pathlib import Path

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
import transformers
from bsfa_kernels import Gate, TileShape, block_sparse_attention
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds, ThresholdsError
from transformers import DynamicCache

WINDOW = 48
SHAPE = dict(
    vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-sliding": ("Qwen2ForCausalLM", dict(use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW)),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", dict(sliding_window=WINDOW)),
    "gemma2": ("Gemma2ForCausalLM", dict(**ALTERNATE, attn_logit_softcapping=5.0, query_pre_attn_scalar=64)),
    "gemma3": ("Gemma3ForCausalLM", dict(**ALTERNATE, query_pre_attn_scalar=64)),
    "gpt-oss": ("GptOssForCausalLM", dict(**ALTERNATE, num_local_experts=2, num_experts_per_tok=1)),
}
DENSE_REASONS = {
    "llama": [None, None],
    "qwen2": [None, None],
    "qwen2-sliding": [None, f"sliding window of {WINDOW} tokens"],
    "qwen3": [None, None],
    "mistral": [f"sliding window of {WINDOW} tokens"] * 2,
    "gemma2": ["scores are soft-capped at 5"] * 2,
    "gemma3": [f"sliding window of {WINDOW} tokens", None],
    "gpt-oss": ["attention sinks"] * 2,
}
ROWS = {"whole": (0, 0), "left": (0, 61), "right": (0, -61)}


def build(name, place=("cpu", torch.float32), **overrides):
    kind, options = MODELS[name]
    settings = {**SHAPE, **options, **overrides}
    config = getattr(transformers, kind).config_class(**settings)
    torch.manual_seed(3)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            if path.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(1.7)
            if path.endswith("sinks"):
                parameter.fill_(1.0)
    return model.to(*place)


def batch(length, padding, device="cpu"):
    """(token ids [2, length], mask): the second sequence padded at the left (> 0) or right (< 0)."""
    ids = torch.randint(2, SHAPE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        if pad > 0:
            mask[row, :pad] = 0
        elif pad < 0:
            mask[row, pad:] = 0
    return ids.masked_fill(mask == 0, 0).to(device), mask.to(device)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model, implementation, ids, mask, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(ids, attention_mask=mask, position_ids=positions(mask), **options).logits


def assert_close(actual, expected):
    """Within rounding of the dtype at the scale of the logits."""
    eps = torch.finfo(actual.dtype).eps
    scale = expected.float().abs().max()
    error = (actual.float() - expected.float()).abs().max()
    assert error <= 64 * eps * scale, f"error {error:.3g} at scale {scale:.3g}"


@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_prefill_equals_dense(name, padding):
    model = build(name)
    ids, mask = batch(200, ROWS[padding])
    expected = logits(model, "eager", ids, mask)
    actual = logits(model, "bsfa", ids, mask)
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ROWS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_prefill_equals_dense_on_a_gpu(name, padding):
    model = build(name, ("cuda", torch.bfloat16))
    ids, mask = batch(700, ROWS[padding], "cuda")
    expected = logits(model.float(), "eager", ids, mask)
    model = model.to(torch.bfloat16)
    dense = logits(model, "eager", ids, mask)
    actual = logits(model, "bsfa", ids, mask)
    error, allowed = (
        (x.float() - expected)[mask.bool()].norm() / expected[mask.bool()].norm() for x in (actual, dense)
    )
    assert error <= 1.5 * allowed + 1e-3, f"relative L2 error {error:.3g}, plain bfloat16 has {allowed:.3g}"


def test_prefill_without_a_mask_leaves_no_buffer_and_equals_dense():
    model = build("llama")
    ids, _ = batch(150, (0, 0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("bsfa")
        assert_close(model(ids).logits, expected)
    assert bsfa.notes(model) == []


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_of_a_padded_batch_equals_dense(name):
    model = build(name)
    ids, mask = batch(170, (0, 23))
    expected = logits(model, "eager", ids, mask)
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 70), (70, 71), (71, 170)):
        parts.append(chunk(model, ids, mask, start, end, cache))
    assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])


def chunk(model, ids, mask, start, end, cache):
    model.set_attn_implementation("bsfa")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions(mask)[:, start:end],
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip


@pytest.mark.gpu
def test_chunked_prefill_equals_whole_prefill_on_a_gpu():
    model = build("llama", ("cuda", torch.bfloat16))
    ids, mask = batch(900, (0, 130), "cuda")
    whole = logits(model, "bsfa", ids, mask)
    cache = DynamicCache(config=model.config)
    parts = [chunk(model, ids, mask, start, end, cache) for start, end in ((0, 333), (333, 640), (640, 900))]
    difference = (torch.cat(parts, 1).float() - whole.float())[mask.bool()].norm() / whole.float()[mask.bool()].norm()
    assert difference < 0.04


def generate(model, implementation, cache, **options):
    ids, mask = batch(90, (0, 17), model.device)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)
    if cache == "static":
        options["cache_implementation"] = "static"
    model.set_attn_implementation(implementation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_equals_dense(name, cache):
    model = build(name)
    dense, sparse = (generate(model, x, cache, disable_compile=True) for x in ("eager", "bsfa"))
    assert torch.equal(dense.sequences, sparse.sequences)
    assert_close(torch.stack(sparse.logits), torch.stack(dense.logits))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name,cache,compiled", [("llama", "dynamic", False), ("gemma3", "static", False), ("llama", "static", True)]
)
def test_generate_equals_dense_on_a_gpu(name, cache, compiled):
    model = build(name, ("cuda", torch.bfloat16))
    dense = generate(model, "eager", cache, disable_compile=True).logits[0].float()
    sparse = generate(model, "bsfa", cache, disable_compile=not compiled)
    assert (sparse.logits[0].float() - dense).norm() / dense.norm() < 0.05
    assert torch.stack(sparse.logits).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_modules_say_where_and_why_nothing_is_skipped(name):
    model = build(name)
    model.set_attn_implementation("bsfa")
    modules = bsfa.attention_modules(model)
    assert list(modules) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [module.dense_reason for module in modules.values()] == DENSE_REASONS[name]
    for layer, module in enumerate(modules.values()):
        assert (module.layer, module.query_heads, module.kv_heads, module.head_dim) == (layer, 4, 2, 64)
        assert module.causal and module.scale == 0.125
    ids, mask = batch(100, (0, 9))
    logits(model, "bsfa", ids, mask)
    ran_dense = {note.path: note.reason for note in bsfa.notes(model)}
    assert [ran_dense.get(path) for path in modules] == DENSE_REASONS[name]


def test_a_window_as_long_as_the_sequence_counts_as_plain_causal():
    model = build("mistral")
    ids, mask = batch(WINDOW, (0, 5))
    expected = logits(model, "eager", ids, mask)
    assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])
    assert bsfa.notes(model) == []


def holes():
    ids, mask = batch(120, (0, 0))
    mask[1, 40:50] = 0
    return ids, dict(attention_mask=mask, position_ids=positions(mask))


def packed():
    ids, _ = batch(120, (0, 0))
    return ids, dict(position_ids=torch.cat([torch.arange(50), torch.arange(70)]).expand(2, -1), use_cache=False)


def own_mask():
    ids, _ = batch(120, (0, 0))
    visible = torch.ones(120, 120, dtype=torch.bool).tril() | (torch.arange(120) < 30)
    return ids, dict(attention_mask=visible.expand(2, 1, -1, -1))


@pytest.mark.parametrize("case", [holes, packed, own_mask])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masks_that_spans_cannot_say_run_dense_with_one_warning(case, name):
    model = build(name, sliding_window=4096) if name == "gemma2" else build(name)
    ids, options = case()
    float_mask = dict(options)
    if case is own_mask:
        float_mask["attention_mask"] = torch.where(options["attention_mask"], 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, **float_mask).logits
        model.set_attn_implementation("bsfa")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            actual = model(ids, **options).logits
    valid = options.get("attention_mask", torch.ones_like(ids)) if case is holes else torch.ones_like(ids)
    assert_close(actual[valid.bool()], expected[valid.bool()])
    assert len([w for w in caught if w.category is bsfa.DenseFallback]) == 1
    assert len(bsfa.notes(model)) == 2


def test_a_sequence_that_is_all_padding_disturbs_nothing():
    model = build("llama")
    ids, mask = batch(100, (0, 100))
    expected = logits(model, "eager", ids, mask)
    actual = logits(model, "bsfa", ids, mask)
    assert_close(actual[0], expected[0])
    assert actual.isfinite().all()


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
            assert torch.equal(logits(model, "bsfa", ids, mask), expected)
        logits(model, "bsfa", ids, mask)
        logits(model, "bsfa", ids[:, :1], mask[:, :1])
    logits(model, "bsfa", ids, mask)
    assert len(inner.calls) == len(outer.calls) == 1
    q, k, scale, causal, spans = outer.calls[0]
    assert (q, k, scale, causal) == ((2, 4, 64, 64), (2, 2, 64, 64), 0.125, True)
    assert spans.tolist() == [[0, 0, 64, 64], [-6, -6, 58, 58]]
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
        counts = model.model.layers[0].self_attn.bsfa_handler.counts
        assert torch.equal(counts.kept, counts.candidates) and (counts.kept > 0).all()
    with bsfa.apply(model, thresholds(model, 1e9), "only", count=True):
        closed = logits(model, "bsfa", ids, mask)
        counts = model.model.layers[0].self_attn.bsfa_handler.counts
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
            assert 0 < model.model.layers[0].self_attn.bsfa_handler.counts.kept.sum()
        assert_close(torch.cat(parts, 1)[0], whole[0])


@pytest.mark.parametrize(
    "changes,named",
    [(dict(query_heads=8), "query_heads"), (dict(head_dim=128), "head_dim"), (dict(rope={"rope_theta": 1.0}), "rope")],
)
def test_apply_names_what_differs_in_another_model(changes, named):
    model = build("llama")
    with pytest.raises(ThresholdsError, match=named):
        bsfa.apply(model, thresholds(model, 0.0, **changes))
    assert "bsfa_handler" not in vars(model.model.layers[0].self_attn)


def test_apply_refuses_modules_the_model_does_not_have():
    model, other = build("llama"), build("llama", num_hidden_layers=3)
    with pytest.raises(ThresholdsError, match="model.layers.2.self_attn"):
        bsfa.apply(model, thresholds(other, 0.0, layers=2, config_hash=None))


def test_identity_ignores_how_a_model_is_loaded_and_sees_what_it_computes():
    model = build("llama")
    identity = bsfa.model_identity(model)
    model.set_attn_implementation("bsfa")
    assert bsfa.model_identity(model.to(torch.bfloat16)) == identity
    assert bsfa.model_identity(build("llama", rms_norm_eps=1e-3))["config_hash"] != identity["config_hash"]


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


def test_a_vision_language_model_equals_dense_on_an_image():
    text = dict(
        vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters=dict(rope_type="default", mrope_section=[4, 6, 6], rope_theta=1e4),
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=64, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=150, vision_start_token_id=151,
        vision_end_token_id=152, video_token_id=153,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    image = [151] + [150] * 24 + [152]
    ids = torch.tensor([[*range(10), *image, *range(20, 60)]])
    inputs = dict(
        pixel_values=torch.randn(96, 3 * 2 * 14 * 14), image_grid_thw=torch.tensor([[1, 8, 12]]),
        mm_token_type_ids=(ids == 150).int(),
    )  # fmt: skip
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, **inputs).logits
        model.set_attn_implementation("bsfa")
        assert_close(model(ids, **inputs).logits, expected)
    assert bsfa.notes(model) == []
    assert [module.causal for module in bsfa.attention_modules(model).values()] == [False, False, True]


def test_images_in_a_prompt_attend_both_ways_exactly():
    from transformers.masking_utils import create_causal_mask

    model = build("gemma3")
    model.set_attn_implementation("bsfa")
    blocks = torch.full((1, 30), -1)
    blocks[0, 5:15] = 0
    options = dict(inputs_embeds=torch.zeros(1, 30, 8), attention_mask=None, past_key_values=None)
    mask = create_causal_mask(model.config, block_sequence_ids=blocks, **options)
    assert mask.dtype == torch.bool and mask.shape == (1, 1, 30, 30)
    assert mask[0, 0, 5, 14] and not mask[0, 0, 4, 5]


def test_torch_compile_needs_no_graph_break():
    model = build("llama")
    ids, mask = batch(128, (0, 9))
    expected = logits(model, "bsfa", ids, mask)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        actual = compiled(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        assert_close(actual[mask.bool()], expected[mask.bool()])
        assert_close(compiled(ids[:1], use_cache=False).logits, logits(model, "bsfa", ids[:1], mask[:1]))


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    model = build("llama", ("cuda", torch.bfloat16))
    ids, mask = batch(400, (0, 9), "cuda")
    expected = logits(model, "bsfa", ids, mask).float()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        actual = compiled(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits.float()
    assert (actual - expected)[mask.bool()].norm() / expected[mask.bool()].norm() < 0.04


def test_a_compiled_model_refuses_holes_in_the_mask():
    model = build("llama")
    model.set_attn_implementation("bsfa")
    ids, options = holes()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="attention_mask without holes"):
        compiled(ids, use_cache=False, **options)


def test_masks_of_long_prompts_take_no_memory():
    from bsfa_kernels.integrations.masks import mask_function
    from transformers.masking_utils import sliding_window_causal_mask_function

    length = 100_000
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :333] = False
    for function, size in ((None, 1), (sliding_window_causal_mask_function(4096), 4098)):
        options = {} if function is None else {"mask_function": function}
        mask = mask_function(2, length, length, attention_mask=padding, **options)
        assert mask.shape == (2, 1, size, 4) and mask.untyped_storage().nbytes() <= 64
        assert mask[:, 0, 0].tolist() == [[0, 0, length, length], [-333, -333, length - 333, length - 333]]


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


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_dense_attention_against_the_formula(window, softcap, sinks, monkeypatch):
    from bsfa_kernels.integrations import dense

    monkeypatch.setattr(dense, "SCORES_PER_CHUNK", 1)  # the smallest chunks
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 50, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 90, 16, generator=generator, dtype=torch.float64)
    sink = torch.randn(4, generator=generator, dtype=torch.float64) if sinks else None
    spans = torch.tensor([[40, 0, 90, 90], [33, -7, 83, 83]], dtype=torch.int32)
    out = dense.attention(q, k, v, scale=0.3, causal=True, spans=spans, window=window, softcap=softcap, sinks=sink)

    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    row, column = torch.arange(50)[:, None] + 40, torch.arange(90)
    visible = ((column <= row) & (column > row - (window or 999))).expand(2, 1, -1, -1).clone()
    visible[1, ..., :7] = False
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks:
        scores = torch.cat([scores, sink[:, None, None].expand(2, 4, 50, 1)], -1)
    expected = scores.softmax(-1)[..., :90] @ v.repeat_interleave(2, 1)
    assert (out - expected).abs().max() < (1e-5 if sinks or softcap else 1e-12)


def test_the_gate_of_a_handler_grows_with_the_sequence_only():
    model = build("llama")
    handler = bsfa.SparseAttention(thresholds(model, 0.25), None, "model.layers.0.self_attn")
    gate = handler.gate(100, torch.device("cpu"))
    assert isinstance(gate, Gate) and gate.gap.shape[1] >= 7 and (gate.gap == 0.25).all()
    assert handler.gate(64 * 16, torch.device("cpu")) is gate
    assert handler.gate(64 * 16 + 1, torch.device("cpu")).gap.shape[1] >= 65
