"""The training script at toy size: what is interrupted goes on as if it had not been, and the export loads."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file

from bsfa_cli.data import tasks
from bsfa_cli.presentation import figures
from bsfa_cli.training import curriculum, curves, model
from bsfa_cli.training.loop import Budget, Trainer

PHASES = (curriculum.Phase(0.5, 128, 2, 0.5), curriculum.Phase(1.0, 160, 2, 0.2))
SHAPE = {**model.TOY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


def trainer(out, chunks=2):
    return Trainer(model.build(SHAPE, 0), PHASES, Budget(1.0, chunks), seed=3, learning_rate=1e-3, out=out)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    first._chunk()
    first.save()
    second = trainer(tmp_path / "parts")
    second.load()
    second.run()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        one, other = (
            load_file(tmp_path / folder / "checkpoint" / f"{name}.safetensors") for folder in ("whole", "parts")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [json.loads(line)["kinds"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all("repeats" in kinds for kinds in losses)


def test_the_export_is_a_checkpoint_that_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    built = model.build(SHAPE, 0)
    model.export(built, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.embed_tokens.weight, built.model.embed_tokens.weight.bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The amber actor").input_ids[0] == tokenizer.bos_token_id
    exact, right = model.accuracy(loaded, "single", 128, documents=2)
    assert 0 <= exact <= right <= 1


@pytest.mark.parametrize("phase", curriculum.FULL, ids=lambda phase: f"{phase.length}-until-{phase.until}")
def test_every_kind_can_be_drawn_at_every_length(phase):
    rng = random.Random(0)
    for kind in tasks.NAMES:
        for _ in range(2 if phase.length > 4096 else 20):
            rows = curriculum._rows(kind, phase.length, 1, rng, torch.Generator().manual_seed(0))
            assert rows.tokens.shape == (1, phase.length)
            assert rows.weight.sum().item() == pytest.approx(1, abs=1e-4)


def test_repeats_are_supervised_where_the_token_can_be_known():
    tokens, answer = curriculum._repeats(256, 4, torch.Generator().manual_seed(0))
    for row, mask in zip(tokens, answer, strict=True):
        period = 256 - int(mask.sum())
        assert torch.equal(row[period:], row[:-period]) and not mask[:period].any()


def test_the_full_model_fits_the_package():
    parameters = sum(parameter.numel() for parameter in model.build(model.FULL, 0).parameters())
    assert parameters * 2 < 7.5e6


def test_curves_are_means_of_the_last_questions(tmp_path):
    entries = [
        {"seconds": second, "kinds": {"repeats": [1, 1, 1], "single": [0.5, 0.5, right]}}
        for second, right in ((1, 0.0), (2, 1.0), (11, 1.0))
    ]
    assert curves.curves([*entries, {"evaluated": 256}]) == {"single": [(5.0, 0.5), (15.0, 1.0)]}
    assert ElementTree.fromstring(figures.svg(curves.draw(entries))).tag.endswith("svg")


def test_the_stored_curves_are_in_step_with_their_log():
    for log in (Path(__file__).parents[1] / "profiles" / "results" / "training").glob("*.jsonl"):
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        assert log.with_suffix(".svg").read_text() == figures.svg(curves.draw(entries))


def test_an_exported_model_is_trained_further_in_the_second_half(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    from bsfa_cli.training import __main__ as command

    model.export(model.build(SHAPE, 0), tmp_path / "before")
    arguments = ["--from-model", tmp_path / "before", "--minutes", 1, "--chunks", 2, "--seed", 1, "--toy"]
    monkeypatch.setattr("sys.argv", ["training", *map(str, arguments), "--out", str(tmp_path)])
    monkeypatch.setattr(model, "accuracy", lambda *arguments, **options: (0.0, 0.0))
    command.main()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["progress"] for entry in entries if "kinds" in entry] == [0.5]
    before, after = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("before", "model"))
    assert after.config.hidden_size == SHAPE["hidden_size"]
    moved = (before.model.embed_tokens.weight - after.model.embed_tokens.weight).abs().max()
    assert 0 < moved < 0.05


def test_the_results_page_says_what_the_training_log_says():
    root = Path(__file__).parents[1]
    logs = sorted((root / "profiles" / "results" / "training").glob("*.jsonl"))
    entries = [json.loads(line) for line in logs[-1].read_text().splitlines()]
    section = (root / "docs" / "results.md").read_text().partition("## The model in the box")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    stated = {int(row[0].replace(",", "")): row[1:] for row in rows if row[0][:1].isdigit()}
    evaluated = {entry["evaluated"]: entry["exact_and_token_accuracy"] for entry in entries if "evaluated" in entry}
    assert stated.keys() == evaluated.keys()
    for length, found in evaluated.items():
        exact = {name: f"{value[0]:.2f}" for name, value in found.items()}
        chains = ", ".join(exact.pop(f"tracking-{hops}") for hops in range(1, 5))
        *first, records, words = exact.values()
        assert stated[length] == [*first, chains, records, words]


def test_the_results_page_says_what_the_recipes_reached():
    root = Path(__file__).parents[1]
    results = root / "profiles" / "results" / "recipes"
    found = [json.loads((results / f"{name}.nvidia-h100.json").read_text()) for name in ("other-tasks", "same-tasks")]
    section = (root / "docs" / "results.md").read_text().partition("How far each recipe")[2].partition("\n## ")[0]
    for result in found:
        questions, dense = result["evaluation"]["questions"], result["dense"]["exact"]
        assert re.search(rf"\({questions} questions[^)]*, dense {dense:.3f}\)", section)
    for name in found[0]["recipes"]:
        furthest = [result["recipes"][name]["furthest"] for result in found]
        cells = [part for best in furthest for part in (_stated(best) if best else ("none", "-"))]
        assert f"| {name} | {' | '.join(cells)} |" in section
    prose = " ".join(section.split())
    for name, recipe in (("top-k", "top-k, absolute"), ("even skip", "even skip, absolute")):
        _, after = sorted(found[0]["recipes"][recipe]["points"], key=lambda point: point["skip"])[:2]
        assert f"{name} at {after['skip'] * 100:.1f} %" in prose and f"keep {after['retention'] * 100:.2f} %" in prose


def _stated(best: dict) -> tuple[str, str]:
    return f"{best['skip']:.1%}", f"{best['exact']:.3f}"
