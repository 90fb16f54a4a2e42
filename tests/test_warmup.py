"""warmup: which lengths compile anew, and that a model's prefills have met all of them."""

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import hopper
from bsfa_kernels.integrations.warmup import lengths, warmup
from test_lifecycle import thresholds_for
from tiny_models import build


def test_one_length_of_every_kind_of_section():
    model = build("llama", ("cpu", torch.bfloat16), max_position_embeddings=1 << 20)
    model.set_attn_implementation("bsfa")
    heads, head_dim = 2, 64
    found = lengths(model, 1 << 18)
    kinds = {
        n: hopper.section_kv_heads(*[torch.empty(1, heads, n, head_dim, dtype=torch.bfloat16, device="meta")] * 2, n)
        for n in (*found, *range(1000, 1 << 18, 1000))
    }
    assert found == [1 << 16, 1 << 18]
    assert {kinds[n] for n in found} == set(kinds.values()) == {1, 2}
    assert lengths(model, 1000) == [1000]


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
    plain = [(600 - 49, 600 - 49, False), (700 - 49, 700 - 49, False)]
    assert [call for call in calls if not call[2]] == plain and any(call[2] for call in calls) == padded
    assert {note.route for note in bsfa.notes(model)} >= {"kept" if model.device.type == "cuda" else "fallback"}
    assert bsfa.skip_rate(model) is None


@pytest.mark.parametrize("longest", [511, 4096])
def test_a_length_that_cannot_be_is_refused(longest):
    with pytest.raises(
        ValueError, match=f"have 512 tokens or more, and this model has 2,048 positions; got {longest:,}"
    ):
        warmup(build("llama", max_position_embeddings=2048), longest)
