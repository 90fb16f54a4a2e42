"""A whole comparison on tensors: the cells one after the other, and the result that is stored."""

from __future__ import annotations

import torch
from bsfa_kernels import TileShape

from .. import environment
from ..calibration.group import Group
from ..errors import InputError
from ..timing.interleave import Begin, unseen
from . import matching, methods
from .calibration import Calibration, Exported
from .measure import Bench


def empty(device: torch.device, tile: TileShape, seed: int) -> dict:
    """A result with everything but measurements."""
    return {
        "kind": matching.KIND,
        "format": matching.FORMAT,
        "complete": False,
        "device": str(device),
        "environment": environment.describe(device),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "tile": str(tile),
        "seed": seed,
        "cells": [],
    }


def cell(
    source,
    calibrated_on,
    names: str,
    tile: TileShape,
    device: torch.device,
    seconds: float,
    seed: int,
    begin: Begin = unseen,
    settings: methods.Settings = methods.DEFAULTS,
) -> dict:
    """All methods on the layers of `source` (see tensors.py), thresholds fitted to those of `calibrated_on` or left out
    where it is None.
    """
    calibration = None
    if calibrated_on is not None:
        ranks = tuple(sorted({*methods.TOP_K, *settings.values.get("bsfa_top_k", ())}))
        calibration = Calibration.on_tensors(calibrated_on.layers("calibrated"), tile, ranks, calibrated_on.label)
    bench = None
    for layer in source.layers("measured"):
        if bench is None:
            chosen, left_out = methods.chosen(names, calibration, layer.causal, settings)
            bench = Bench(chosen, tile, device, seconds, seed)
        bench.add(layer, begin)
    if bench is None:
        raise InputError(f"{source.label}: there is no layer to compare on")
    return {
        "level": "tensors",
        "label": source.label,
        "source": source.describe(),
        "calibrated_on": None if calibrated_on is None else f"{calibrated_on.label}, another sample",
        "length": source.length,
        "left_out": left_out,
    } | bench.result()


def model_cell(
    loaded, calibration: Calibration | Exported | None, names: str, tile: TileShape, device: torch.device, texts: list,
    seconds: float, seed: int, questions: list, begin: Begin = unseen,
    settings: methods.Settings = methods.DEFAULTS, minutes: float | None = None, group: Group | None = None,
) -> dict | None:  # fmt: skip
    """All methods inside a model (models.load.LoadedModel) on `texts` of equal length, and on `questions`, if any; no
    question is begun after `minutes` of asking. The processes of a group share the questions out; None in all but the
    first.
    """
    from ..calibration.run import chosen_modules
    from ..suites.run import mode
    from .model import ModelBench

    modules, passed_over = chosen_modules(loaded.model, None, plain=True)
    chosen, left_out = methods.chosen(names, calibration, True, settings)
    bench = ModelBench(loaded, modules, chosen, tile, device)
    found = bench.cell(texts, len(texts[0].tokens), seconds, seed, questions, begin, minutes, group)
    if found is None:
        return None
    label = f"{found.pop('label')}, {loaded.identity['id']}" + (f" ({loaded.label})" if loaded.label else "")
    place = asked_at(questions)
    if place is not None and place < 1:
        label += f", asked at {place:.0%} of the text"
    return found | {
        "label": label,
        "source": {"model": loaded.identity, "texts": [text.source for text in texts], "dense_modules": passed_over},
        "calibrated_on": None if calibration is None else calibration.source,
        "left_out": left_out,
        "asked": mode(questions[0]) if questions else None,
        "asked_at": place,
        "processes": 1 if group is None else group.size,
    }


def asked_at(questions: list) -> float | None:
    """The share of the prompts up to the answer's end, 1 where that is the end; None where nothing is asked."""
    if not questions:
        return None
    batch = getattr(questions[0], "batch", None)  # of a TokenQuestion
    return 1 - batch.tail / batch.tokens.shape[1] if batch else 1.0


def failures(result: dict) -> list[str]:
    """Sentences for rows whose output is not finite; their other numbers mean nothing."""
    return [
        f"{cell['length']} tokens, {row['method']} at {row['setting']:g}: the output is not finite"
        for cell in result["cells"]
        for row in cell["rows"]
        if not row["finite"]
    ]
