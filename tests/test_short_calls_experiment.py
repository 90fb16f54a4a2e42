"""The experiment on calls of few queries: all are timed, gates where they judge, and what differs ends it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bsfa_cli.errors import UsageError
from bsfa_cli.experiments import short_calls

SMALL = "--skip 0.5 --heads 4 --kv-heads 2 --head-dim 64 --seconds 0.001".split()


@pytest.mark.usefixtures("one_round")
def test_short_calls_are_timed_beside_libraries(monkeypatch, tmp_path):
    out = tmp_path / "short.json"
    argv = ["short_calls", "--out", str(out), "--cells", "1/200,130/900x2", "--backends", "torch", *SMALL]
    monkeypatch.setattr(sys, "argv", argv)
    assert short_calls.main() == 0
    one, many = json.loads(out.read_text())["cells"]
    assert (one["rows"], one["keys"], one["batch"], one["skip"]) == (1, 200, 1, None)
    assert (many["rows"], many["keys"], many["batch"]) == (130, 900, 2) and abs(many["skip"] - 0.5) < 0.3
    for cell, gated in ((one, set()), (many, {"bsfa, gate"})):
        names = {row["name"] for row in cell["contenders"]} - {"FlashAttention-3"}
        assert names == {"bsfa, no gate", "bsfa, no gate, torch", "PyTorch"} | gated
        assert all(row["ms_median"] > 0 for row in cell["contenders"])


def test_outputs_that_differ_end_it(monkeypatch):
    monkeypatch.setattr(short_calls, "_library", lambda q, k, v: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="PyTorch differs from bsfa, no gate"):
        short_calls.cell(3, 100, 1, (2, 1, 16), 0.5, [], torch.device("cpu"), 0.001)


@pytest.mark.parametrize("cells", ["8192", "9/8", "0/4", "a/b", "1/2/3", "1/8x0", "1/8x", ""])
def test_cells_that_are_none_are_refused(monkeypatch, tmp_path, cells):
    monkeypatch.setattr(sys, "argv", ["short_calls", "--out", str(tmp_path / "o.json"), "--cells", cells])
    with pytest.raises(UsageError, match="QUERIES/KEYS"):
        short_calls.main()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--skip", "7", "--skip must be"), ("--seconds", "nan", "--seconds above 0"), ("--heads", "7", "multiple of"),
     ("--backends", "torch,fast", "--backends takes")],
)  # fmt: skip
def test_what_cannot_be_is_refused(option, value, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["short_calls", "--out", str(tmp_path / "x" / "a.json"), *SMALL, option, value])
    with pytest.raises(UsageError, match=words):
        short_calls.main()
    assert not any(tmp_path.iterdir())
