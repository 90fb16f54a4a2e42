"""Names in the order people count in: layers 3, 4, 28, 29."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable


def natural(name: str) -> tuple:
    """A key to sort names by: numbers in them by value."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def ordered(data):
    """JSON values with the keys of every object in natural order."""
    if isinstance(data, dict):
        return {key: ordered(data[key]) for key in sorted(data, key=lambda key: natural(str(key)))}
    return [ordered(value) for value in data] if isinstance(data, list | tuple) else data


def shortened(paths: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(what all dotted names look like, {name: the part that tells it apart}): "model.layers.*.attn", {...: "0"}."""
    paths = list(paths)
    parts = [path.split(".") for path in paths]
    if len(parts) < 2:
        return "", {path: path for path in paths}
    shortest = min(map(len, parts))
    head = min(len(os.path.commonprefix(parts)), shortest - 1)
    tail = min(len(os.path.commonprefix([part[::-1] for part in parts])), shortest - 1 - head)
    names = {path: ".".join(part[head : len(part) - tail]) for path, part in zip(paths, parts, strict=True)}
    return ".".join([*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]), names
