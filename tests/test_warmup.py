"""warmup: which lengths compile anew, and that a model's prefills have met all of them."""

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import hopper
from bsfa_kernels.integrations.modules import AttentionModule
from bsfa_kernels.integrations.warmup import chunks, lengths, warmup
from bsfa_kernels.split_kv import KEYS_OF_SPLIT, MOST_SPLITS, divide, shape_of
from test_lifecycle import thresholds_for
from tiny_models import build
from transformers import DynamicCache


def test_one_length_of_every_kind_of_section():
    model = build("llama", ("cpu", torch.bfloat16), max_position_embeddings=1 << 20)
    model.set_attn_implementation("bsfa")
    heads, head_dim = 2, 64
    found = lengths(model, 1 << 18)
    kinds = {
        n: hopper.section_kv_heads(*[torch.empty(1, heads, n, head_dim, dtype=torch.bfloat16, device="meta")] * 2, n)
        for n in (*found, *range(1000, 1 << 18, 1000))
    }
    assert found == [2048, 1 << 16, 1 << 18]
    assert {kinds[n] for n in found} == set(kinds.values()) == {1, 2}
    assert lengths(model, 1000) == [1000]


def module(group: int, head_dim: int = 128, v_head_dim: int | None = None) -> AttentionModule:
    return AttentionModule("layer", 0, 8 * group, 8, head_dim, 1.0, True, None, v_head_dim=v_head_dim)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("widths", [(64, None), (128, None), (192, 128), (256, None)])
def test_every_size_of_program_is_met_whatever_the_group(widths, dtype, wide):
    for group in (1, 2, 3, 4, 6, 8, 16, 64):
        made = chunks([module(group, *widths)], dtype, wide)
        head_dim, v_head_dim = widths[0], widths[1] or widths[0]
        met, served = (
            {shape_of(rows * group, dtype, head_dim, v_head_dim, wide) for rows in counts}
            for counts in (made, range(1, 300))
        )
        assert met == served and len(met) <= 3 and {48, 1} <= set(made)
    assert sum(chunks([module(group) for group in range(1, 65)], dtype, wide)) < 512 - 128 - 64


def test_a_model_without_grouped_heads_has_a_chunk_of_the_largest_programs():
    """48 queries are no more than 64 rows there; of many keys, chunks of 65 and more run with every tile kept."""
    assert chunks([module(1)], torch.bfloat16, wide=True) == [65, 48, 1]
    assert chunks([module(4)], torch.bfloat16, wide=True) == [48, 2, 1]  # one alone is the library's
    assert chunks([module(4)], torch.bfloat16, wide=False) == [48, 5, 2, 1]  # drafts of two and of five
    assert chunks([module(1), module(4)], torch.bfloat16, wide=False) == [65, 48, 5, 2, 1]


def test_few_splits_are_met_too():
    """Up to 8 parts and more are summed by kernels of two kinds; the shortest length has no more than 8."""
    shape = shape_of(1, torch.bfloat16, 128, 128, True)
    assert (
        2048 // KEYS_OF_SPLIT == 8 and max(divide(1, planes, 2048, shape, 132).splits for planes in range(1, 64)) <= 8
    )
    assert 8 < divide(1, 8, 8192, shape, 132).splits <= MOST_SPLITS


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_all_kinds_of_calls_are_made_and_counters_start_anew(name, padded, monkeypatch):
    model = build(name, max_position_embeddings=2048)
    bsfa.apply(model, thresholds_for(model, 3.0), count=True)
    monkeypatch.setattr(hopper, "section_limits", lambda *shape: {600, 5000})
    calls, said = [], []
    layer = model.model.layers[-1].self_attn
    attend = bsfa.active(layer).attend

    def watched(q, k, v, *, spans, **options):
        calls.append((q.shape[2], k.shape[2], spans is not None))
        return attend(q, k, v, spans=spans, **options)

    monkeypatch.setattr(bsfa.active(layer), "attend", watched)
    taken = warmup(model, 700, padded=padded, step=lambda *each: said.append(each))
    assert list(taken) == [600, 700] and list(taken.items()) == said and min(taken.values()) > 0
    last = 128 + 49
    plain = [(length - last, length - last, False) for length in (600, 700)]
    assert [call for call in calls if not call[2]] == plain
    behind = [(128, length - 49, True) for length in (600, 700)]  # what continues a prompt has spans
    assert set(behind) <= set(calls) and ((600 - last, 600 - last, True) in calls) == padded
    assert {note.route for note in bsfa.notes(model)} >= {"kept" if model.device.type == "cuda" else "fallback"}
    assert bsfa.skip_rate(model) is None


@pytest.mark.parametrize("longest", [511, 4096])
def test_a_length_that_cannot_be_is_refused(longest):
    with pytest.raises(
        ValueError, match=f"have 512 tokens or more, and this model has 2,048 positions; got {longest:,}"
    ):
        warmup(build("llama", max_position_embeddings=2048), longest)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_nothing_is_compiled_for_calls_that_come_after_it(kv_heads, monkeypatch):
    """With grouped heads and without: prefill, a chunk of 70, drafts, decode steps, on few keys and on many."""
    from triton.runtime.jit import JITFunction

    heads = dict(num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64, max_position_embeddings=16384)
    model = build("llama", ("cuda", torch.bfloat16), **heads)
    bsfa.apply(model, thresholds_for(model, 3.0))
    compiled, compile_ = [], JITFunction._do_compile

    def noted(function, *arguments, **options):
        compiled.append(function.__name__)
        return compile_(function, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", noted)
    warmup(model, 8192)
    assert compiled
    compiled.clear()
    for prompt in (1500, 6000):
        cache, ids = DynamicCache(config=model.config), torch.ones(1, prompt, dtype=torch.long, device="cuda")
        for rows in (prompt, 70, 5, 1, 33, 1):
            model(ids[:, :rows], past_key_values=cache)
    assert compiled == []
