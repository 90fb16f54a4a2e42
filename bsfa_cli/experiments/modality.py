"""python -m bsfa_cli.experiments.modality RUN... --gpu NAME --out FILE.json

What runs of `bsfa calibrate` on prompts with images say about modalities: how much is skipped by modality of the query
tile and of the key tile, and how much less softmax mass is dropped where every modality of the query tile has
thresholds of its own (`bsfa export --by-modality`). Both are asked for the same skip rate on the fitted samples, and
judged on the held-out ones. Reads curves only: no GPU, no model; nothing here is an answer to a question.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..calibration import points
from ..calibration.points import Request
from ..calibration.store import Run
from ..environment import describe
from ..errors import InputError, UsageError
from ..files import check_writable, write_json
from ..order import natural
from . import end

TARGETS, GATE, QUANTILE = (0.3, 0.5, 0.7, 0.8, 0.9), "gap", 0.99


def compared(run: Run, target: float) -> dict:
    """One skip rate: thresholds shared by all modalities, then by modality at what the shared ones skip of the fitted
    samples. Raises UsageError where the run cannot give it.
    """
    shared = _report(run, target, by_modality=False)
    apart = _report(run, shared.point.fitted.skip, by_modality=True)
    return {"target": target, "shared": _summary(shared), "by_modality": _summary(apart)}


def _report(run: Run, rate: float, by_modality: bool) -> points.Report:
    _, (report,), _ = points.export(run, [Request("target-skip", rate, GATE)], QUANTILE, by_modality=by_modality)
    return report


def _summary(report: points.Report) -> dict:
    reached = {"fitted": report.point.fitted, "held_out": report.point.held_out}
    return {
        role: {"skip": found.skip, "dropped_mass": found.dropped_mass, "tiles": report.modalities[role]}
        for role, found in reached.items()
    }


def described(run: Run) -> dict:
    """One run directory, its lengths and samples beside what `compared` finds at each target."""
    if not run.plan.modal:
        raise UsageError(f"{run.path} is a run without images: nothing in it is kept by modality")
    if not run.planned("heldout"):
        raise UsageError(f"{run.path} has no held-out samples: calibrate with more --samples")
    options = run.manifest["options"]
    return {
        "length": run.plan.longest, "samples": {role: len(run.planned(role)) for role in ("fit", "heldout")},
        "seed": options["seed"], "device": options["device"], "dtype": options["dtype"],
        "software": run.manifest["software"], "points": [compared(run, target) for target in TARGETS],
    }  # fmt: skip


def result_of(runs: list[Run]) -> dict:
    """What is stored of several runs of one model on one kind of data. Raises InputError where they are of several."""
    first = runs[0].manifest
    for run in runs[1:]:
        if run.manifest["model"] != first["model"] or run.manifest["data"]["spec"] != first["data"]["spec"]:
            raise InputError(f"{run.path} is of another model or data than {runs[0].path}")
    model = {key: first["model"][key] for key in ("id", "architecture", "layers", "weights")}
    return {
        "model": model, "data": first["data"]["spec"], "gate": GATE, "tile": first["options"]["tile"],
        "runs": sorted((described(run) for run in runs), key=lambda each: each["length"]),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.modality", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of bsfa calibrate, on images")
    parser.add_argument("--gpu", required=True, help="what the runs were made on, which they do not say themselves")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    options = parser.parse_args()
    check_writable(options.out)
    runs = [Run.open(path) for path in sorted(options.runs, key=lambda path: natural(str(path)))]
    found = result_of(runs) | {"gpu": options.gpu, "environment": describe("cpu")}
    write_json(options.out, found)
    print(f"written: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end("modality", main)
