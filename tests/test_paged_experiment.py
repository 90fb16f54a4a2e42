"""The experiment on paged prefills: every part and the whole are timed, at the skip rate that was asked for."""

from __future__ import annotations

import json
import sys

import pytest

from bsfa_cli.errors import UsageError
from bsfa_cli.experiments import end, paged

SMALL = "--skip 0.5 --heads 4 --kv-heads 2 --head-dim 64 --seconds 0.001".split()


@pytest.mark.usefixtures("one_round")
def test_parts_and_whole_are_timed(monkeypatch, tmp_path):
    out = tmp_path / "paged.json"
    monkeypatch.setattr(sys, "argv", ["paged", "--out", str(out), "--cells", "640/640,200/900", *SMALL])
    assert paged.main() == 0
    found = json.loads(out.read_text())
    assert [(cell["rows"], cell["keys"]) for cell in found["cells"]] == [(640, 640), (200, 900)]
    for cell in found["cells"]:
        assert abs(cell["skip"] - 0.5) < 0.1
        names = {row["name"] for row in cell["contenders"]} - {"FlashAttention-3"}
        assert names >= {"gather", *(f"{x}{y}" for x in ("attention", "layer", "paged") for y in (", no gate", ""))}
        assert all(row["ms_median"] > 0 for row in cell["contenders"])


@pytest.mark.usefixtures("one_round")
def test_several_prefills_are_timed_one_by_one_and_packed(monkeypatch, tmp_path):
    out = tmp_path / "paged.json"
    monkeypatch.setattr(sys, "argv", ["paged", "--out", str(out), "--cells", "640/640+200/900", *SMALL])
    assert paged.main() == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert cell["sequences"] == [[640, 640], [200, 900]] and abs(cell["skip"] - 0.5) < 0.2
    names = {row["name"] for row in cell["contenders"]} - {"FlashAttention-3"}
    assert names == {f"{x}{y}" for x in ("one by one", "packed") for y in (", no gate", "")}


@pytest.mark.parametrize("cells", ["8192", "8/8+", "8/8+9/8", "9/8", "0/4", "a/b", "1/2/3", ""])
def test_cells_that_are_none_are_refused(monkeypatch, tmp_path, cells):
    monkeypatch.setattr(sys, "argv", ["paged", "--out", str(tmp_path / "o.json"), "--cells", cells])
    with pytest.raises(UsageError, match="QUERIES/KEYS"):
        paged.main()


def test_an_interrupted_experiment_ends_in_a_sentence(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        end("paged", interrupted)
    assert left.value.code == 130 and capsys.readouterr().err == "paged: interrupted\n"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--skip", "7", "--skip must be"), ("--seconds", "nan", "--seconds above 0"), ("--heads", "7", "multiple of")],
)
def test_what_cannot_be_is_refused(option, value, words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["paged", "--out", str(tmp_path / "x" / "a.json"), *SMALL, option, value])
    with pytest.raises(UsageError, match=words):
        paged.main()
    assert not any(tmp_path.iterdir())
