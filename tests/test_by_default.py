"""Whether a calibration takes gradients where nobody says. The model is on the CPU; options say it is on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bsfa_cli.calibration import by_default, divergence, run
from bsfa_cli.calibration.store import Run
from bsfa_cli.data.texts import Sample
from bsfa_cli.errors import InputError, MachineError
from bsfa_cli.models.load import load_model

OPTIONS = run.Options("builtin:mixed", 1, 512, 0, (64, 128), (1,), None, "cuda", "float32")
TEXT = Sample("text", tuple(range(1, 252)) * 2, "")


@pytest.fixture(scope="module")
def loaded(random_model):
    return load_model(random_model, device="cpu")


@pytest.fixture
def asked(loaded, tmp_path):
    def ask(options=OPTIONS, samples=(TEXT,), path=tmp_path / "run", **changes):
        modules, _ = run.chosen_modules(loaded.model, None)
        modules = {path: dataclasses.replace(module, **changes) for path, module in modules.items()}
        return by_default.takes_gradients(loaded, list(samples), modules, options, path)

    return ask


def test_a_gpu_takes_them_and_a_cpu_does_not(asked):
    assert asked() == (True, None)
    assert asked(dataclasses.replace(OPTIONS, device="cpu")) == (False, None)


def test_what_speaks_against_them_is_said(asked, monkeypatch):
    picture = dataclasses.replace(TEXT, extra={"pixel_values": torch.zeros(1)})
    for given, words in (
        (dict(options=dataclasses.replace(OPTIONS, scores="int8")), "these are int8"),
        (dict(options=dataclasses.replace(OPTIONS, dtype="float16")), "in float16 they overflow"),
        (dict(samples=[TEXT, picture]), "kept by modality"),
        (dict(plain=False), "softcap or attention sinks"),
    ):
        wanted, reason = asked(**given)
        assert not wanted and words in reason
    with monkeypatch.context() as patch:
        patch.setattr(run, "free_memory", lambda device: 1 << 20)
        assert "GiB are free" in asked()[1]


@pytest.mark.parametrize(
    "error, words",
    [
        (InputError("nothing reaches layer 3; give --no-gradients"), "nothing reaches layer 3"),
        (NotImplementedError("packed weights have\nno derivative"), "(NotImplementedError: packed weights have)"),
        (RuntimeError(""), "(RuntimeError: no message)"),
    ],
)
def test_they_are_tried_on_a_few_tiles(asked, monkeypatch, error, words):
    tried = []

    def backward(model, sample, curves, head):
        tried.append(len(sample.tokens))
        raise error

    monkeypatch.setattr(divergence, "backward", backward)
    wanted, reason = asked()
    assert not wanted and words in reason and "--no-gradients" not in reason and tried == [512]
    assert asked(path=None) == (True, None) and len(tried) == 1  # --dry-run


def test_no_gradient_reaches_a_model_without_one(asked, loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.base_model, "forward", torch.no_grad()(loaded.model.base_model.forward))
    assert "no gradient reaches" in asked()[1]


@pytest.mark.parametrize("gradients", [True, False])
def test_a_run_goes_on_as_it_began(asked, loaded, tmp_path, gradients):
    modules, _ = run.chosen_modules(loaded.model, None)
    options = dataclasses.replace(OPTIONS, gradients=gradients)
    Run.begin(tmp_path / "run", run.manifest(loaded, [TEXT], modules, options), lambda count: "")
    assert asked(dataclasses.replace(OPTIONS, device="cpu" if gradients else "cuda")) == (gradients, None)


def test_kept_weights_count_as_memory(asked, loaded):
    modules, _ = run.chosen_modules(loaded.model, None)
    plan = run.plan_of([TEXT], dataclasses.replace(OPTIONS, gradients=True))
    capped = {path: dataclasses.replace(module, plain=False) for path, module in modules.items()}
    more, less = (run.memory(loaded, each, plan)["backward pass"] for each in (capped, modules))
    heads = max(module.query_heads for module in modules.values())
    assert more - less == 5 * heads * plan.longest**2
    with pytest.raises(MachineError, match="lower --length"):
        run.check_memory({**run.memory(loaded, modules, plan), "backward pass": 1 << 60}, torch.device("cpu"))
