"""A whole profile: the plan's cells one after the other, and the result that is stored."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from .. import environment
from . import sweep
from .compare import FORMAT
from .interleave import FLUSH_BYTES, Begin, unseen
from .plan import INT8, OURS, Plan

INT8_TOLERANCE = 0.1  # three times what outlier channels cost (docs/int8.md)


def empty(plan: Plan, device: torch.device) -> dict:
    """A result with everything but measurements."""
    cuda = device.type == "cuda"
    return {
        "kind": "bsfa profile",
        "format": FORMAT,
        "complete": False,
        "profile": plan.name,
        "device": str(device),
        "environment": environment.describe(device),
        "threads": None if cuda else torch.get_num_threads(),
        "seed": plan.seed,
        "l2_flush_bytes": FLUSH_BYTES if cuda else 0,
        "ceiling": None,
        "cells": [],
        "prefill": [],
    }


def sweep_cells(
    plan: Plan, device: torch.device, result: dict, seconds: float, after_cell: Callable[[dict], None],
    begin: Begin = unseen,
) -> None:  # fmt: skip
    """Fill in `result`'s ceiling and cells; `after_cell` sees every cell as soon as it is measured."""
    result["ceiling"] = sweep.ceiling(device, min(seconds, 1.0))
    for shape, length in plan.cells():
        cell = sweep.cell(plan, shape, length, device, seconds, begin)
        result["cells"].append(cell)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        after_cell(cell)


def failures(result: dict) -> list[str]:
    """Sentences for cells whose output is wrong; a speed means nothing there."""
    found = []
    for cell in result["cells"]:
        where = f"{cell['shape']['name']}, {cell['length']} tokens"
        rows = [row for row in cell["contenders"] if row["kind"] in OURS.values()]
        for row in rows:
            if not row["finite"]:
                found.append(f"{where}: '{row['name']}' gave non-finite output")
            error = row.get("error")  # None where no dense attention ran beside it
            if row["kind"] == OURS[INT8] and not row["skip_target"] and error is not None and error > INT8_TOLERANCE:
                found.append(
                    f"{where}: '{row['name']}' is {error:.1e} away from dense attention with nothing skipped "
                    f"(limit {INT8_TOLERANCE:.0e})"
                )
        error = cell["error_at_zero"]
        if error is not None and error > cell["error_tolerance"]:
            found.append(
                f"{where}: with nothing skipped the output is {error:.1e} away from dense attention "
                f"(limit {cell['error_tolerance']:.0e})"
            )
    return found
