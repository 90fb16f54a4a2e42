"""`experiments.positions`: every setting asked the same questions, and what it stores."""

import json
import sys

import pytest

from bsfa_cli.data import frame_tasks
from bsfa_cli.errors import UsageError
from bsfa_cli.experiments import positions


def test_every_setting_answers_the_same_questions(tmp_path, monkeypatch):
    kept = {"default": positions.SETTINGS["default"]}
    monkeypatch.setattr(positions, "SETTINGS", kept | {"broken": {"rope_type": "default", "rope_theta": 10.0}})
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["positions", "--length", "1024", "--questions", "1", "--device", "cpu",
                                      "--out", str(out)])  # fmt: skip
    assert positions.main() == 0
    found = json.loads(out.read_text())
    assert found["answers"].keys() == {"default", "broken", positions.BUNDLED}
    right = {}
    for name, tasks in found["answers"].items():
        assert tasks.keys() == set(frame_tasks.NAMES) and all(len(marks) == 1 for marks in tasks.values())
        right[name] = sum(sum(marks) for marks in tasks.values())
    assert right["default"] >= 4 and right["broken"] <= 1  # the settings reach the model
    assert (found["length"], found["asked_at"], found["model"]) == (1024, 0.7, "bsfa/frames-llava")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--length", "10", "tasks about frames have"),
        ("--length", "131073", "reads up to 131072 tokens"),
        ("--questions", "0", "--questions must be 1 or more"),
        ("--questions", "999999999", "lower --questions or the length"),
        ("--device", "tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("--ask-at", "1.5", "at a share of the length above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused(option, value, words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["positions", "--device", "cpu", "--out", str(tmp_path / "out.json"), option, value]
    )
    with pytest.raises(UsageError, match=words):
        positions.main()
    assert not (tmp_path / "out.json").exists()
