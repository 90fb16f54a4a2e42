"""What tells models apart: the configuration, key by key, and the weights, where they can be read."""

from __future__ import annotations

import json

import pytest
import torch
from bsfa_kernels.container import canonical_json
from bsfa_kernels.integrations.identity import fingerprint, model_identity
from bsfa_kernels.thresholds import model_difference
from tiny_models import build
from torch import nn


class Packed(nn.Module):
    """A linear layer whose weights are packed into integers, as GPTQ, AWQ and others keep them."""

    def __init__(self, dtype):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(16, 128, dtype=dtype))
        self.register_buffer("scales", torch.ones(1, 128, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_weights_quantised_into_buffers_have_no_fingerprint(dtype):
    model = build("llama")
    model.model.layers[1].mlp.up_proj = Packed(dtype)
    assert fingerprint(model) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8], ids=str)
def test_weights_quantised_as_parameters_have_no_fingerprint(dtype):
    model = build("llama")
    up = model.model.layers[1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().to(dtype), requires_grad=False)
    assert fingerprint(model) is None


def test_masks_positions_and_statistics_in_buffers_are_no_weights():
    model = build("llama")
    expected = fingerprint(model)
    model.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool))
    model.register_buffer("positions", torch.arange(8)[None])
    model.register_buffer("running_mean", torch.zeros(8, 8))
    assert expected is not None and fingerprint(model) == expected


def test_the_first_configuration_key_that_differs_is_named():
    ours, theirs = (model_identity(build("llama", rms_norm_eps=eps)) for eps in (1e-5, 1e-3))
    assert model_difference(ours, theirs) == "config.rms_norm_eps is 1e-05 there and 0.001 here"
    assert model_difference(ours, dict(ours)) is None
    unknown = {**ours, "config": None}
    assert model_difference(unknown, theirs).startswith(f"config_hash is {ours['config_hash'][:12]} there")
    assert ours["config"]["model_type"] == "llama" and "_attn_implementation" not in ours["config"]


def test_a_configuration_with_infinities_can_be_stored():
    model = build("llama")
    model.config.time_step_limit = [0.0, float("inf")]
    config = model_identity(model)["config"]
    assert config["time_step_limit"] == [0.0, "Infinity"]
    assert json.loads(canonical_json(config)) == config
