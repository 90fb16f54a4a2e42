"""`experiments.gradients`: what it refuses before a model is loaded."""

import sys

import pytest

from bsfa_cli.errors import UsageError
from bsfa_cli.experiments import gradients


@pytest.mark.parametrize(("option", "value"), [("--samples", "0"), ("--length", "10")])
def test_what_cannot_be_is_refused(option, value, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gradients", "--out", str(tmp_path / "x" / "a.json"), option, value])
    with pytest.raises(UsageError, match="--samples must be 1 or more and --length 256 or more"):
        gradients.main()
    assert not any(tmp_path.iterdir())
