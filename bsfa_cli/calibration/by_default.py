"""Whether a calibration takes gradients where nobody says: on a GPU, unless something speaks against it.

A run that is taken up again goes on as it began.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..data.texts import Sample
from ..errors import BsfaError, MachineError
from ..metrics.logits import Head
from ..models.load import LoadedModel
from . import divergence, run
from .curves import ModuleCurves
from .store import Run


def takes_gradients(
    loaded: LoadedModel, samples: list[Sample], modules: dict, options: run.Options, path: Path | None
) -> tuple[bool, str | None]:
    """(whether the run of `options` at `path` should have gradients, why not where that may surprise). Without a path
    nothing is tried out.
    """
    if path is not None and (path / "run.json").exists():
        return Run.open(path).plan.gradients, None
    if options.device == "cpu":  # several times as long, which nobody asked for
        return False, None
    reason = _reason_against(loaded, samples, modules, replace(options, gradients=True), trial=path is not None)
    return reason is None, reason


def _reason_against(loaded, samples, modules, options: run.Options, trial: bool) -> str | None:
    if options.scores != "exact":
        return f"they are of exact scores, and these are {options.scores}"
    if options.dtype == "float16":
        return "in float16 they overflow or vanish"
    if run.has_images(samples):
        return "statistics of samples with images are kept by modality, and gradients are not"
    if not all(module.plain for module in modules.values()):
        return "scores have a softcap or attention sinks, through which a backward pass takes much memory and time"
    plan, device = run.plan_of(samples, options), next(loaded.model.parameters()).device
    try:
        run.check_memory(run.memory(loaded, modules, plan), device)
    except MachineError as error:
        return str(error)
    if not trial:
        return None
    curves = {path: ModuleCurves(plan, module.query_heads, device) for path, module in modules.items()}
    try:
        with torch.no_grad():
            head = Head(loaded.model)
        divergence.backward(loaded.model, run.short_text(loaded.model, samples[0], plan.tile), curves, head)
    except BsfaError as error:
        return str(error).partition("; ")[0]  # what follows is advice to who asked for gradients
    except Exception as error:  # whatever a model's own code or kernels say that have no backward pass
        return f"a backward pass fails ({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]})"
    return None
