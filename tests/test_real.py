"""The experiment on a real language model, at toy size: what it measures, stores, resumes and draws."""

import json
import math
import sys
from xml.etree import ElementTree

import pytest

from bsfa_cli.data import token_kinds
from bsfa_cli.errors import MachineError, UsageError
from bsfa_cli.experiments import loss, real, recipes, texts
from bsfa_cli.presentation import figures
from bsfa_cli.presentation.loss_table import loss_table
from bsfa_cli.presentation.real_plot import real_plot

pytestmark = pytest.mark.long

RECIPES = ("shared skip, gap", "shared by KL, gap", "top-k, absolute")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of this machine, of few characters."""
    folder = tmp_path_factory.mktemp("texts")
    for kind, documents in (("code", texts.code()), ("prose", iter(PROSE))):
        kept = list(documents)
        for side in texts.SIDES:
            lines = texts.lines(iter(kept), side, 3000, 4)
            assert len(lines) == 4 and all(len(line) == 3000 for line in lines)
            (folder / f"{kind}-{side}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    return folder


PROSE = [(f"topic {i}", f"Sentence {i} of many about number {i * i}. " * 90) for i in range(40)]


def experiment(monkeypatch, *arguments):
    monkeypatch.setattr(recipes, "MASSES", (0.1, 0.01))
    monkeypatch.setattr(real, "RATES", (0.2, 0.5))
    monkeypatch.setattr(sys, "argv", ["real", *map(str, arguments)])
    return real.main()


@pytest.fixture(scope="module")
def asked(random_model, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    arguments = ["--model", random_model, "--texts", folder, "--out", out, "--length", 768, "--samples", 2]
    arguments += ["--judge", 2, "--calibrations", "mixed,code", *(x for name in RECIPES for x in ("--recipe", name))]
    with pytest.MonkeyPatch.context() as patch:
        assert experiment(patch, *arguments) == 0
    return out, arguments


def test_the_whole_experiment_at_toy_size(asked):
    out, _ = asked
    result = json.loads((out / "real.json").read_text())
    assert result["evaluation"]["texts"] == 4 and list(result["calibrations"]) == ["code", "mixed"]
    assert result["floor"]["skip"] == 0 and abs(result["floor"]["kl"]) < 1e-6
    for recipe in RECIPES:
        points = result["calibrations"]["mixed"][recipe]["points"]
        assert points[0]["skip"] != points[1]["skip"] and all(0 < point["skip"] < 1 for point in points)
        for point in points:
            low, high = point["intervals"]["kl"]
            assert low <= point["kl"] <= high and point["kl_over_floor"]["value"] == pytest.approx(
                point["kl"], abs=1e-6
            )
            assert set(point["by_kind"]) == {"code", "prose"} and point["by_position"][-1]["to"] == 1024
    assert ElementTree.fromstring((out / "real.svg").read_text()).tag.endswith("svg")
    assert figures.svg(real_plot(result)).count("skipped</title>") >= 4


def test_what_is_done_is_not_measured_again(asked, monkeypatch):
    out, arguments = asked
    before = (out / "real.json").read_text()
    monkeypatch.setattr(real, "judge", lambda *_: pytest.fail("measured again"))
    assert experiment(monkeypatch, *arguments) == 0
    assert (out / "real.json").read_text() == before
    notebook = out / "work" / "real.jsonl"
    header, *lines = notebook.read_text().splitlines()
    notebook.write_text("\n".join([json.dumps({**json.loads(header), "length": 2}), *lines]) + "\n")
    with pytest.raises(UsageError, match="another measurement, its length differ"):
        experiment(monkeypatch, *arguments)


def test_the_furthest_skip_lies_between_the_points_around_the_limit():
    points = [{"skip": skip, "kl": kl} for skip, kl in ((0.5, 0.02), (0.3, 0.0), (0.9, 0.5))]
    assert real.furthest(points, "kl", 0.01) == pytest.approx(0.4)
    assert real.furthest(points, "kl", 1.0) == 0.9
    assert real.furthest(points, "kl", -1.0) is None


def test_no_document_is_on_both_sides():
    documents = [(f"name {i}", f"{i} " * 2000) for i in range(60)]
    sides = [texts.lines(iter(documents), side, 4000, 99) for side in texts.SIDES]
    assert all(sides) and not set(sides[0]) & set(sides[1])
    assert texts.lines(iter([*documents, *documents]), "judge", 4000, 99) == sides[1]


def test_texts_that_this_machine_lacks_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "prose", lambda: iter(()))
    monkeypatch.setattr(sys, "argv", ["texts", "--out", str(tmp_path), "--characters", "3000", "--texts", "1"])
    with pytest.raises(MachineError, match="has not 3,000 characters of prose"):
        texts.main()


def test_where_the_loss_comes_from_at_toy_size(random_model, folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", random_model, "--texts", folder, "--out", tmp_path, "--length", 1024, "--samples", 2]
    arguments += ["--judge", 1, "--skip", 0.4, "--by-head"]
    monkeypatch.setattr(sys, "argv", ["loss", *map(str, arguments)])
    assert loss.main() == 0
    result = json.loads((tmp_path / "real-loss-shared-skip-gap-40.json").read_text())
    whole, floor = result["whole"], result["floor"]
    assert whole["skip"] > 0.2 and floor["skip"] == 0 and whole["kl"] > floor["kl"]
    assert [each["layer"] for each in result["layers"]] == [0, 1, 2]
    for each in result["layers"]:
        assert 0 < each["only"]["skip"] < whole["skip"] and each["without"]["skip"] < whole["skip"]
    alone = sum(each["only"]["skip"] for each in result["layers"])
    assert alone == pytest.approx(whole["skip"], abs=0.05)  # a layer's input, hence its gaps, depend on those below
    groups = {name: group["skip"] for name, group in result["groups"].items()}
    assert groups["group 0"] + groups["group 1"] == pytest.approx(whole["skip"], abs=0.05) and len(groups) == 2 + 6
    for kinds in result["by_kind"].values():
        assert sum(each["positions"] for each in kinds) == 2 * 1023
        total = sum(each["positions"] * each["loss_dense"] for each in kinds) / (2 * 1023)
        assert math.exp(total) == pytest.approx(whole["perplexity_dense"], rel=1e-6)
    page = loss_table(result, "../profiles/results/real/toy.json")
    assert "| 2 |" in page and "pair seen farther back" in page
    assert f"{whole['kl_over_floor']['value']:.4f} in all" in page
    said = capsys.readouterr().err
    assert "layers alone come to" in said and "pair seen farther back" in said


def test_kinds_of_tokens():
    texts = {" a": "word start", "b": "continuation", "4": "number", " 4": "number", ".": "punctuation", "\n": "blank"}
    assert {text: token_kinds.spelling(text) for text in texts} == texts
    tokens = [1, 2, 3, 1, 2, *range(100, 700), 1, 2, 3]
    found = token_kinds.histories(tokens)
    assert found[:4] == [
        "token not seen", "token not seen", "token seen, pair not", "pair seen in the last 512"
    ]  # fmt: skip
    assert found[-3:] == ["token seen, pair not", "pair seen farther back", "pair seen farther back"]
    assert len(found) == len(tokens) - 1
