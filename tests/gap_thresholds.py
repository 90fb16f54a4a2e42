"""A thresholds artifact with one gap value for all heads and positions a point."""

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.transformers import attention_modules
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

TILE = TileShape(32, 64)


def thresholds(loaded, gates, provenance=None, tile=TILE):
    """Thresholds with one point for each {name: gap value}."""
    values = torch.tensor(list(gates.values()))
    tensors = {
        path: values[:, None, None].expand(-1, module.query_heads, 1).contiguous()
        for path, module in attention_modules(loaded.model).items()
    }
    identity = {key: loaded.identity.get(key) for key in MODEL_KEYS}
    points = tuple(Point(name, "gap", "test", 0.0) for name in gates)
    return Thresholds(identity, tile, True, (0,), points, tensors, provenance or {})
