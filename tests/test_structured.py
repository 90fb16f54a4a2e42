"""The structured generator: every pattern is where the plan says, and heads differ."""

from __future__ import annotations

import pytest
import torch

from bsfa_cli import structured

SMALL = dict(heads=8, kv_heads=2, length=2048, head_dim=64)


def scores(data, causal: bool) -> torch.Tensor:
    group = data.q.shape[1] // data.k.shape[1]
    s = data.q.double() @ data.k.double().repeat_interleave(group, 1).mT * data.q.shape[-1] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return s


@pytest.fixture(scope="module")
def data():
    return structured.generate(**SMALL)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("causal", [True, False])
def test_the_needle_wins_by_its_margin_in_every_head(dtype, slack, causal):
    data = structured.generate(**SMALL, dtype=dtype, depth=0.6, margin=5.0)
    assert data.plan.needle == pytest.approx(0.6 * data.plan.question, abs=4)
    rows = scores(data, causal)[:, :, data.plan.question :]
    needle = rows[..., data.plan.needle].clone()
    rows[..., data.plan.needle] = -torch.inf
    assert (needle - rows.amax(-1)).min() >= 5.0 - slack


def test_before_the_question_nobody_looks_for_the_needle(data):
    rows = scores(data, causal=True)[:, :, data.plan.needle + 1 : data.plan.question].softmax(-1)
    assert rows[..., data.plan.needle].mean() < 2 / data.plan.needle


@pytest.mark.parametrize("pattern", structured.STRONGEST)
def test_every_pattern_shows_where_it_is_planted(pattern, monkeypatch):
    """With one pattern alone at full strength, its keys score far above the rest."""
    monkeypatch.setattr(structured, "STRONGEST", {name: 0.0 for name in structured.STRONGEST} | {pattern: 10.0})
    monkeypatch.setattr(structured, "_uniform", lambda generator: 1.0)
    monkeypatch.setattr(structured, "CONTENT", 0.0)
    data = structured.generate(heads=1, kv_heads=1, length=2048, head_dim=64)
    s, plan = scores(data, causal=False)[0, 0], data.plan
    text, visual = 1900, (plan.visual[0] + plan.visual[1]) // 2
    best, elsewhere = {
        "sink": (s[text, :4], s[text, 4:]),
        "vertical": (s[text].topk(4).values, s[text].quantile(0.9)),
        "local": (s[text, text - 1 : text + 2], s[text, : text - 1000].quantile(0.98)),
        "modality": (s[visual, plan.visual[0] : plan.visual[1]], s[visual, : plan.visual[0]]),
        "slash": (s[text, text - 1024], s[text].quantile(0.98)),
        "grid": (s[visual, visual - 4 * plan.frame : plan.visual[1] : plan.frame], s[visual, visual + plan.frame // 2]),
    }[pattern]
    assert best.min() > 9 and elsewhere.max() < 6


def test_heads_are_skewed(data):
    """Some heads find 0.9 of a row's mass in few keys, others need many."""
    weights = scores(data, causal=True)[0, :, 1024 : data.plan.question].softmax(-1)
    needed = (weights.sort(-1, descending=True).values.cumsum(-1) < 0.9).sum(-1).float().mean(-1)
    assert needed.max() > 4 * needed.min()


def test_a_seed_gives_the_same_again_and_another_seed_does_not(data):
    again, other = structured.generate(**SMALL), structured.generate(**SMALL, seed=1)
    for name in "qkv":
        assert torch.equal(getattr(again, name), getattr(data, name))
        assert not torch.equal(getattr(other, name), getattr(data, name))


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_odd_head_dims_batches_and_lengths(head_dim):
    data = structured.generate(heads=2, kv_heads=1, length=333, head_dim=head_dim, batch=2, dtype=torch.float16)
    assert data.q.shape == (2, 2, 333, head_dim) and data.k.shape == data.v.shape == (2, 1, 333, head_dim)
    assert all(x.isfinite().all() for x in data[:3]) and not torch.equal(data.k[0], data.k[1])


@pytest.mark.parametrize(
    "changed, words",
    [({"length": 63}, "64 tokens"), ({"head_dim": 8}, "head dim"), ({"heads": 3}, "multiple"), ({"depth": 2}, "depth")],
)
def test_bad_arguments(changed, words):
    with pytest.raises(ValueError, match=words):
        structured.generate(**SMALL | changed)


@pytest.mark.gpu
def test_128k_tokens_of_32_heads_take_seconds_on_a_gpu():
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    structured.generate(heads=2, kv_heads=1, length=4096, head_dim=128, device="cuda")
    start.record()
    data = structured.generate(
        heads=32, kv_heads=8, length=131072, head_dim=128, device="cuda", dtype=torch.bfloat16, seed=1
    )
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) < 5000 and data.q.isfinite().all()
    same = structured.generate(heads=2, kv_heads=1, length=4096, head_dim=128, device="cuda", seed=2).plan
    assert same == structured.generate(heads=2, kv_heads=1, length=4096, head_dim=128, seed=2).plan
