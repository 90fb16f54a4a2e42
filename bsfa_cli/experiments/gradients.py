"""What `bsfa calibrate --gradients` takes: seconds and memory of a sample, with and without it.

    python -m bsfa_cli.experiments.gradients --model real/smollm2 --texts FILE.jsonl --length 8192 --out FILE.json

Of every sample the forward pass (statistics of all tiles) and the backward pass (what dropping them costs) are timed by
themselves, behind a first sample that compiles and does not count. With --against-torch the costs come from the
specification too, on the same GPU: its seconds, and how far the sums of all heads and octaves differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bsfa_kernels import TileShape

from ..calibration import divergence, run
from ..calibration.curves import GRIDS, ModuleCurves, Plan
from ..console import note
from ..data.prompts import load_prompts
from ..environment import describe, resolve_device
from ..errors import GateFailed, UsageError
from ..files import check_writable, write_json
from ..metrics.logits import Head
from ..models.load import explain_memory, load_model
from . import end

FORMAT = 1


def timed(work: Callable[[], None], device: torch.device) -> tuple[float, int | None]:
    """(seconds, peak bytes on a GPU beside what was there before)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    with explain_memory("--length"):
        work()
    if device.type != "cuda":
        return time.perf_counter() - started, None
    torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before


def differing(found: dict[str, ModuleCurves], expected: dict[str, ModuleCurves]) -> dict[str, float]:
    """{gate: sum of differences of costs over the sum of costs}, over all modules, heads, octaves and thresholds."""
    sums = {}
    for gate in GRIDS:
        pairs = [tuple(each[path].tensors[f"{gate}.kl"].double() for each in (found, expected)) for path in found]
        total = sum(float(right.sum()) for _, right in pairs)
        if not total > 0:
            raise GateFailed(f"no tile costs anything with the {gate} gate: nothing was compared")
        sums[gate] = sum(float((left - right).abs().sum()) for left, right in pairs) / total
    return sums


def measure(options: argparse.Namespace) -> dict:
    device = resolve_device(options.device)
    loaded = load_model(options.model, device=device, dtype="auto")
    modules, _ = run.chosen_modules(loaded.model, None)
    texts = load_prompts(options.texts, loaded, samples=options.samples + 1, length=options.length, shortest=256)
    plan = Plan(TileShape(), max(len(text.tokens) for text in texts), (), gradients=True)
    with torch.no_grad():
        head = Head(loaded.model)

    def empty() -> dict[str, ModuleCurves]:
        return {path: ModuleCurves(plan, module.query_heads, device) for path, module in modules.items()}

    rows = []
    for text in texts:
        curves, passes = empty(), {}
        passes["forward"] = timed(lambda t=text, c=curves: run.forward(loaded.model, t, c, device), device)
        passes["backward"] = timed(lambda t=text, c=curves: divergence.backward(loaded.model, t, c, head), device)
        row = {"tokens": len(text.tokens)}
        if options.against_torch:
            exact = empty()
            passes["torch"] = timed(
                lambda t=text, c=exact: divergence.backward(loaded.model, t, c, head, "torch"), device
            )  # fmt: skip
            row["difference"] = differing(curves, exact)
        row |= {name: {"seconds": seconds, "bytes": most} for name, (seconds, most) in passes.items()}
        rows.append(row)
        note(f"{row['tokens']:,} tokens: " + ", ".join(f"{name} {took[0]:.2f} s" for name, took in passes.items()))
    counted = rows[1:]
    names = [name for name in ("forward", "backward", "torch") if name in counted[0]]
    return {
        "format": FORMAT,
        "kind": "gradients",
        "model": loaded.identity["id"],
        "length": options.length,
        "median_seconds": {name: statistics.median(row[name]["seconds"] for row in counted) for name in names},
        "samples": counted,
        "environment": describe(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="the bundled model when left out")
    parser.add_argument("--texts", default="builtin:mixed", help="as --data of bsfa calibrate")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--against-torch", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.samples < 1 or options.length < 256:
        raise UsageError(
            f"--samples must be 1 or more and --length 256 or more, got {options.samples} and {options.length}"
        )
    check_writable(options.out)
    write_json(options.out, measure(options))
    return 0


if __name__ == "__main__":
    end("gradients", main)
