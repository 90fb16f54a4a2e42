"""bsfa compare inside a model: losses, times and answers of every method, in the same modules."""

from __future__ import annotations

import json

import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.transformers import attention_modules

from bsfa_cli.calibration.data import load_texts
from bsfa_cli.comparison import methods, model
from bsfa_cli.comparison import run as comparison
from bsfa_cli.intervals import wilson
from bsfa_cli.models.load import load_model

CPU, TILE = torch.device("cpu"), TileShape()


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(loaded):
    return load_texts("builtin:mixed", samples=1, length=640, tokenizer=loaded.tokenizer, seed=5)


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """(model directory, run directory of its calibration)."""
    folder = tmp_path_factory.mktemp("model")
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "run"


def test_rows_have_losses_times_and_answers(loaded, texts):
    asked = []

    def score(current):
        logits = current(input_ids=torch.tensor([texts[0].tokens])).logits
        asked.append(logits[0, -1].argmax())
        return {"last": (3, 4), "first": (int(asked[-1] == asked[0]), 1)}

    cell = comparison.model_cell(loaded, None, "sliding_window,xattention", TILE, CPU, texts, 0.001, 0, score)
    json.dumps(cell, allow_nan=False)
    assert cell["dense_accuracy"]["tasks"]["first"]["accuracy"] == 1 and cell["level"] == "model"
    by_name = {(row["method"], row["setting"]): row for row in cell["rows"]}
    exact = by_name["dense", 1.0]
    assert exact["agreement"]["top1"] == 1 and exact["recall"]["worst"] > 0.999 and exact["error"] < 1e-3
    sparse = by_name["xattention", 0.5]
    assert sparse["density"] < 1 and sparse["agreement"]["kl"] > exact["agreement"]["kl"] >= -1e-6
    assert len(sparse["layers"]) == 3 and sparse["accuracy"]["tasks"]["last"]["accuracy"] == 0.75
    for row in cell["rows"]:
        assert 0 < row["total_ms"] < row["ttft_ms"]
        assert (row["selection_ms"] > 0) == (row["method"] != "dense")
        assert len(row["samples_ms"]["attention"]) == len(row["samples_ms"]["ttft"]) >= 5
    assert [entry["name"] for entry in cell["dense"]] == ["PyTorch's CPU flash attention"]
    assert all(getattr(module, "bsfa_handler", None) is None for module in loaded.model.modules())


def test_a_method_that_cannot_run_says_why_and_the_others_go_on(loaded, texts):
    class Broken(methods.Mask):
        def choose(self, *arguments, **options):
            raise ValueError("blocks do not fit; at all")

    from bsfa_kernels.selection import SlidingWindow

    bench = model.ModelBench(
        loaded, attention_modules(loaded.model), [methods.Dense(), Broken(SlidingWindow)], TILE, CPU
    )
    cell = bench.cell(texts, 640, 0.001, 0, None, lambda: None)
    assert {row["method"] for row in cell["rows"]} == {"dense"} and cell["rows"][0]["accuracy"] is None
    assert {entry["reason"] for entry in cell["unavailable"]} == {"blocks do not fit"}


def test_the_command_uses_the_thresholds_of_a_run(run, one_sentence, saved, tmp_path):
    checkpoint, calibrated = saved
    small = ("--length", "512", "--device", "cpu")
    assert run("calibrate", checkpoint, "-o", calibrated, "--samples", "2", *small).code == 0
    options = ("--samples", "1", "--seconds", "0.001", *small)
    done = run("compare", checkpoint, "--run", calibrated, "--methods", "bsfa", *options, "--json")
    assert done.code == 0
    (cell,) = json.loads(done.out)["cells"]
    assert {row["method"] for row in cell["rows"]} == {"dense", "bsfa"} and cell["calibrated_on"] == "the run run"
    assert "random weights" in cell["label"] or "model" in cell["label"]
    (tmp_path / "result.json").write_text(done.out)
    assert run("report", tmp_path / "result.json", "-o", tmp_path / "report.html").code == 0
    one_sentence(
        run("compare", checkpoint, "--run", calibrated, "--tile", "128x64", *options), 4, "calibrated with tiles of"
    )
    manifest = json.loads((calibrated / "run.json").read_text())
    manifest["model"]["weights"] = "another"
    (calibrated / "run.json").write_text(json.dumps(manifest))
    one_sentence(run("compare", checkpoint, "--run", calibrated, *options), 4, "another model: its weights differs")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("--run", "somewhere"), 2, "--run belongs to a comparison inside a model"),
        (("model", "--captured", "a.safetensors"), 2, "either a model or --captured"),
        (("/nonexistent/model",), 4, "does not exist"),
        (("/nonexistent/model", "--run", "/nonexistent/run"), 4, "is no run directory"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(run, one_sentence, arguments, code, words):
    one_sentence(run("compare", *arguments, "--device", "cpu"), code, words)


@pytest.mark.parametrize(
    "right, total, expected",
    [(0, 0, (0, 1)), (0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (95, 100, (0.8883, 0.9785))],
)
def test_wilson_intervals(right, total, expected):
    assert wilson(right, total) == pytest.approx(expected, abs=1e-4)
