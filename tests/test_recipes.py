"""The experiment on recipes: from calibration to a file and a plot, and what it calls the furthest point."""

import json
import sys
from xml.etree import ElementTree

import pytest

from bsfa_cli.experiments import recipes
from bsfa_cli.suites.questions import Plan
from bsfa_cli.suites.run import Answer, Score


def test_the_whole_experiment_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RATES", (0.2, 0.4))
    monkeypatch.setattr(recipes, "TOP_K", (2, 1))
    monkeypatch.setattr(recipes, "MASSES", (0.1, 0.01))
    arguments = ["--out", str(tmp_path), "--calibrate-length", "1024", "--samples", "3", "--lengths", "1024"]
    arguments += ["--tasks", "multi-key,tracking-1", "--questions", "3"]
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments])
    assert recipes.main() == 0
    result = json.loads((tmp_path / "recipes.json").read_text())
    assert len(result["recipes"]) == 6 and result["evaluation"]["questions"] == 4
    assert result["evaluation"]["mode"] == "teacher-forced"
    assert result["dense"]["exact"] == 1 and "synthetic" in result["label"]
    for recipe, entry in result["recipes"].items():
        assert len(entry["points"]) == 2 and all(point["questions"] == 4 for point in entry["points"])
        assert max(point["skip"] for point in entry["points"]) > 0.1, recipe
        if "gap" in recipe:
            assert entry["furthest"]["retention"] == 1
    assert ElementTree.fromstring((tmp_path / "recipes.svg").read_text()).tag.endswith("svg")


def test_the_furthest_point_is_the_sparsest_that_keeps_99_percent():
    question = Plan(("single",), (256,), 1).draw("single", 256, 0)

    def answers(right, kept):
        return [Answer(question, Score(i < right, 1.0), kept, 100) for i in range(200)]

    table = recipes.table({
        "dense": answers(200, 100), ("a", "mild"): answers(199, 60), ("a", "brave"): answers(198, 30),
        ("a", "reckless"): answers(150, 5),
    })  # fmt: skip
    assert table["a"]["furthest"]["name"] == "brave"
    assert table["a"]["furthest"]["skip"] == pytest.approx(0.7) and table["a"]["furthest"]["retention"] == 0.99
