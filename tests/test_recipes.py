"""The experiment on recipes: from calibration to a file and a plot, and what it calls the furthest point."""

import json
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from bsfa_cli.calibration.points import Request
from bsfa_cli.data.questions import Plan
from bsfa_cli.errors import InputError
from bsfa_cli.experiments import recipes
from bsfa_cli.suites.run import Answer, Score


def test_the_whole_experiment_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RATES", (0.2, 0.4))
    monkeypatch.setattr(recipes, "TOP_K", (2, 1))
    monkeypatch.setattr(recipes, "MASSES", (0.1, 0.01))
    arguments = ["--out", str(tmp_path), "--calibrate-length", "640", "--samples", "3", "--lengths", "640"]
    arguments += ["--tasks", "multi-key,tracking-1", "--questions", "2"]
    chosen = [name for name in recipes.RECIPES if name != "even skip, absolute" and not name.endswith("dense")]
    arguments += [part for name in chosen for part in ("--recipe", name)]
    monkeypatch.setattr(sys, "argv", ["recipes", *arguments])
    assert recipes.main() == 0
    result = json.loads((tmp_path / "recipes.json").read_text())
    assert set(result["recipes"]) == set(chosen) and result["evaluation"]["questions"] == 2
    assert result["evaluation"]["mode"] == "teacher-forced"
    assert result["dense"]["exact"] == 1 and "synthetic" in result["label"]
    for recipe, entry in result["recipes"].items():
        assert len(entry["points"]) == 2 and all(point["questions"] == 2 for point in entry["points"])
        assert max(point["skip"] for point in entry["points"]) > 0.1, recipe
        if "gap" in recipe:
            assert entry["furthest"]["retention"] == 1
    assert ElementTree.fromstring((tmp_path / "recipes.svg").read_text()).tag.endswith("svg")
    _join_halves(tmp_path, result, monkeypatch)


def _join_halves(folder, result, monkeypatch):
    """Two files with half of the recipes each become the whole again, and only if they were measured alike."""
    names = sorted(result["recipes"])
    files = [folder / "one.json", folder / "other.json"]
    for file, half in zip(files, (names[:3], names[3:]), strict=True):
        file.write_text(json.dumps({**result, "recipes": {name: result["recipes"][name] for name in half}}))
    monkeypatch.setattr(sys, "argv", ["recipes", "--out", str(folder), "--name", "whole", "--join", *map(str, files)])
    assert recipes.main() == 0
    assert json.loads((folder / "whole.json").read_text()) == result
    files[1].write_text(json.dumps({**result, "dtype": "float64"}))
    with pytest.raises(InputError, match=r"other\.json: not measured like .*one\.json, its dtype differ"):
        recipes.joined(files)
    files[1].write_text("[]")
    with pytest.raises(InputError, match=r"other\.json: expected a result"):
        recipes.joined(files)


def test_only_the_recipes_asked_for_become_contenders(monkeypatch):
    asked = {name: [Request("target-skip", 0.5, "gap")] for name in recipes.RECIPES}
    monkeypatch.setattr(recipes, "recipes", lambda run, rates: asked)
    monkeypatch.setattr(recipes, "attention_modules", lambda model: None)
    export = lambda run, requests, quantile: (SimpleNamespace(points=requests), None)  # noqa: E731
    monkeypatch.setattr(recipes.points, "export", export)
    monkeypatch.setattr(recipes.SparseAttention, "for_model", lambda *arguments, **options: "handlers")
    chosen = ("shared skip, gap", "top-k, absolute")
    found = recipes.contenders(SimpleNamespace(model=None), None, chosen, recipes.RATES)
    assert tuple(recipe for recipe, _ in found) == chosen


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
