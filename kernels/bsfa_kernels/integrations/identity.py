"""What tells one transformers model from another: what thresholds must agree with before they are used."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from .modules import WRAPPED, attention_modules, unwrapped

SIGNS_PER_WEIGHT = 256
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that hold a weight as it is
# Where the weights lie, how they are loaded, trained or sampled from: not what they compute.
VOLATILE = frozenset({
    "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype",
    "attn_implementation", "_attn_implementation", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range",
    "pretraining_tp",
})  # fmt: skip


def model_identity(model: nn.Module) -> dict[str, object]:
    """Keys as in `thresholds.MODEL_CHECKED`, values as JSON knows them; None where unknown.

    Heads, head dim and scale are those of the modules with a layer index (all modules where none has one): one value
    where all agree, else one for each module. `config` is what the configuration changes of its class's defaults.
    """
    model = unwrapped(model)
    modules = list(attention_modules(model).values())
    decoder = [module for module in modules if module.layer is not None] or modules
    return {
        "architecture": type(model).__name__,
        "layers": len(decoder),
        "query_heads": _shared(module.query_heads for module in decoder),
        "key_value_heads": _shared(module.kv_heads for module in decoder),
        "head_dim": _shared(module.head_dim for module in decoder),
        "scale": _shared(module.scale for module in decoder),
        **configuration(model.config),
        "weights": fingerprint(model),
    }


def configuration(config) -> dict[str, object]:
    """The part of `model_identity` that a transformers configuration tells without its model."""
    text = json.dumps(_plain(config.to_diff_dict()), sort_keys=True)
    return {
        "rope": _plain(getattr(config.get_text_config(), "rope_parameters", None)),
        "config": json.loads(text, parse_constant=str),  # NaN and infinities as text: JSON has none
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
    }


def fingerprint(model: nn.Module) -> str | None:
    """sha256 over the name, shape and the signs of SIGNS_PER_WEIGHT evenly spaced values of every parameter.

    A sign survives rounding to any floating-point dtype of 16 bits or more, so the dtype a checkpoint is loaded in does
    not matter. Weights trained apart differ in about half of the signs; a change that flips none of them is not seen.
    None where some weight is no plain tensor that holds its values: on the meta device, sharded, or quantised, as a
    parameter or as a buffer.
    """
    if any(map(_quantised, model.buffers())):
        return None
    digest, signs = hashlib.sha256(), []
    named = ((name.replace(f"{WRAPPED}.", ""), parameter) for name, parameter in model.named_parameters())
    for name, parameter in sorted(named, key=lambda pair: pair[0]):
        if type(parameter) is not nn.Parameter or parameter.is_meta or parameter.dtype not in PLAIN:
            return None
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        values = parameter.detach().reshape(-1)
        count = min(SIGNS_PER_WEIGHT, values.numel())
        index = torch.arange(count, device=values.device) * (values.numel() - 1) // max(count - 1, 1)
        signs.append(values[index].signbit())
    for sign in signs:
        digest.update(sign.cpu().numpy().tobytes())
    return digest.hexdigest()


def _quantised(buffer: torch.Tensor) -> bool:
    """Whether a buffer can only be a matrix of quantised weights. Masks are bool, positions and indices int64."""
    return buffer.dim() > 1 and buffer.dtype not in (*PLAIN, torch.bool, torch.int64)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shared(values):
    values = list(values)
    return values[0] if len(set(values)) == 1 else values
