"""The model of a multiprocessor: what it must give whatever its numbers are, and what kernels/NOTES.md quotes of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bsfa_cli.experiments import pipeline_model
from bsfa_cli.experiments.pipeline_model import SHAPES, Chain, busy

NOTES = Path(__file__).parents[1] / "kernels" / "NOTES.md"
ALONE = Chain(
    1, 500, 400, 1, 8, 1, 1, 8, 1, parts=1, loop=10, maximum=20, vote=30, rescale=40, exponentials=50, rest=60,
    latency=0, bandwidth=1e9,
)  # fmt: skip


@pytest.fixture
def steady(monkeypatch):
    monkeypatch.setattr(pipeline_model, "JITTER", 0.0)


def test_a_consumer_alone_takes_the_sum_of_its_chain(steady):
    kept = 500 + 400 + 10 + 20 + 40 + 50 + 60
    assert busy(ALONE, None, 200, 1) == pytest.approx(900 / kept, rel=1e-2)
    assert busy(ALONE, 1.0, 200, 1) == pytest.approx(900 / (kept + 30), rel=1e-2)
    assert busy(ALONE, 0.0, 200, 1) == pytest.approx(500 / (500 + 10 + 20 + 30), rel=1e-2)


def test_loads_bound_it_and_products_of_two_share_the_pipe(steady):
    slow = replace(ALONE, bandwidth=1, k_bytes=5000, v_bytes=5000)
    assert busy(slow, 0.0, 200, 1) == pytest.approx(500 / 10_000, rel=2e-2)
    products = replace(ALONE, consumers=3, loop=0, maximum=0, vote=0, rescale=0, exponentials=0, rest=0)
    assert busy(products, None, 200, 1) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_comes_to_its_end(name):
    from bsfa_kernels import hopper

    chain = SHAPES[name]
    dims = {"d128": (128, 128), "d128-int8": (128, 128), "mla": (192, 128), "d192": (192, 192), "d256": (256, 256)}
    shape = (hopper.INT8_SHAPES if "int8" in name else hopper.SHAPES)[dims[name]]
    assert (chain.consumers, chain.slabs, chain.k_stages, chain.v_slabs, chain.v_stages) == (
        shape.consumers, shape.slabs, shape.k_stages, shape.v_parts, shape.v_stages,
    )  # fmt: skip
    assert 0.3 < busy(chain, 0.5, 60, 1) < 1


def test_notes_quote_it():
    before = replace(SHAPES["d256"], slab_by_slab=False, parts=2)
    found = [busy(before, keep) for keep in (None, 1, 0.5, 0.25, 0.1)]
    words = " ".join(f"{100 * each:.0f}" for each in found)
    assert f"it says {words} % of the tensor pipe for d=256 as it was" in " ".join(NOTES.read_text().split())
    assert busy(SHAPES["d256"], 0.1) > 1.05 * found[-1]  # what giving slabs back one by one is for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("d25", "NAME must be of"),
        ("--keep half", "--keep takes numbers"),
        ("--keep 0.5,2", "--keep takes numbers"),
        ("--set slots=3", "--set knows consumers"),
        ("--set k_stages=many", "--set k_stages takes a value like 3"),
        ("d256 --set k_stages=1", "K's slots must hold a tile"),
        ("d128-int8 --set k_stages=1", "two where it is awaited early"),
        ("d256 --set k_stages=1 --set v_stages=9", "K's slots must hold a tile"),
        ("d256 --set parts=2 --set parts=4", "--set gives parts more than once"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline_model", *arguments.split()])
    with pytest.raises(pipeline_model.UsageError, match=words):
        pipeline_model.main()
