"""python -m bsfa_cli.experiments.recipes --out DIR

How far every recipe for thresholds can go: calibrates once, exports eight points for each recipe, and asks the model
questions from other seeds, and by default about other tasks and lengths, dense and at every point. Questions come in
turn to all points, so a run that --minutes cuts short has asked all of them the same. On several GPUs, some recipes on
each (--recipe), and then one file of them: --join FILE FILE --out DIR.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules

from ..calibration import fit, points, run
from ..calibration.points import Request
from ..calibration.store import Run
from ..data.plans import names_of, plan
from ..data.questions import Plan
from ..data.texts import TASKS, load_texts
from ..environment import describe, resolve_device
from ..errors import InputError
from ..files import write_json, write_whole
from ..models.load import LoadedModel, load_model
from ..options import numbers
from ..presentation import figures
from ..presentation.recipes_plot import recipes_plot
from ..suites.run import Answer, Examiner, dense_handlers, examine, mode
from ..suites.summary import summarise
from ..timing.plan import EXACT
from . import end

RATES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # or as much less as the gate can reach
TOP_K = (96, 64, 48, 32, 16, 8, 4, 2)
MASSES = tuple(10 ** (-exponent / 4) for exponent in (12, 10, 8, 6, 4, 3, 2, 1))  # levels that calibration counts at


class Recipe(NamedTuple):
    """How thresholds are chosen, for which gate, and how many layers, the dearest, keep every tile."""

    kind: str
    gate: str
    dense: int = 0


RECIPES = {
    "top-k, absolute": Recipe("top-k", "absolute"),
    "even skip, absolute": Recipe("even-skip", "absolute"),
    "shared skip, absolute": Recipe("mass-skip", "absolute"),
    "shared by KL, absolute": Recipe("kl-skip", "absolute"),
    "one lambda, gap": Recipe("one-threshold", "gap"),
    "shared skip, gap": Recipe("mass-skip", "gap"),
    "shared by effect, gap": Recipe("effect-skip", "gap"),
    "shared by KL, gap": Recipe("kl-skip", "gap"),
    "shared skip, gap, 2 layers dense": Recipe("mass-skip", "gap", 2),
    "shared by KL, gap, 2 layers dense": Recipe("kl-skip", "gap", 2),
    "max dropped mass, gap": Recipe("max-dropped-mass", "gap"),
}
QUANTILE, TILE, KEPT = 0.99, (64, 128), 0.99
DENSE = "dense"


def calibrated(
    loaded: LoadedModel, spec: str, samples: int, length: int, folder: Path, top_k: tuple[int, ...], gradients: bool
) -> Run:
    """A run of `samples` documents, like `bsfa calibrate --data spec`; resumes the one in `folder`."""
    texts = load_texts(spec, samples=samples, length=length, tokenizer=loaded.tokenizer)
    modules, _ = run.chosen_modules(loaded.model, None)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    place = loaded.model.device.type
    options = run.Options(spec, samples, length, 0, TILE, top_k, None, place, dtype, gradients=gradients)
    run.calibrate(loaded, texts, modules, options, folder)
    return Run.open(folder)


def recipes(begun: Run, rates: tuple[float, ...]) -> dict[str, list[Request]]:
    """Eight points for each recipe: `rates`, or as much less as the gate can reach."""
    _, curves = begun.load("fit")
    asked = {}
    for gate in ("gap", "absolute"):
        reach = fit.Table.of(curves, gate).reach
        asked[gate] = [rate * min(1.0, reach / rates[-1]) for rate in rates]
    counted = {"top-k": begun.plan.ranks, "max-dropped-mass": MASSES}
    return {
        name: [
            Request(kind, setting, gate, dense=dense or frozenset()) for setting in counted.get(kind, asked[gate])
        ]
        for name, (kind, gate, dense) in RECIPES.items()
    }  # fmt: skip


def need_gradients(chosen: Iterable[str]) -> bool:
    """Whether a run must have gradients for one of these recipes."""
    return any(RECIPES[name].kind == "kl-skip" for name in chosen)


def contenders(
    loaded: LoadedModel,
    begun: Run,
    chosen: tuple[str, ...],
    rates: tuple[float, ...],
    scores: tuple[str, ...] = (EXACT,),
) -> dict:
    """{(recipe, point): handlers} of the chosen recipes; with int8 scores, at the same thresholds, a recipe says so."""
    modules, found = attention_modules(loaded.model), {}
    points_of = recipes(begun, rates)
    for recipe in chosen:
        artifact, *_ = points.export(begun, points_of[recipe], QUANTILE)
        for point in artifact.points:
            for used in scores:
                name = recipe if used == EXACT else f"{recipe}, {used} scores"
                found[name, point.name] = SparseAttention.for_model(
                    artifact, modules, point.name, count=True, scores=used
                )
    return found


def measure(loaded: LoadedModel, found: dict, plan: Plan, seconds: float) -> dict[object, list[Answer]]:
    """Answers of the dense model and of every contender to the plan's questions, as many as fit into `seconds`."""
    deadline = time.monotonic() + seconds

    def in_time() -> Iterator:
        for question in plan.questions_for(loaded.tokenizer):
            if time.monotonic() > deadline:
                return
            yield question

    examiner = Examiner(loaded.model, loaded.tokenizer)
    return examine(examiner, {DENSE: dense_handlers(loaded.model), **found}, in_time())


def table(answers: dict[object, list[Answer]]) -> dict:
    """JSON by recipe: its points, and the one that skips most of those which keep 99 % of the dense answers."""
    result: dict[str, dict] = {}
    for key, given in answers.items():
        if key != DENSE:
            recipe, name = key
            summary = summarise(given, answers[DENSE])
            del summary["by_length_and_depth"]
            result.setdefault(recipe, {"points": []})["points"].append({"name": name, **summary})
    for entry in result.values():
        good = [point for point in entry["points"] if (point["retention"] or 0) >= KEPT]
        best = max(good, key=lambda point: point["skip"], default=None)
        keys = ("name", "skip", "exact", "retention", "retention_interval")
        entry["furthest"] = best and {key: best[key] for key in keys}
    return result


def joined(files: list[Path]) -> dict:
    """One result of several that measured different recipes and agree in everything else.

    Raises InputError for a file that is no result, or does not agree with the first.
    """
    first, found = None, {}
    for file in files:
        try:
            result = json.loads(file.read_text())
            found |= result.pop("recipes")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{file}: expected a result of this experiment ({error})") from None
        first = first or result
        differing = sorted(key for key in first | result if first.get(key) != result.get(key))
        if differing:
            raise InputError(f"{file}: not measured like {files[0]}, its {', '.join(differing)} differ")
    return first | {"recipes": found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.recipes", description=__doc__)
    parser.add_argument("--model", help="checkpoint directory or Hub id; the bundled model by default")
    parser.add_argument("--out", type=Path, required=True, help="folder for recipes.json and, with matplotlib, .svg")
    parser.add_argument("--calibrate-on", default="single,records,tracking-1", help="tasks to calibrate on")
    parser.add_argument("--calibrate-length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--tasks", default="multi-key,multi-query,multi-value,tracking-2,tracking-4,frequent-words")
    parser.add_argument("--lengths", default="32768", help="tokens of the documents asked about")
    parser.add_argument("--questions", type=int, default=510, help="for each point, over all tasks and lengths")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the questions, at most")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one; may be given again")
    parser.add_argument("--name", default="recipes", help="of the files in --out")
    parser.add_argument("--join", type=Path, nargs="+", help="measure nothing: put the recipes of these files into one")
    options = parser.parse_args()
    result = joined(options.join) if options.join else measured(options)
    write_json(options.out / f"{options.name}.json", result)
    if figures.available():
        write_whole(options.out / f"{options.name}.svg", figures.svg(recipes_plot(result)).encode())
    print(f"dense {result['dense']['exact']:.3f} of {result['evaluation']['questions']} questions", file=sys.stderr)
    for recipe, entry in result["recipes"].items():
        best = entry["furthest"]
        reach = f"{best['skip']:.3f} skipped at {best['retention']:.4f} of dense" if best else "none keeps 99 %"
        line = "  ".join(f"{point['exact']:.3f} @ {point['skip']:.3f}" for point in entry["points"])
        print(f"{recipe:24} {line}  furthest: {reach}", file=sys.stderr)
    return 0


def measured(options: argparse.Namespace) -> dict:
    """Calibrate, export, ask: JSON of the whole experiment."""
    loaded = load_model(options.model, device=resolve_device("auto"))
    names = names_of(options.tasks)
    lengths = numbers(options.lengths, int, "--lengths takes whole numbers of tokens")
    planned = plan(options.tasks, lengths, -(-options.questions // (len(names) * len(lengths))), seed=1)
    spec = TASKS + options.calibrate_on
    with tempfile.TemporaryDirectory() as folder:
        chosen = tuple(options.recipe or RECIPES)
        place, length = Path(folder) / "run", options.calibrate_length
        begun = calibrated(loaded, spec, options.samples, length, place, TOP_K, need_gradients(chosen))
        found = contenders(loaded, begun, chosen, RATES)
    answers = measure(loaded, found, planned, 60 * options.minutes)
    asked = answers[DENSE]
    return {
        "model": loaded.identity, "label": loaded.label, "environment": describe(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "tile": "x".join(map(str, TILE)),
        "calibration": {"data": spec, "length": options.calibrate_length, "samples": options.samples,
                        "hash": begun.manifest["data"]["hash"], "quantile": QUANTILE},
        "evaluation": {"tasks": names, "lengths": lengths, "seed": planned.seed, "mode": mode(asked[0].question),
                       "questions": len(asked), "planned": len(planned)},
        "dense": summarise(asked, asked), "recipes": table(answers),
    }  # fmt: skip


if __name__ == "__main__":
    end("recipes", main)
