"""The timing of a large vision-language model's shape: what does not fit is refused before anything is made."""

import sys

import pytest
import torch

from bsfa_cli.errors import MachineError
from bsfa_cli.experiments import vision_timing
from bsfa_cli.models import random_vision

FREE = 23 << 30


def test_weights_that_memory_cannot_hold_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(random_vision, "free_memory", lambda device: FREE)
    monkeypatch.setattr(sys, "argv", ["vision_timing", "--out", str(tmp_path / "out.json"), "--device", "cpu"])
    said = r"its weights need 30.9 GiB in float32 and 23.0 GiB are free on cpu; fewer --layers or a --width of 4"
    with pytest.raises(MachineError, match=said):
        vision_timing.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("free", "layers", "width", "dtype"), [
    (FREE, None, 1, torch.bfloat16), (FREE, 2, 4, torch.float32), (None, None, 1, torch.float32),
])  # fmt: skip
def test_what_fits_and_what_cannot_be_known_is_let_pass(free, layers, width, dtype, monkeypatch):
    monkeypatch.setattr(random_vision, "free_memory", lambda device: free)
    random_vision._check_memory(random_vision.config(layers, width), dtype, torch.device("cpu"))
