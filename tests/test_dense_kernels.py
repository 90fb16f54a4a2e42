"""What tables and pages say of the dense kernels a result was measured against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_presentation import cell, row

from bsfa_cli import console
from bsfa_cli.presentation import compare_readme, profile_table, readme, report
from bsfa_cli.presentation.dense_kernels import without_flash_attention_3
from bsfa_cli.timing.plan import FA3

ROOT = Path(__file__).parent.parent
SENTENCE = f"{FA3}, often the fastest dense kernel on this GPU, was not timed"


@pytest.fixture
def result() -> dict:
    """Made-up numbers of a Hopper GPU; for layout only."""
    return {
        "kind": "bsfa profile", "format": 1, "complete": True, "profile": "made-up", "device": "cuda", "seed": 0,
        "environment": {"gpu": "Some GPU", "capability": "9.0"}, "ceiling": None,
        "cells": [cell(4096), cell(8192)], "prefill": [],
    }  # fmt: skip


def add_flash_attention_3(part: dict) -> None:
    part["contenders"].insert(1, row(FA3, "dense", ms=1.5) | {"library": "fa3-fwd 0.0.3"})
    part["fastest_dense"] = FA3


def test_a_hopper_result_without_flash_attention_3_says_so_in_its_head(result):
    head = f"{SENTENCE}: speedups are over the fastest that was."
    assert without_flash_attention_3(result) == head
    assert head in readme.block(result, "a.json", Path("a.svg")).partition("**text")[0]
    assert head in report.page([(Path("a.json"), result)]).partition("<svg")[0]
    add_flash_attention_3(result["cells"][0])
    assert "was not timed in 1 of 2 measurements" in without_flash_attention_3(result)
    add_flash_attention_3(result["cells"][1])
    assert without_flash_attention_3(result) == "" and FA3 in readme.block(result, "a.json", Path("a.svg"))


@pytest.mark.parametrize("capability", ["8.0", "10.0", None])
def test_other_machines_owe_no_such_sentence(result, capability):
    result["environment"]["capability"] = capability
    assert without_flash_attention_3(result) == ""


def test_stored_results_say_it_from_what_they_hold():
    for path in sorted((ROOT / "profiles" / "results").glob("*.json")):
        stored = json.loads(path.read_text())
        block = readme.block if stored["kind"] == "bsfa profile" else compare_readme.block
        parts = stored["cells"] + stored.get("prefill", [])
        held = FA3 in json.dumps([part.get("contenders", part.get("dense")) for part in parts])
        assert (SENTENCE in block(stored, path.name, Path("x.svg"))) != held


def test_tables_name_versions_and_rivals_with_their_error(result, capsys):
    measured = result["cells"][0]
    add_flash_attention_3(measured)
    fp8 = row("FlashAttention-3 FP8", "dense, approximate", ms=1.2) | {"library": "fa3-fwd 0.0.3", "error": 0.037}
    rival = row("skip-softmax, 50 % skipped", "skip-softmax", 0.5, 0.9, ms=2.5)
    rival |= {"skip": 0.53, "skip_from": "computed from all query tiles", "error": 0.2, "library": "flashinfer 0.7.2"}
    measured["contenders"] += [fp8, rival]
    console.console.cache_clear()
    profile_table.show_cell(measured, details=True)
    shown = capsys.readouterr().err
    console.console.cache_clear()
    lines = {line.strip().partition("  ")[0]: line for line in shown.splitlines()}
    assert lines["FlashAttention-3 FP8 (fa3-fwd 0.0.3)"].endswith("3.7e-02")
    assert "53.0% computed" in lines["skip-softmax, 50 % skipped (flashinfer 0.7.2)"]
    assert "fastest dense: FlashAttention-3 (fa3-fwd 0.0.3)\n" in shown
    text = readme.block(result, "a.json", Path("a.svg"))
    assert "| 4,096 | FlashAttention-3 (fa3-fwd 0.0.3), 1.500 ms, 512 TFLOP/s | 0.98x (bound 1.00x) |" in text
    assert "- 4,096 tokens, FlashAttention-3 FP8 (fa3-fwd 0.0.3): 1.200 ms, output error 3.7%" in text
    assert "(flashinfer 0.7.2): 2.500 ms, 53% skipped (computed from all query tiles), output error 20.0%" in text


def test_a_cell_without_flash_attention_3_says_so_beside_the_fastest(result, capsys):
    measured = result["cells"][0]
    measured["unavailable"].append({"name": FA3, "reason": "not installed: `pip install fa3-fwd` brings it"})
    console.console.cache_clear()
    profile_table.show_cell(measured)
    shown = capsys.readouterr().err
    console.console.cache_clear()
    assert "fastest dense: cuDNN (FlashAttention-3 was not timed)\n" in shown
    assert "not timed: FlashAttention-3 (not installed: `pip install fa3-fwd` brings it)" in " ".join(shown.split())
