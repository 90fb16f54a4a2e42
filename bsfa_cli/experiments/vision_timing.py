"""python -m bsfa_cli.experiments.vision_timing --out FILE.json

A prompt of 32k visual tokens through a model of Qwen2.5-VL-7B's shape: calibrate on generated images, export thresholds
by modality, time the prefill dense and at each operating point. The weights are random: timing only, nothing here says
anything about accuracy. Times are of the language model alone (images go through the vision tower once, before), for
every dense backend, and of the whole first token (TTFT), for the fastest of them. Writes a result of `bsfa profile`,
which `bsfa report` and `bsfa inspect` read, after each prefill: one that is interrupted says that it is not complete.

The defaults are for a GPU, with 15.4 GiB of weights; to try it out on a CPU: --width 4 --layers 2 --length 2048.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from ..calibration import points, run
from ..calibration.points import Request
from ..calibration.store import Run
from ..console import note
from ..data.prompts import SHAPES, load_prompts
from ..environment import resolve_device
from ..files import check_writable, write_json
from ..models.prompts import Prompt
from ..models.random_vision import random_qwen
from ..presentation import profile_table
from ..presentation.points_table import modality_lines
from ..timing import run as timing
from ..timing.plan import load
from ..timing.prefill import Prefill
from . import end

TILE, QUANTILE = (64, 128), 0.99


def calibrated(loaded, samples: int, length: int, folder: Path) -> Run:
    texts = load_prompts(SHAPES, loaded, samples=samples, length=length)
    visual = [int(Prompt.of(text, loaded.model).visual.sum()) for text in texts]
    note(f"{samples} samples of {length:,} tokens, of which {min(visual):,} to {max(visual):,} stand for images")
    modules, _ = run.chosen_modules(loaded.model, None)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    ranks = run.default_ranks(length, TILE[1])
    options = run.Options(SHAPES, samples, length, 0, TILE, ranks, None, loaded.model.device.type, dtype)
    run.calibrate(loaded, texts, modules, options, folder)
    return Run.open(folder)


def measured(options: argparse.Namespace) -> dict:
    device = resolve_device(options.device)
    loaded = random_qwen(device, layers=options.layers, width=options.width, side=options.side)
    note(f"{loaded.identity['id']}: {loaded.label}")
    result = timing.empty(load("tiny"), device) | {"profile": "vision-timing"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        begun = calibrated(loaded, options.samples, options.length, Path(folder) / "run")
        taken = time.perf_counter() - started
        requests = [Request("target-skip", rate, options.gate) for rate in options.skip]
        artifact, reports, left_out = points.export(begun, requests, QUANTILE, by_modality=True)
    result["calibration"] = {
        "samples": options.samples, "length": options.length, "seconds": taken, "data": SHAPES, "gate": options.gate,
        "modalities": artifact.provenance["modalities"], "left_out": left_out,
    }  # fmt: skip
    for report in reports:
        for line in modality_lines(report.modalities["fitted"]):
            note(f"{report.point.name}, {line}")
    fastest = None
    for language_only in (True, False):
        for report in reports:
            prefill = Prefill(loaded, artifact, report.point.name, device, "auto")
            entry = prefill.time(
                SHAPES, options.length, 0, options.seconds, language_only=language_only,
                dense=None if fastest is None else (fastest,),
            )  # fmt: skip
            profile_table.show_prefill(entry)
            result["prefill"].append(entry)
            dense = [row for row in entry["contenders"] if row["kind"] == "dense"]
            fastest = fastest or min(dense, key=lambda row: row["ms_median"])["name"]
            write_json(options.out, result)
    return result | {"complete": True}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.vision_timing", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    parser.add_argument("--length", type=int, default=40960, help="tokens of a prompt; four in five stand for images")
    parser.add_argument("--samples", type=int, default=2, help="to calibrate on; the second is held out")
    parser.add_argument("--skip", type=float, nargs="+", default=[0.5, 0.75], help="rates to time")
    parser.add_argument("--gate", choices=("gap", "absolute"), default="absolute", help="random weights have few gaps")
    parser.add_argument("--layers", type=int, help="text layers; 28 by default")
    parser.add_argument("--width", type=int, default=1, choices=(1, 2, 4), help="divide all widths, to try it out")
    parser.add_argument("--side", type=int, default=448, help="pixels of an image, (side / 28) ** 2 tokens")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender; at least 5 runs")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    check_writable(options.out)
    write_json(options.out, measured(options))
    print(f"written: {options.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end("vision_timing", main)
