"""Where Q, K and V to compare on come from: the structured generator, or a file that `bsfa capture` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import structured
from ..errors import InputError, UsageError
from ..timing.plan import Shape

METADATA = "bsfa_capture"
FORMAT = 1
SAMPLES = {"measured": (0, 0.3), "calibrated": (1, 0.7)}  # sample and needle depth of structured tensors
LAYER_STRIDE = 7919


@dataclass(frozen=True)
class Layer:
    """One attention call. q [1, Hq, T, D]; k [1, Hkv, T, D]; v [1, Hkv, T, Dv]; `planted` says what a structured one
    holds.
    """

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool
    planted: structured.Plan | None = None


class StructuredSource:
    """`layers` layers of one shape and length; the calibrated sample has the same heads but another text and needle."""

    label = "synthetic, structured"

    def __init__(self, shape: Shape, length: int, layers: int, seed: int, device: torch.device, dtype: torch.dtype):
        self.shape, self.length, self.count, self.seed = shape, length, layers, seed
        self.device, self.dtype = device, dtype

    def layers(self, purpose: str) -> Iterator[Layer]:
        """`purpose`: "measured" or "calibrated". Raises UsageError for a shape that structured data cannot have."""
        sample, depth = SAMPLES[purpose]
        for index in range(self.count):
            try:
                data = structured.generate(
                    heads=self.shape.heads, kv_heads=self.shape.kv_heads, length=self.length,
                    head_dim=self.shape.head_dim, device=self.device, dtype=self.dtype,
                    seed=self.seed + index * LAYER_STRIDE, sample=sample, depth=depth,
                )  # fmt: skip
            except ValueError as error:
                raise UsageError(str(error)) from error
            scale = self.shape.head_dim**-0.5
            yield Layer(f"layer {index}", *data[:3], scale, self.shape.causal, data.plan)

    def describe(self) -> dict:
        return {"shape": self.shape.describe(), "length": self.length, "layers": self.count, "seed": self.seed}


class CapturedSource:
    """The layers in a file of `bsfa capture`, the first `length` tokens of them. Files are read, nothing in them runs.

    Raises InputError for a file that is none, UsageError for a length that it does not have, unless `or_all` then
    takes all of it.
    """

    def __init__(self, path: Path, device: torch.device, length: int | None = None, or_all: bool = False):
        self.path, self.device = path, device
        self.metadata = read_metadata(path)
        if or_all and length is not None:
            length = min(length, self.metadata["length"])
        if length is not None and length > self.metadata["length"]:
            raise UsageError(f"{path} holds {self.metadata['length']} tokens, {length} were asked for")
        self.length = length or self.metadata["length"]
        self.label = f"captured from {self.metadata['model']}"
        if self.metadata["label"]:
            self.label += f" ({self.metadata['label']})"

    def layers(self, purpose: str) -> Iterator[Layer]:
        from safetensors import SafetensorError, safe_open

        for entry in self.metadata["layers"]:
            try:
                with safe_open(self.path, "pt") as file:
                    q, k, v = (file.get_tensor(f"{entry['name']}/{part}") for part in "qkv")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{self.path}: cannot read {entry['name']}: {error}") from error
            fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and v.shape[3] <= k.shape[3]
            if not fits or q.shape[2] < self.length:
                raise InputError(f"{self.path}: {entry['name']} holds shapes that no attention can have")
            q, k, v = (x[:, :, : self.length].to(self.device).contiguous() for x in (q, k, v))
            yield Layer(entry["name"], q, k, v, entry["scale"], entry["causal"])

    def describe(self) -> dict:
        names = [entry["name"] for entry in self.metadata["layers"]]
        described = {key: self.metadata[key] for key in ("model", "data", "seed", "dtype")}
        return described | {"file": self.path.name, "length": self.length, "layers": len(names), "names": names}


@dataclass(frozen=True)
class Captured:
    """One layer's call, on the CPU, as `pack` takes it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool


def pack(layers: dict[str, Captured], facts: dict) -> bytes:
    """A capture as safetensors: tensors NAME/q, NAME/k, NAME/v, and JSON metadata under `bsfa_capture`.

    `facts`: model, label, data, seed.
    """
    from safetensors.torch import save

    first = next(iter(layers.values()))
    metadata = facts | {
        "format": FORMAT,
        "length": first.q.shape[2],
        "dtype": str(first.q.dtype).removeprefix("torch."),
        "layers": [{"name": name, "scale": each.scale, "causal": each.causal} for name, each in layers.items()],
    }
    tensors = {f"{name}/{part}": getattr(each, part).contiguous() for name, each in layers.items() for part in "qkv"}
    return save(tensors, {METADATA: json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict:
    """What a file of `bsfa capture` says of itself. Raises InputError for a file that is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
        found = json.loads(text) if text is not None else None
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"cannot read {path} as a capture: {error}") from error
    wanted = {"format", "model", "label", "data", "seed", "length", "dtype", "layers"}
    if not isinstance(found, dict) or set(found) != wanted:
        raise InputError(f"{path} is no file of `bsfa capture`")
    if found["format"] != FORMAT:
        raise InputError(f"{path} has capture format {found['format']}; this bsfa reads format {FORMAT}")
    sound = isinstance(found["length"], int) and isinstance(found["layers"], list) and found["layers"]
    for entry in found["layers"] if sound else ():
        sound = sound and isinstance(entry, dict) and set(entry) == {"name", "scale", "causal"}
        sound = sound and isinstance(entry["name"], str) and isinstance(entry["causal"], bool)
        sound = sound and isinstance(entry["scale"], int | float) and 0 < entry["scale"] < float("inf")
    if not sound:
        raise InputError(f"{path} names layers that no attention can have")
    return found
