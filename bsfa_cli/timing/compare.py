"""A new profile against a stored one: only where machine and software are the same, only cell by cell."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..files import read_result
from .plan import OURS

SAME = ("gpu", "driver", "capability", "cuda", "cudnn", "torch", "triton", "platform")
SETTINGS = ("dtype", "tile", "gate", "data")
FORMAT = 1
FORMATS = {"bsfa profile": FORMAT}


def read(path: Path) -> dict:
    """A stored profile. Raises InputError for anything that is not one."""
    return read_result(path, FORMATS)


def refuse_other_machine(stored: dict, environment: dict, device: str, path: Path) -> None:
    """Raises InputError, naming what differs, when times of the two would not mean the same."""
    pairs = [(name, stored["environment"].get(name), environment.get(name)) for name in SAME]
    pairs.append(("device", str(stored.get("device")).partition(":")[0], device.partition(":")[0]))
    different = [f"{name} {old} there, {new} here" for name, old, new in pairs if old != new]
    if different:
        raise InputError(f"cannot compare with {path}: {'; '.join(different)}")


def changes(stored: dict, result: dict) -> list[dict]:
    """Our kernel's rows that both hold: {cell, name, old_ms, new_ms, ratio}; ratio > 1 is faster than stored."""
    old = {_key(cell): {row["name"]: row for row in cell["contenders"]} for cell in stored["cells"]}
    found = []
    for cell in result["cells"]:
        for row in cell["contenders"]:
            before = old.get(_key(cell), {}).get(row["name"])
            if row["kind"] in OURS.values() and before:
                found.append(
                    {
                        "cell": f"{cell['shape']['name']} {cell['length']}, {cell['data'].partition(';')[0]}",
                        "name": row["name"],
                        "old_ms": before["ms_median"],
                        "new_ms": row["ms_median"],
                        "ratio": before["ms_median"] / row["ms_median"],
                    }
                )
    return found


def _key(cell: dict) -> tuple:
    return (json.dumps(cell["shape"], sort_keys=True), cell["length"], *(cell[key] for key in SETTINGS))
