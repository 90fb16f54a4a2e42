"""The experiment on gates: both at equal skip rates in one run, and what one costs over the other."""

from __future__ import annotations

import json
import sys

import pytest

from bsfa_cli.experiments import gates


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("data", ("normal", "structured"))
def test_both_gates_are_timed_at_equal_skip(monkeypatch, tmp_path, data):
    out = tmp_path / "gates.json"
    small = "--lengths 768 --skip 0.5 --heads 4 --kv-heads 2 --head-dim 64 --seconds 0.001".split()
    monkeypatch.setattr(sys, "argv", ["gates", "--out", str(out), "--data", data, *small])
    assert gates.main() == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["fastest_dense"] in {row["name"] for row in cell["contenders"] if row["kind"] == "dense"}
    ours = {(row["gate"], row["skip_target"]): row for row in cell["contenders"] if row["kind"] == "bsfa"}
    assert set(ours) == {(gate, skip) for gate in ("gap", "absolute") for skip in (0.0, 0.5)}
    assert all(abs(row["skip"] - skip) < 0.1 for (_, skip), row in ours.items())
    for skip in (0.0, 0.5):
        gap, absolute = (ours[gate, skip]["ms_median"] for gate in ("gap", "absolute"))
        assert cell["cost"][f"{skip:g}"] == pytest.approx(gap / absolute - 1)
