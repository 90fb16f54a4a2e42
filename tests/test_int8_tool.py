"""int8 scores through the tool: every step says which scores it is about, and none passes one for the other."""

import json
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels.integrations import plan as planner
from bsfa_kernels.integrations import transformers as bsfa
from bsfa_kernels.thresholds import Thresholds

from bsfa_cli.calibration import curves
from bsfa_cli.calibration.store import Run
from bsfa_cli.comparison import methods
from bsfa_cli.models.load import load_model
from bsfa_cli.timing import plan, run, sweep
from bsfa_cli.verification.gates import Gates

pytestmark = pytest.mark.usefixtures("random_model")
CALIBRATE = ("--samples", 2, "--length", 512, "--top-k", "1,2")


@pytest.fixture
def begun(run, tmp_path):
    """{scores: run directory}."""
    folders = {scores: tmp_path / scores for scores in ("exact", "int8")}
    for scores, folder in folders.items():
        assert run("calibrate", "-o", folder, *CALIBRATE, "--scores", scores).code == 0
    return folders


def test_from_calibration_to_a_verdict(run, one_sentence, begun, tmp_path):
    errors = curves.int8_errors(Run.open(begun["int8"]).load("fit")[1])
    assert len(errors) == 3 and all(0 < error < 0.1 for heads in errors.values() for error in heads)
    moved = curves.int8_score_errors(Run.open(begun["int8"]).load("fit")[1])
    assert moved.keys() == errors.keys() and all(0 < each < 0.1 for heads in moved.values() for each in heads)
    assert "int8 scores, nothing skipped" in run("inspect", begun["int8"]).err
    assert curves.int8_errors(Run.open(begun["exact"]).load("fit")[1]) == {}
    assert "scores" not in json.loads((begun["exact"] / "run.json").read_text())["options"]
    one_sentence(run("calibrate", "-o", begun["exact"], *CALIBRATE, "--scores", "int8"), 2, "scores")

    middle = sorted(error for heads in errors.values() for error in heads)[6]
    file, asked = tmp_path / "t.safetensors", ("--target-skip", "0.3")
    exported = run("export", begun["int8"], "-o", file, *asked, "--max-int8-error", middle)
    assert exported.code == 0 and "5 of 12 heads stay exact" in exported.err and "int8 scores" in exported.err
    point = Thresholds.read(file).points[0]
    kept = {path: [h for h, error in enumerate(heads) if error > middle] for path, heads in errors.items()}
    assert point.scores == "int8" and point.exact_heads == {path: heads for path, heads in kept.items() if heads}
    assert "int8" in run("inspect", file).err

    verified = run("verify", "--thresholds", file, "--samples", 1, "--length", 400, "--max-kl-over-floor", 10, "--json")
    assert verified.code == 0 and "(int8 scores; 5 heads exact)" in verified.err
    found = json.loads(verified.out)["points"][0]
    assert (found["scores"], found["made_for"], found["exact_heads"]) == ("int8", "int8", 5)
    assert found["unskipped"]["kl"] > found["floor"]["kl"] and all(check["passed"] for check in found["kernel"])
    for module in found["modules"]:
        assert module["scores"] == "int8" and 0 <= module["scores_error"] < 0.05
        stays = {head // 2 for head in kept[module["path"]]}
        for head, measured in enumerate(module["heads"]):
            assert (measured["scores_error"] == 0) == (head // 2 in stays)

    exact = tmp_path / "exact.safetensors"
    assert run("export", begun["exact"], "-o", exact, *asked).code == 0
    other = run("verify", "--thresholds", exact, "--samples", 1, "--length", 400, "--max-kl-over-floor", 10, "--json",
                "--scores", "int8")  # fmt: skip
    assert "(int8 scores; thresholds made for exact ones)" in other.err
    assert json.loads(other.out)["points"][0]["made_for"] == "exact"


def test_what_does_not_fit_together_is_refused(run, one_sentence, begun, tmp_path):
    file, asked = tmp_path / "t.safetensors", ("--target-skip", "0.3")
    for arguments, words in (
        ((begun["exact"], "--scores", "int8", "--max-int8-error", "0.1"), "calibrate anew with --scores int8"),
        ((begun["exact"], "--max-int8-error", "0.1"), "give --scores int8"),
        ((begun["int8"], "--scores", "exact", "--max-int8-error", "0.1"), "belongs to int8 scores"),
        ((begun["int8"], "--max-int8-error", "-1"), "a number from 0 on"),
        ((begun["int8"], "--scores", "fp8"), "exact or int8"),
    ):
        one_sentence(run("export", *arguments, "-o", file, *asked), 2, words)
    assert not file.exists()
    one_sentence(run("calibrate", "-o", tmp_path / "x", "--scores", "int4"), 2, "--scores must be exact or int8")


def test_apply_runs_the_points_scores_or_others_and_notes_it(run, begun, tmp_path):
    file = tmp_path / "t.safetensors"
    assert run("export", begun["exact"], "-o", file, "--target-skip", "0.3").code == 0
    loaded = load_model(None, device="cpu")
    tokens = torch.randint(100, (1, 200), generator=torch.Generator().manual_seed(0))
    logits = {}
    for scores in (None, "exact", "int8"):
        with torch.no_grad(), bsfa.apply(loaded.model, file, scores=scores):
            logits[scores] = loaded.model(input_ids=tokens).logits
            reasons = {note.reason for note in bsfa.notes(loaded.model) if note.route == "gated"}
        assert reasons == ({"int8 scores, with thresholds for exact ones"} if scores == "int8" else set())
    assert torch.equal(logits[None], logits["exact"]) and not torch.equal(logits["exact"], logits["int8"])
    assert (logits["int8"] - logits["exact"]).norm() < 0.1 * logits["exact"].norm()
    with pytest.raises(ValueError, match="scores must be one of exact, int8, got 'fp8'"):
        bsfa.apply(loaded.model, file, scores="fp8")


def test_a_gpu_without_int8_scores_runs_exact_ones_and_says_so(monkeypatch):
    def fused(device, dtype, head_dim, v_head_dim, rows, keys, scores="exact"):
        return ("triton", "") if scores == "exact" else (None, "it has no int8 scores")

    monkeypatch.setattr(planner, "fused", fused)
    q = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 2, 64, 64))
    handler = SimpleNamespace(least_rows=64, fused_tile=sweep.TileShape(), knows_scoring=True, scores="int8")
    step = planner.plan(planner.Call(q, q, q, True, False, False, None, None, False), handler)
    assert step.route is planner.Route.GATED and step.expected
    assert step.reason == "exact scores instead of int8 ones: no fused kernel: it has no int8 scores"
    assert bsfa.SparseAttention.scores_of(handler, q, q) == "exact"
    verified = {"scores": "int8", "modules": [{"scores": "exact"}], "kept": 1, "candidates": 2, "skip": 0.5}
    verified |= {"logits": {"top1": 1, "perplexity_increase": 0, "kl_over_floor": {"value": 0}}, "finite": True}
    failures = Gates().failures(verified | {"dropped_mass": {"p99": 0}, "kernel": []})
    assert failures == ["1 modules ran exact scores: no kernel here has int8 ones for them"]
    answers = {"skip": 0.5, "instead": [step.reason]}
    assert Gates().task_failures(answers) == [step.reason]


def test_a_profile_names_both_scores():
    small = plan.Plan(
        "small", (plan.Shape("text", 2, 1, 32),), (320,), (0.5,), tile="64x64", scores=("exact", "int8"),
        baselines=("math",),
    )  # fmt: skip
    cell = sweep.cell(small, small.shapes[0], 320, torch.device("cpu"), seconds=0.01)
    rows = {row["name"]: row for row in cell["contenders"]}
    assert {"bsfa, 50 % skipped", "bsfa int8, 50 % skipped", "bsfa int8, 0 % skipped", sweep.PREPARATION} < set(rows)
    exact, rounded = rows["bsfa, 50 % skipped"], rows["bsfa int8, 50 % skipped"]
    assert (exact["kind"], rounded["kind"]) == ("bsfa", "bsfa, int8 scores")
    assert abs(exact["skip"] - rounded["skip"]) < 0.05 and rounded["bound"] > exact["bound"]
    assert 1e-4 < rows["bsfa int8, 0 % skipped"]["error"] < 0.05 and cell["error_at_zero"] < 1e-4
    assert rows[sweep.PREPARATION]["speedup"] is None
    result = {"cells": [cell]}
    assert run.failures(result) == []
    rows["bsfa int8, 0 % skipped"]["error"] = None  # as where no dense attention ran beside it
    assert run.failures(result) == []
    rows["bsfa int8, 0 % skipped"]["error"] = 0.26  # as of a kernel that left columns out
    assert run.failures(result) == [
        "text, 320 tokens: 'bsfa int8, 0 % skipped' is 2.6e-01 away from dense attention with nothing skipped "
        "(limit 1e-01)"
    ]


def test_compare_has_a_method_of_its_own_name():
    assert "bsfa_int8" in methods.everything()

    class Anything:
        skips, top_k, source = (0.5,), (8,), "a test"

        def gate(self, *_):
            return methods.Gate()

    found = methods.available(Anything())
    q = torch.randn(1, 2, 8, 8)
    options = {
        name: found[name].choose("a", q, q, q, scale=1.0, causal=True, tile=sweep.TileShape(), setting=0.5).options
        for name in ("bsfa", "bsfa_int8")
    }
    assert options == {"bsfa": {}, "bsfa_int8": {"scores": "int8"}}
