"""attn_implementation="bsfa" against the dense implementations of transformers, on tiny random models."""

import warnings

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
import transformers
from tiny_models import MODELS, ROWS, WINDOW, assert_close, batch, build, chunk, logits, positions
from transformers import DynamicCache


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
    assert all(note.expected for note in bsfa.notes(model))


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_of_a_padded_batch_equals_dense(name):
    model = build(name)
    ids, mask = batch(170, (0, 23))
    expected = logits(model, "eager", ids, mask)
    cache, parts = DynamicCache(config=model.config), []
    for start, end in ((0, 70), (70, 71), (71, 170)):
        parts.append(chunk(model, ids, mask, start, end, cache))
    assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()])


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


def test_a_window_as_long_as_the_sequence_counts_as_plain_causal():
    model = build("mistral")
    ids, mask = batch(WINDOW, (0, 5))
    expected = logits(model, "eager", ids, mask)
    assert_close(logits(model, "bsfa", ids, mask)[mask.bool()], expected[mask.bool()])
    assert all(note.expected for note in bsfa.notes(model))


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
    assert len([note for note in bsfa.notes(model) if not note.expected]) == 2


def test_a_sequence_that_is_all_padding_disturbs_nothing():
    model = build("llama")
    ids, mask = batch(100, (0, 100))
    expected = logits(model, "eager", ids, mask)
    actual = logits(model, "bsfa", ids, mask)
    assert_close(actual[0], expected[0])
    assert actual.isfinite().all()


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
    assert all(note.expected for note in bsfa.notes(model))
    assert [module.causal for module in bsfa.attention_modules(model).values()] == [False, False, True]


def test_images_in_a_prompt_attend_both_ways_exactly():
    from bsfa_kernels.integrations.masks import decode
    from transformers.masking_utils import create_causal_mask

    model = build("gemma3")
    model.set_attn_implementation("bsfa")
    options = dict(inputs_embeds=torch.zeros(1, 30, 8), attention_mask=None, past_key_values=None)

    def mask(*images):
        blocks = torch.full((1, 30), -1)
        for number, rows in images:
            blocks[0, rows] = number
        return create_causal_mask(model.config, block_sequence_ids=blocks, **options)

    spans, pattern, groups = decode(mask((0, slice(5, 15)), (1, slice(15, 18))))
    assert spans is None and pattern == (True, None)
    assert groups.table.tolist() == [[[5, 10], [15, 3]]] and groups.longest == 10
    assert decode(mask()).groups is None
    # One image in two places is no group of neighbours: its mask stays a mask.
    parted = mask((0, slice(5, 15)), (0, slice(20, 22)))
    assert parted.dtype == torch.float32 and parted.shape == (1, 1, 30, 30)
    assert parted[0, 0, 5, 14] == 0 and parted[0, 0, 5, 21] == 0 and parted[0, 0, 4, 5] < -1e30


@pytest.mark.parametrize("window", [None, 40])
def test_groups_join_what_the_causal_part_lacks(window):
    from bsfa_kernels.integrations import dense
    from bsfa_kernels.integrations.groups import exact_attention, find

    generator = torch.Generator().manual_seed(8)
    q = torch.randn(2, 4, 200, 16, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 200, 16, generator=generator, dtype=torch.float64)
    ids = torch.full((2, 200), -1)
    ids[0, 10:80], ids[0, 80:95], ids[1, 130:200], ids[1, 0:1] = 3, 1, 0, 2
    groups = find(ids)
    row, column = torch.arange(200)[:, None], torch.arange(200)
    visible = (column <= row) & (column > row - (window or 999))
    same = (ids[:, :, None] == ids[:, None]) & (ids[:, :, None] >= 0) & (column > row)
    visible = (visible | same)[:, None]
    scores = (0.3 * q @ k.repeat_interleave(2, 1).mT).masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    options = dict(scale=0.3, causal=True, window=window, groups=groups)
    assert (dense.attention(q, k, v, **options) - expected).abs().max() < 1e-12
    spans = torch.tensor([[0, 0, 200, 200]] * 2, dtype=torch.int32)
    for where in (None, spans):
        found = exact_attention(q, k, v, spans=where, return_lse=True, **options)
        assert (found.out - expected).abs().max() < 1e-5
        assert (found.lse - scores.logsumexp(-1)).abs().max() < 1e-5


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
    from bsfa_kernels.integrations.masks import decode, mask_function
    from transformers.masking_utils import sliding_window_causal_mask_function

    length = 100_000
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :333] = False
    for function, size in ((None, 1), (sliding_window_causal_mask_function(4096), 4098)):
        options = {} if function is None else {"mask_function": function}
        mask = mask_function(2, length, length, attention_mask=padding, **options)
        assert mask.shape == (2, 1, size, 4) and mask.untyped_storage().nbytes() <= 64
        positions, unbounded = decode(mask), 2**31 - 1
        assert positions.spans.tolist() == [[0, 0, length, unbounded], [-333, -333, length - 333, unbounded]]


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
