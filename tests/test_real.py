"""The experiment on a real language model, at toy size: what it measures, stores, resumes and draws."""

import json
import sys
from xml.etree import ElementTree

import pytest

from bsfa_cli.errors import MachineError, UsageError
from bsfa_cli.experiments import real, recipes, texts
from bsfa_cli.presentation import figures
from bsfa_cli.presentation.real_plot import real_plot

RECIPES = ("shared skip, gap", "top-k, absolute")


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
    arguments = ["--model", random_model, "--texts", folder, "--out", out, "--length", 1024, "--samples", 2]
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
