"""`experiments.modality`: what is stored of runs on images, and the runs that it refuses."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_vlms

from bsfa_cli.calibration import run
from bsfa_cli.calibration.store import Run
from bsfa_cli.data.prompts import SHAPES, load_prompts
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.experiments import modality
from bsfa_cli.models.load import load_model
from bsfa_cli.presentation import research_modality

LENGTH = 512


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modality")
    tiny_vlms.save("llava", folder / "model")
    model = load_model(folder / "model", device="cpu")
    samples = load_prompts(SHAPES, model, samples=4, length=LENGTH)
    modules, _ = run.chosen_modules(model.model, None)
    options = run.Options(SHAPES, 4, LENGTH, 0, (64, 128), (1, 2), None, "cpu", "float32")
    run.calibrate(model, samples, modules, options, folder / "run")
    return Run.open(folder / "run")


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
    """Random weights have few gaps."""
    monkeypatch.setattr(modality, "GATE", "absolute")
    monkeypatch.setattr(modality, "TARGETS", (0.3, 0.5))


def test_both_kinds_of_thresholds_skip_alike_and_tiles_add_up(begun, tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["modality", str(begun.path), "--gpu", "none", "--out", str(out)])
    assert modality.main() == 0
    found = json.loads(out.read_text())
    (stored,) = found["runs"]
    assert (stored["length"], stored["samples"]) == (begun.plan.longest, {"fit": 3, "heldout": 1})
    assert found["gpu"] == "none"
    for point in stored["points"]:
        for role in ("fitted", "held_out"):
            for kind in ("shared", "by_modality"):
                reached = point[kind][role]
                pairs = [pair for keys in reached["tiles"].values() for pair in keys.values()]
                assert sum(pair["share"] for pair in pairs) == pytest.approx(1)
                assert sum(pair["share"] * pair["skip"] for pair in pairs) == pytest.approx(reached["skip"])
        assert point["by_modality"]["fitted"]["skip"] >= point["shared"]["fitted"]["skip"] - 1e-9
    lines = research_modality.block([found], ["found.json"]).splitlines()
    assert sum(line.startswith(f"| {begun.plan.longest} | 30%") for line in lines) == 2


def test_a_saving_is_of_mass_and_may_be_negative():
    point = {kind: {"held_out": {"dropped_mass": mass}} for kind, mass in (("shared", 0.10), ("by_modality", 0.11))}
    assert research_modality.saving(point) == pytest.approx(-0.1)


def test_other_runs_are_refused(begun):
    manifest = begun.manifest
    kept = [sample for sample in manifest["samples"] if sample["role"] == "fit"]
    with pytest.raises(UsageError, match="no held-out samples"):
        modality.result_of([replace(begun, manifest={**manifest, "samples": kept})])
    with pytest.raises(UsageError, match="a run without images"):
        modality.result_of([replace(begun, manifest={**manifest, "data": {**manifest["data"], "modalities": None}})])
    other = SimpleNamespace(path="other", manifest={**manifest, "model": {**manifest["model"], "id": "another"}})
    with pytest.raises(InputError, match="other is of another model or data"):
        modality.result_of([begun, other])
