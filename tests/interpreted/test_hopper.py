"""The Hopper kernel's own lines on the CPU (played_gluon.py) against the reference: odd shapes, and kernels that are
wrong on purpose.
"""

from dataclasses import replace

import pytest
import torch
from bsfa_kernels import TileShape, hopper_kernel, hopper_pipeline
from kernel_cases import PLACES, Case, check, check_place, check_sliding
from paged_attention_cases import Paged, check_packed
from paged_attention_cases import check as check_pages
from played_gluon import played
from whole_tiles import DROP_ALL, Prompt, nan_scores_are_kept

BF16, FP16 = torch.bfloat16, torch.float16
TILE = TileShape(64, 128)
CASES = [
    Case(1, 2, 1, 200, 520, 64, TILE, gate="gap", q_offset=320, dtype=BF16),
    Case(1, 2, 1, 193, 577, 128, TILE, gate="both", q_offset=384, dtype=FP16),
    Case(3, 1, 1, 65, 330, 40, TILE, gate="gap", padded=True, keep_sink=False, dtype=BF16),
    Case(1, 2, 2, 127, 390, 96, TILE, causal=False, gate="absolute", dtype=BF16),
    Case(1, 1, 1, 140, 450, 256, TILE, gate="gap", q_offset=310, dtype=BF16),
    Case(1, 1, 1, 130, 450, 192, TILE, gate="", q_offset=310, dtype=BF16, v_head_dim=128),
    Case(1, 2, 1, 200, 520, 64, TILE, gate="gap", q_offset=320, dtype=BF16, blocks="shuffled"),
    Case(2, 1, 1, 100, 300, 128, TILE, causal=False, gate="both", dtype=FP16, blocks="shuffled"),
    Case(1, 2, 1, 150, 600, 64, TILE, gate="gap", q_offset=450, window=200, sinks=True, dtype=BF16),
    Case(3, 1, 1, 70, 200, 64, TILE, gate="absolute", padded=True, window=90, softcap=2.0, dtype=BF16),
]
INT8 = [CASES[1], CASES[6], CASES[8]]
AT_ONCE = pytest.mark.parametrize("late", [False], ids=["at once"], indirect=True)


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request):
    return request.param


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, late):
    with played(monkeypatch, late):
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_scores(case):
    skipped = check(case, "hopper")
    assert skipped > 0 or not case.gate or case.softcap


@AT_ONCE
@pytest.mark.parametrize("case", INT8, ids=str)
def test_int8_scores(case):
    # Triton's interpreter, which the preparation runs in, has no products of bfloat16.
    assert check(replace(case, dtype=FP16), "hopper", scores="int8") > 0


def test_pages_and_packed_sequences():
    shape = dict(heads=2, kv_heads=1, head_dim=64, tile=TILE, page=128, dtype=BF16)
    assert check_pages(Paged((130,), (500,), **shape), "hopper") > 0
    check_packed(Paged((70, 1, 130), (200, 140, 400), **shape), "hopper")


def wrong_phase(i, c, pieces, stages):
    piece = i * pieces + c
    return piece % stages, 1 - piece // stages & 1


# (module, name, what stands there, case, whether what TMA brings lands late)
WRONG = {
    "masks nothing": (hopper_kernel, "hide", lambda s, *_: s, 0, False),
    "drops a tile that some row wants": (hopper_kernel, "anyone", lambda flags, _: bool(flags.all()), 0, False),
    "judges rows that are no whole tile": (hopper_kernel, "held_whole", lambda *_: True, 2, False),
    "writes no output": (hopper_kernel, "store_output", lambda *_: None, 0, False),
    "waits for the other phase": (hopper_pipeline, "slot_of", wrong_phase, 0, False),
    "waits for nothing": (hopper_kernel, "wait_for", lambda *_: None, 0, True),
    "fills slots that are read": (hopper_pipeline, "wait_returned", lambda *_: None, 0, False),
    "keeps its slots": (hopper_kernel, "give_back_v", lambda *_: None, 0, False),
    "streams backwards": (hopper_pipeline, "stream_tile", lambda i, stream, _: i, 0, False),
}


@pytest.mark.parametrize(("name", "late"), [(name, wrong[4]) for name, wrong in WRONG.items()], indirect=["late"])
def test_a_kernel_that_is_wrong_fails(name, monkeypatch):
    module, attribute, wrong, case, _ = WRONG[name]
    monkeypatch.setattr("played_program.PATIENCE", 1)
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        check(CASES[case], "hopper")


@AT_ONCE
@pytest.mark.parametrize("scores", ["exact", "int8"])
def test_a_chunk_behind_a_sliding_cache(scores):
    check_sliding("hopper", TILE, 66, 193, dtype=FP16, scores=scores)


@AT_ONCE
@pytest.mark.parametrize("place", PLACES)
def test_the_output_goes_to_any_place(place):
    check_place(CASES[1], "hopper", place)


@AT_ONCE
def test_nan_scores_are_kept():
    nan_scores_are_kept(Prompt("hopper", TILE, dtype=BF16, length=600), DROP_ALL)
