"""Handlers on a model: put on, taken off in any order, copied, pickled, captured, refused."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.thresholds import Point, Thresholds
from tiny_models import assert_close, batch, build, chunk
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.llama import modeling_llama

LENGTH = 700


def thresholds_for(model, gap: float = 2.0, knots=(32, 4096)) -> Thresholds:
    """A gap gate of one value for every layer of `model`."""
    modules = bsfa.attention_modules(model)
    return Thresholds(
        {"id": "tiny", "revision": None, **bsfa.model_identity(model)}, TileShape(), True, knots,
        (Point("only", "gap", "by-hand", gap),),
        {path: torch.full((1, module.query_heads, len(knots)), gap) for path, module in modules.items()},
    )  # fmt: skip


@pytest.fixture
def model():
    return build("llama")


def run(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


@pytest.fixture
def ids():
    return batch(LENGTH, (0, 0))[0]


def test_attachments_go_in_any_order_and_the_former_implementation_comes_back(model, ids):
    dense = run(model, ids)
    first = bsfa.apply(model, thresholds_for(model, 2.0))
    sparse = run(model, ids)
    second = bsfa.apply(model, thresholds_for(model, 3.0))
    sparser = run(model, ids)
    assert not torch.equal(dense, sparse) and not torch.equal(sparse, sparser)
    first.detach()
    assert torch.equal(run(model, ids), sparser) and model.config._attn_implementation == "bsfa"
    first.detach()  # twice is once
    path = "model.layers.0.self_attn"
    third = bsfa.attach(model, {path: bsfa.SparseAttention(thresholds_for(model), None, path)})
    second.detach()
    third.detach()
    assert model.config._attn_implementation == "sdpa" and torch.equal(run(model, ids), dense)
    assert all("bsfa_handlers" not in vars(module) for module in model.modules())


def test_remove_takes_everything_off(model, ids):
    dense = run(model, ids)
    bsfa.remove(model)  # nothing there
    bsfa.apply(model, thresholds_for(model))
    bsfa.apply(model, thresholds_for(model, 3.0))
    bsfa.remove(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(run(model, ids), dense)
    with bsfa.apply(model, thresholds_for(model)):
        assert model.config._attn_implementation == "bsfa"
    assert model.config._attn_implementation == "sdpa"


def test_what_somebody_chose_since_is_left_alone(model):
    attachment = bsfa.apply(model, thresholds_for(model))
    model.set_attn_implementation("eager")
    attachment.detach()
    assert model.config._attn_implementation == "eager"


def test_a_model_that_came_with_bsfa_keeps_it(model):
    model.set_attn_implementation("bsfa")
    bsfa.apply(model, thresholds_for(model)).detach()
    assert model.config._attn_implementation == "bsfa"


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


def gpt2() -> GPT2LMHeadModel:
    """A model that can be pickled: others hold functions that cannot, with the package `kernels` installed."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=97, n_positions=LENGTH, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("copied, make", [(copy.deepcopy, lambda: build("llama")), (unpickled, gpt2)],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_keeps_thresholds_and_counters_of_its_own(ids, copied, make):
    model = make()
    bsfa.apply(model, thresholds_for(model), count=True)
    sparse = run(model, ids)
    rate = bsfa.skip_rate(model)
    twin = copied(model)
    assert torch.equal(run(twin, ids), sparse) and rate > 0.05
    bsfa.remove(twin)
    assert twin.config._attn_implementation == "sdpa" and bsfa.skip_rate(twin) is None
    assert torch.equal(run(model, ids), sparse) and bsfa.skip_rate(model) == rate


def test_counters_and_gates_do_not_move(model, ids):
    bsfa.apply(model, thresholds_for(model), count=True)
    handlers = [bsfa.active(module) for module in model.modules() if bsfa.active(module)]
    places = [(h._gate.gap.data_ptr(), h._totals.data_ptr()) for h in handlers]
    for length in (64, 200, LENGTH):
        run(model, ids[:, :length])
    assert [(h._gate.gap.data_ptr(), h._totals.data_ptr()) for h in handlers] == places
    once = bsfa.skip_rate(model)
    counted = [h.counts.candidates.sum().item() for h in handlers]
    for length in (64, 200, LENGTH):
        run(model, ids[:, :length])
    assert bsfa.skip_rate(model) == once
    assert [h.counts.candidates.sum().item() for h in handlers] == [2 * n for n in counted]
    handlers[0].reset()
    assert handlers[0].counts.kept.sum() == 0


def test_a_gate_has_a_column_for_every_position(model):
    path = "model.layers.0.self_attn"
    thresholds = thresholds_for(model, knots=(32, 1000, 5000))
    thresholds.tensors[path][0, :, 2] = -3.0
    handler = bsfa.SparseAttention(thresholds, None, path)
    whole = thresholds.gate(path, None, 1000).gap
    gap = handler.gate(10**6, torch.device("cpu")).gap
    assert torch.equal(gap, whole[:, : gap.shape[1]]) and torch.equal(whole[:, gap.shape[1] :].unique(), gap[:1, -1])
    short = bsfa.SparseAttention(thresholds, None, path, longest=2000)
    assert short.gate(2000, torch.device("cpu")).gap.shape[1] == 32
    with pytest.raises(ValueError, match="a sequence of 2,049 positions is longer than the 2,048"):
        short.gate(2049, torch.device("cpu"))


def test_threads_share_a_model(model, ids):
    bsfa.apply(model, thresholds_for(model), count=True)
    prompts = [ids[:1, :n] for n in (130, 260, 390, 520)]
    alone = [run(model, prompt) for prompt in prompts]
    once = [bsfa.active(m).counts.candidates.clone() for m in model.modules() if bsfa.active(m)]
    barrier = threading.Barrier(4)

    def together(prompt):
        barrier.wait()
        return [run(model, prompt) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(together, prompts), alone, strict=True):
            assert all(torch.equal(result, expected) for result in results)
    after = [bsfa.active(m).counts.candidates for m in model.modules() if bsfa.active(m)]
    assert all(torch.equal(b, 6 * a) for a, b in zip(once, after, strict=True))


def test_a_layer_has_its_gate_and_counters_on_its_own_device(model):
    thresholds = thresholds_for(model)
    model.model.layers[1].to("meta")
    bsfa.apply(model, thresholds, count=True)
    for layer, place in zip(model.model.layers, ("cpu", "meta"), strict=True):
        handler = bsfa.active(layer.self_attn)
        assert handler.gate(LENGTH, torch.device(place)).gap.device.type == place
        assert handler.counts.kept.device.type == place


def test_heads_with_exact_scores_are_counted_within_a_processs_own(model):
    path = "model.layers.0.self_attn"
    thresholds = thresholds_for(model)
    point = replace(thresholds.points[0], scores="int8", exact_heads={path: [0, 3]})
    thresholds = replace(thresholds, points=(point,))
    found = [bsfa.SparseAttention(thresholds, None, path, heads=slice(a, a + 2)).exact_heads for a in (0, 2)]
    assert found == [(0,), (1,)] and bsfa.SparseAttention(thresholds, None, path).exact_heads == (0, 3)


class Inherited(modeling_llama.LlamaAttention):
    pass


class Extended(modeling_llama.LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Other(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


@pytest.mark.parametrize("kind, found", [(Inherited, True), (Extended, True), (Other, False)])
def test_attention_of_a_users_own_class_is_found(model, kind, found):
    layer = model.model.layers[0]
    layer.self_attn = kind(model.config, 0)
    assert ("model.layers.0.self_attn" in bsfa.attention_modules(model)) == found
    source = "from transformers.models.llama.modeling_llama import LlamaAttention\nclass Own(LlamaAttention): pass"
    exec(source, namespace := {})
    layer.self_attn = namespace["Own"](model.config, 0)
    assert "model.layers.0.self_attn" in bsfa.attention_modules(model)


def test_a_compiled_model_is_the_model(model, ids):
    expected = thresholds_for(model)
    compiled = torch.compile(model, backend="eager")
    assert list(bsfa.attention_modules(compiled)) == list(bsfa.attention_modules(model))
    assert bsfa.model_identity(compiled) == bsfa.model_identity(model)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert list(bsfa.attention_modules(compiled)) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    with bsfa.apply(compiled, expected, count=True):
        run(model, ids[:1])
        assert bsfa.skip_rate(compiled) > 0
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_casts_like_sdpa(model, ids, cached):
    """Queries and keys leave RoPE in float32, values are bfloat16: PyTorch's own attention casts them all."""

    def logits(implementation):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config) if cached else None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(ids[:1, :200], past_key_values=cache, use_cache=cached).logits

    expected = logits("sdpa")
    assert_close(logits("bsfa"), expected)
    with bsfa.apply(model, thresholds_for(model, gap=-30.0)):
        assert_close(logits("bsfa"), expected)


@pytest.mark.parametrize("cuts", [(333,), (100, 101, 108, 600), (640,)], ids=str)
def test_a_prompt_in_chunks_keeps_at_least_what_the_whole_prompt_keeps(model, cuts):
    """The first layer's queries are the same however the prompt comes: there the counts can be compared."""
    ids, mask = batch(LENGTH, (0, 0))
    bsfa.apply(model, thresholds_for(model), count=True)
    handler = bsfa.active(model.model.layers[0].self_attn)

    def dropped(pieces):
        handler.reset()
        cache = DynamicCache(config=model.config)
        for start, end in zip((0, *pieces), (*pieces, LENGTH), strict=True):
            chunk(model, ids, mask, start, end, cache)
        return (handler.counts.candidates - handler.counts.kept).sum().item()

    assert 0 < dropped(cuts) <= dropped(())


def test_speculative_decoding_gives_the_tokens_of_plain_decoding(model):
    assert isinstance(model, LlamaForCausalLM)
    pattern = batch(40, (0, 0))[0][:1]
    ids = torch.cat([pattern] * 8, 1)
    bsfa.apply(model, thresholds_for(model, 3.0), count=True)
    options = dict(max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    plain = model.generate(ids, **options)
    handler = bsfa.active(model.model.layers[0].self_attn)
    judged = handler.counts.candidates.sum().item()
    assisted = model.generate(ids, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(plain, assisted)
    assert handler.counts.candidates.sum().item() == 2 * judged  # both prefills, and no step after them
    assert any("fewer than 64 queries" in note.reason and note.expected for note in bsfa.notes(model))


MASKS = [
    (torch.ones(2, 1, 40, 40, dtype=torch.int32), "got torch.int32"),
    (torch.ones(2, 1, 40, 4, dtype=torch.int32), "got torch.int32"),
    (torch.zeros(2, 1, 40, 40, dtype=torch.int64), "got torch.int64"),
]


@pytest.mark.parametrize("mask, said", MASKS, ids=[str(list(mask.shape)) + said for mask, said in MASKS])
def test_masks_of_integers_are_refused(model, mask, said):
    model.set_attn_implementation("bsfa")
    with pytest.raises(ValueError, match=f"must be .* bool or floating-point mask, or None; {said}"):
        run(model, batch(40, (0, 0))[0], attention_mask=mask)


def test_nobody_computes_with_positions():
    from bsfa_kernels.integrations.masks import decode, mask_function

    mask = mask_function(2, 10, 10, attention_mask=torch.ones(2, 10, dtype=torch.bool).tril(8))
    for compute in (lambda: mask + 1, lambda: 1.0 * mask, lambda: mask[:, :, :, :4], lambda: torch.cat([mask, mask]),
                    lambda: mask.masked_fill(mask == 0, 1), lambda: mask.float()):  # fmt: skip
        with pytest.raises(ValueError, match="run it with 'eager' or 'sdpa'"):
            compute()
    for moved in (mask.to("cpu"), mask.clone(), mask.detach()):
        assert torch.equal(decode(moved).spans, decode(mask).spans)
    apart = mask_function(2, 10, 10, allow_is_causal_skip=False, dtype=torch.float32)
    assert torch.equal(apart[0, 0] == 0, torch.ones(10, 10).tril().bool())


KEYWORDS = [
    (dict(indices=torch.zeros(1)), "LlamaAttention selects keys by 'indices'"),
    (dict(block_indices=torch.zeros(1)), "LlamaAttention selects keys by 'block_indices'"),
    (dict(cu_seq_lens_q=torch.tensor([0, 40])), "LlamaAttention passes to attention 'cu_seq_lens_q'"),
    (dict(something_new=3), "LlamaAttention passes to attention 'something_new'"),
]


@pytest.mark.parametrize("keyword, said", KEYWORDS, ids=[next(iter(keyword)) for keyword, _ in KEYWORDS])
def test_a_keyword_that_is_not_known_is_refused(model, keyword, said):
    model.set_attn_implementation("bsfa")
    q = torch.randn(1, 4, 40, 64)
    with pytest.raises(ValueError, match=said):
        bsfa.attention(model.model.layers[0].self_attn, q, q, q, None, **keyword)
    bsfa.attention(model.model.layers[0].self_attn, q, q, q, None, **dict.fromkeys(keyword), position_ids=q)
