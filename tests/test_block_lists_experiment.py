"""The experiment on block lists: both kernels get the same lists, are held to exact attention, and are timed."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bsfa_cli.errors import GateFailed, UsageError
from bsfa_cli.experiments import block_lists
from bsfa_cli.timing import flash_attention, flash_attention_lists
from bsfa_cli.timing.libraries import Library

SMALL = "--lengths 512 --left-out 0.5 --heads 2 --kv-heads 1 --head-dim 32 --seconds 0.001".split()
CPU = torch.device("cpu")


class Fake:
    """flash_attn.cute: dense attention, or attention over its lists, in float32; `forgets` a tile of those."""

    def __init__(self, forgets=False):
        self.calls, self.forgets = [], forgets

    def __call__(self, q, k, v, causal=False, mask_mod=None, pack_gqa=None, block_sparse_tensors=None):
        self.calls.append(SimpleNamespace(causal=causal, mask_mod=mask_mod, lists=block_sparse_tensors))
        query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        seen = query >= key
        assert causal or mask_mod(0, 0, 3, 3, None, None) and not mask_mod(0, 0, 3, 4, None, None)
        if (lists := block_sparse_tensors) is not None:
            assert pack_gqa is False and lists.block_size == (128, 128)
            whole = listed(lists.full_block_cnt - int(self.forgets), lists.full_block_idx)
            masked = listed(lists.mask_block_cnt, lists.mask_block_idx)
            seen = (whole | masked & seen) if mask_mod else (whole | masked) & seen
        laid = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*laid, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2), None


def listed(counts, indices) -> torch.Tensor:
    """bool [B, H, T, T]: who is in a list. Entries behind a list's count are nobody's."""
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    tiles = torch.zeros_like(valid).scatter(-1, indices.long(), valid)
    return tiles.repeat_interleave(128, -1).repeat_interleave(128, -2)


@pytest.fixture
def installed(monkeypatch):
    """installed(name, function) makes a library of that name."""
    found = {}
    module, sparsity, cutlass = (ModuleType(name) for name in ("flash_attn.cute", "block_sparsity", "cutlass"))
    sparsity.BlockSparseTensorsTorch = SimpleNamespace
    cutlass.cute = SimpleNamespace(jit=lambda function: function)
    for name, fake in {
        "flash_attn.cute": module,
        "flash_attn.cute.block_sparsity": sparsity,
        "cutlass": cutlass,
    }.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(flash_attention, "find", lambda name: found.get(name, flash_attention.HOW[name]))
    monkeypatch.setattr(flash_attention, "DTYPES", (torch.float32,))
    flash_attention_lists._causal_mask.cache_clear()

    def add(name, function):
        module.flash_attn_func = function
        found[name] = Library(module, f"{name} 0.0")

    yield add
    flash_attention_lists._causal_mask.cache_clear()


def run(monkeypatch, out, *options) -> dict:
    monkeypatch.setattr(sys, "argv", ["block_lists", "--out", str(out), *SMALL, *options])
    assert block_lists.main() == 0
    (cell,) = json.loads(out.read_text())["cells"]
    return cell


@pytest.mark.usefixtures("one_round")
def test_both_kernels_get_the_same_lists_and_are_timed(monkeypatch, tmp_path, installed):
    fake = Fake()
    installed(flash_attention.FA4, fake)
    cell = run(monkeypatch, tmp_path / "lists.json")
    ours = {row["sharing"]: row for row in cell["contenders"] if row["kind"] == "bsfa"}
    theirs = {
        (row["sharing"], row["form"]): row
        for row in cell["contenders"]
        if row["kind"] == "FlashAttention-4 block-sparse"
    }
    assert set(ours) == {128, 384} and set(theirs) == {(n, form) for n in ours for form in ("causal", "mask_mod")}
    for (sharing, _), row in theirs.items():
        assert row["density"] == ours[sharing]["density"] < 1 and row["library"] == "FlashAttention-4 0.0"
        assert row["largest_row_error"] < 1e-4 and row["largest_row_distance_from_bsfa"] < 1e-4
    assert [row["name"] for row in cell["contenders"] if row["kind"] == "dense"] == [
        "FlashAttention-4",
        "bsfa, no lists",
    ]
    assert [row["name"] for row in cell["unavailable"]] == ["FlashAttention-3"]
    for row in cell["ratios"]:
        best = min(theirs[row["sharing"], form]["ms_median"] for form in ("causal", "mask_mod"))
        assert row["ratio"] == pytest.approx(best / ours[row["sharing"]]["ms_median"])
    assert {call.causal for call in fake.calls if call.lists} == {True, False}


@pytest.mark.usefixtures("one_round")
def test_what_is_not_installed_is_said_with_how_to_get_it(monkeypatch, tmp_path, installed):
    cell = run(monkeypatch, tmp_path / "lists.json", "--sharing", "128")
    reasons = {row["name"]: row["reason"] for row in cell["unavailable"]}
    assert "pip install flash-attn-4" in reasons["FlashAttention-4 block-sparse"] and not cell["ratios"]
    assert [row["kind"] for row in cell["contenders"]] == ["dense", "bsfa"]


@pytest.mark.usefixtures("one_round")
def test_a_kernel_that_forgets_a_tile_is_not_timed(monkeypatch, tmp_path, installed):
    installed(flash_attention.FA4, Fake(forgets=True))
    cell = run(monkeypatch, tmp_path / "lists.json", "--sharing", "128", "--left-out", "0.1")
    assert sum("from exact attention over the listed tiles" in row["reason"] for row in cell["unavailable"]) == 2
    assert not cell["ratios"]
    monkeypatch.setattr(block_lists, "LARGEST_ERROR", -1.0)
    with pytest.raises(GateFailed, match="bsfa, 50% left out"):
        run(monkeypatch, tmp_path / "b.json", "--sharing", "128")
    assert not (tmp_path / "b.json").exists()


def test_lists_are_drawn_once_for_the_rows_that_share_them():
    shape = SimpleNamespace(heads=8)
    tiles = block_lists.drawn(shape, 128 * 64, 0.75, 384, CPU, 0)
    assert not tiles.triu(1).any() and tiles[..., 0].all() and tiles.diagonal(dim1=2, dim2=3).all()
    below = tiles[0, :, :63].unflatten(1, (21, 3))[:, 10:, :, 1:30]
    assert (below == below[:, :, :1]).all() and 0.2 < below.float().mean() < 0.3


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--lengths", "500", "multiples of 128"), ("--sharing", "64", "multiples of 128"), ("--left-out", "1", "below 1"),
     ("--left-out", "x", "shares"), ("--seconds", "nan", "above 0"), ("--kv-heads", "3", "multiple of kv_heads")],
)  # fmt: skip
def test_what_cannot_be_is_refused(option, value, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["block_lists", "--out", str(tmp_path / "x" / "a.json"), *SMALL, option, value])
    with pytest.raises(UsageError, match=words):
        block_lists.main()
    assert not any(tmp_path.iterdir())
