"""The experiment on architectures: which implementations it times in a model, and what it says of the others."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from torch.nn.functional import scaled_dot_product_attention

from bsfa_cli.errors import GateFailed, UsageError
from bsfa_cli.experiments import architectures
from bsfa_cli.timing import flash_attention
from bsfa_cli.timing.libraries import Library

SMALL = {"full": ("Llama", 2, 1, 32, None, {}), "windowed": ("Mistral", 2, 1, 32, 256, {})}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(options) runs two small models: {name: cell} as written, though the run may fail."""
    for name, value in (("KINDS", SMALL), ("TRANSFORMERS", ("sdpa",)), ("WIDTH", 64)):
        monkeypatch.setattr(architectures, name, value)
    out = tmp_path / "new" / "architectures.json"

    def call(*options) -> dict:
        small = f"--out {out} --length 640 --seconds 0.001"
        monkeypatch.setattr(sys, "argv", ["architectures", *small.split(), *options])
        assert architectures.main() == 0
        return {cell["name"]: cell for cell in json.loads(out.read_text())["cells"]}

    call.out = out
    return call


def installed(monkeypatch) -> list:
    """FlashAttention-3, as far as this experiment needs it; the shapes it is called with."""
    module, shapes = ModuleType("fa3_fwd_interface"), []

    def flash_attn_func(q, k, v, causal, softmax_scale):
        shapes.append(tuple(q.shape))
        laid = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*laid, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    module.flash_attn_func = flash_attn_func
    monkeypatch.setattr(flash_attention, "find", lambda name: Library(module, "fa3-fwd 0.0.3"))
    return shapes


@pytest.mark.usefixtures("one_round")
def test_every_implementation_that_serves_a_model_is_timed_in_it(monkeypatch, run):
    shapes = installed(monkeypatch)
    cells = run()
    rows = {name: {row["name"]: row for row in cell["contenders"]} for name, cell in cells.items()}
    assert set(rows["full"]) == {"sdpa", "FlashAttention-3", "bsfa, no thresholds", "bsfa"}
    assert set(rows["windowed"]) == {"sdpa", "bsfa, no thresholds", "bsfa"}
    assert rows["full"]["FlashAttention-3"]["library"] == "fa3-fwd 0.0.3" and set(shapes) == {(1, 640, 2, 32)}
    for row in (*rows["full"].values(), *rows["windowed"].values()):
        assert row["ms_median"] > 0 and (row["name"] == "bsfa" or row["error"] < 0.05)
    assert all(0.3 < row["bsfa"]["skip"] < 0.7 and row["bsfa"]["error"] > 0 for row in rows.values())
    ((absent, why),) = [(row["name"], row["reason"]) for row in cells["windowed"]["unavailable"]]
    assert absent == "FlashAttention-3" and "without padding, windows" in why


@pytest.mark.usefixtures("one_round")
def test_what_is_missing_is_said_and_a_run_without_skipping_fails(monkeypatch, run):
    monkeypatch.setattr(flash_attention, "find", lambda name: "not installed: this is how to get it")
    monkeypatch.setattr(architectures, "gap_that_skips", lambda model, forward, rate: (-1e9, 0.0))
    with pytest.raises(GateFailed, match="^full: nothing was skipped$"):
        run("--only", "full")
    (cell,) = json.loads(run.out.read_text())["cells"]
    assert cell["unavailable"] == [{"name": "FlashAttention-3", "reason": "not installed: this is how to get it"}]
    assert set(run("--only", "full", "--skip", "0")) == {"full"}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--only", "Mamba", "no architecture's name"), ("--skip", "1", "--skip from 0"),
     ("--length", "0", "--length must"), ("--seconds", "nan", "--seconds above 0")],
)  # fmt: skip
def test_what_cannot_be_is_refused(option, value, words, run):
    with pytest.raises(UsageError, match=words):
        run(option, value)
    assert not run.out.parent.exists()


def test_the_table_holds_what_the_models_are_named_after():
    kinds = {name.partition("-like")[0]: kind for name, kind in architectures.KINDS.items()}
    assert {"gpt-oss", "Gemma-2", "Mistral", "Gemma-3", "Qwen3.5", "DeepSeek"} <= kinds.keys()
    assert kinds["Qwen3.5"][1:5] == (16, 4, 256, None)
