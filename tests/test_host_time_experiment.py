"""The experiment on host time: what it times, and that it wants a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from bsfa_cli.errors import MachineError
from bsfa_cli.experiments import host_time
from bsfa_cli.timing.plan import Shape


def test_calls_are_timed_and_what_is_missing_is_named(monkeypatch):
    for name, value in (("LENGTH", 256), ("CALLS", 2), ("SAMPLES", 3)):
        monkeypatch.setattr(host_time, name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = host_time.measure(Shape("text", 4, 2, 64), torch.device("cpu"))
    ours = {row["name"]: row for row in found["contenders"] if row["name"].startswith("bsfa")}
    assert set(ours) == {f"bsfa, {kind}" for kind in (
        "no gate", "gap gate", "gap gate, counted", "block lists", "gap gate, int8 scores")}  # fmt: skip
    assert all(len(row["samples_us"]) == 3 and row["cpu_us_median"] > 0 for row in ours.values())
    narrow = host_time.calls(Shape("mla", 2, 2, 48, v_head_dim=32), torch.device("cpu"))
    for name in ("bsfa, gap gate, int8 scores", "bsfa, block lists"):
        assert narrow[name]().shape == (1, 2, 256, 32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["host_time", "--out", str(tmp_path / "out.json")])
    with pytest.raises(MachineError, match="there is none here"):
        host_time.main()
    assert not list(tmp_path.iterdir())
