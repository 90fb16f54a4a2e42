"""The experiment on several GPUs: arguments that it cannot measure are sentences, not tracebacks."""

from __future__ import annotations

import sys

import pytest

from bsfa_cli.errors import UsageError
from bsfa_cli.experiments import several_gpus


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prefill", "--layers", "0"], "--layers must be at least 1, got 0"),
        (["prefill", "--length", "-5"], "--length must be at least 256"),
        (["prefill", "--rounds", "0"], "--rounds must be at least 1"),
        (["prefill", "--skip", "0.5,1.5"], "--skip takes rates between 0 and 1, got 1.5"),
        (["prefill", "--skip", "nan"], "--skip takes rates between 0 and 1, got nan"),
        (["calibrate", "--samples", "0"], "--samples must be at least 1"),
        (["calibrate", "--processes", "0"], "--processes takes numbers from 1 to the 8 samples, got 0"),
        (["calibrate", "--processes", "1,9"], "got 9"),
    ],
)
def test_counts_that_cannot_be_measured_are_refused(monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr(sys, "argv", ["several_gpus", *arguments, "--out", str(tmp_path / "out.json")])
    with pytest.raises(UsageError, match=words):
        several_gpus.main()
    assert not list(tmp_path.iterdir())


def test_words_where_numbers_belong_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["several_gpus", "prefill", "--skip", "foo", "--out", "x"])
    with pytest.raises(SystemExit):
        several_gpus.main()
    assert "argument --skip: invalid list of floats value: 'foo'" in capsys.readouterr().err
