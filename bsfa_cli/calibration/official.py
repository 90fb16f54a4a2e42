"""The BSFA authors' threshold file (torch.save) as an artifact, without running what a pickle may carry.

Their tiles are 128 x 64 and their key tile 0 is not exempt. Each query tile has its own threshold, so every tile gets
a knot and no value changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

from ..errors import InputError

REQUIRED = ("thresholds", "k_values", "num_layers", "num_heads", "q_block_size", "k_block_size")
MAX_BYTES = 1 << 30
MODULE_PATH = "model.layers.{layer}.self_attn"


def read_official(
    path: Path, identity: Mapping[str, object] | None = None, modules: Mapping[int, tuple[str, int]] | None = None
) -> Thresholds:
    """The authors' file as an artifact with one point per k, named topk-K.

    `identity` (keys MODEL_KEYS) and `modules` {layer: (module path, query heads)} describe the model; without them
    paths are Llama's. Raises InputError for a file that cannot be used or is for another shape of model.
    """
    content = _load(path)
    values = content["thresholds"]
    ranks = _ranks(path, content["k_values"])
    layers, heads = (_whole(path, content, key) for key in ("num_layers", "num_heads"))
    tile = TileShape(*(_whole(path, content, key) for key in ("q_block_size", "k_block_size")))
    if not isinstance(values, torch.Tensor) or values.dim() != 4 or not values.is_floating_point():
        raise InputError(f"{path}: thresholds must be a float tensor [k, layers, heads, query tiles]")
    if tuple(values.shape[:3]) != (len(ranks), layers, heads) or not 1 <= values.shape[3] <= 1 << 16:
        raise InputError(
            f"{path}: thresholds have shape {list(values.shape)}, but the file says {len(ranks)} values of k, "
            f"{layers} layers and {heads} heads"
        )
    if modules is not None and (
        set(modules) != set(range(layers)) or any(count != heads for _, count in modules.values())
    ):
        counts = sorted({count for _, count in modules.values()})
        raise InputError(
            f"{path} is for {layers} layers of {heads} heads, and the model has {len(modules)} of "
            f"{', '.join(map(str, counts))}"
        )
    values = values.float()
    paths = [modules[i][0] if modules else MODULE_PATH.format(layer=i) for i in range(layers)]
    known = {"id": path.name, "layers": layers, "query_heads": heads}
    aggregation = content.get("aggregation_method")
    return Thresholds(
        model=dict.fromkeys(MODEL_KEYS) | known | dict(identity or {}),
        tile=tile,
        keep_sink=False,
        knots=tuple(i * tile.rows + tile.rows // 2 for i in range(values.shape[3])),
        points=tuple(Point(f"topk-{k}", "absolute", "official", k) for k in ranks),
        tensors={name: values[:, i].contiguous() for i, name in enumerate(paths)},
        provenance={"official": path.name, "aggregation": aggregation if isinstance(aggregation, str) else None},
    )


def _load(path: Path) -> Mapping[str, object]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is no file of thresholds")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever a hostile or damaged pickle provokes
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be loaded as plain tensors and numbers; it is damaged, or holds code, which is never run"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dictionary, got {type(content).__name__}")
    missing = [key for key in REQUIRED if key not in content]
    if missing:
        raise InputError(f"{path} is no BSFA thresholds file: it lacks {', '.join(missing)}")
    return content


def _ranks(path: Path, value) -> list[int]:
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    if (
        not isinstance(value, list | tuple)
        or not value
        or not all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in value)
    ):
        raise InputError(f"{path}: k_values must be a list of whole numbers")
    return list(value)


def _whole(path: Path, content: Mapping, key: str) -> int:
    value = content[key]
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 16:
        raise InputError(f"{path}: {key} must be a whole number from 1 on")
    return value
