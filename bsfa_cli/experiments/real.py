"""python -m bsfa_cli.experiments.real --model FOLDER --texts FOLDER --length 8192 --out FOLDER

What every recipe for thresholds costs a real language model's predictions: KL divergence, top-1 agreement and
perplexity against the dense model, at eight points a recipe, beside the noise floor, the same comparison with nothing
skipped. Thresholds come from texts of both kinds, and of one kind only to be judged on the other (`experiments.texts`
writes them). Every text goes in turn to all points, and what is done is kept in OUT/work: the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules

from ..calibration.store import Run
from ..data.texts import Sample, data_hash, load_texts
from ..environment import describe, resolve_device
from ..errors import MachineError, UsageError
from ..files import write_json, write_whole
from ..metrics.logits import Head, Predictions
from ..models.load import LoadedModel, check_positions, load_model
from ..prefill_tiles import Attending
from ..presentation import figures
from ..presentation.real_plot import real_plot
from ..suites.run import exact_instead
from ..timing import flash_attention
from ..timing.plan import EXACT, INT8
from ..verification.layers import skip_rate
from ..verification.run import everything
from . import end
from .recipes import RECIPES, TILE, calibrated, contenders, need_gradients
from .texts import KINDS

RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)
RANKS = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16, 1 / 32)  # of a row's tiles
CALIBRATIONS = {"mixed": KINDS, "code": ("code",), "prose": ("prose",)}
LIMITS = {"kl_over_floor": 0.01, "perplexity_increase": 0.01}  # up to where each recipe is followed
FLOOR, NAMES = "floor", ("by_octave", "kept", "candidates")


def texts_of(folder: Path, kind: str, samples: int, length: int, tokenizer) -> list[Sample]:
    """Texts to judge on."""
    spec = str(folder / f"{kind}-judge.jsonl")
    return load_texts(spec, samples=samples, length=length, tokenizer=tokenizer, shortest=2 * max(TILE))


def run_on(
    loaded: LoadedModel, texts: Path, name: str, samples: int, length: int, folder: Path, gradients: bool
) -> Run:
    """The calibration of that name, on the texts in a folder; resumes the one in `folder`."""
    spec = ",".join(str(texts / f"{kind}-calibrate.jsonl") for kind in CALIBRATIONS[name])
    tiles = -(-length // TILE[1])
    ranks = tuple(sorted({max(1, round(share * tiles)) for share in RANKS}))
    return calibrated(loaded, spec, samples, length, folder, ranks, gradients)


@torch.no_grad()
def judge(head: Head, model, found: dict[str, dict], tokens: torch.Tensor) -> dict[str, dict]:
    """JSON by contender of `found` {name: handlers}: sums by octave, and the tiles that the whole model kept."""
    reachable = [path for path, module in attention_modules(model).items() if module.dense_reason is None]
    with attach(model, dict.fromkeys(reachable, dense.attention)):
        exact = head.hidden(tokens)
    result = {}
    for name, handlers in found.items():
        predictions = Predictions()
        with attach(model, handlers), Attending(model) as attending:
            predictions.add(head, exact, head.hidden(tokens), tokens)
        result[name] = dict(zip(NAMES, (predictions.to_json()[0], *attending.read_counts(handlers)), strict=True))
    return result


class Notebook:
    """A .jsonl file of what was measured, a line a text, behind a line that says of what."""

    def __init__(self, path: Path, header: dict):
        """Raises UsageError for a file of another measurement."""
        self.path, self.entries = path, []
        header = json.loads(json.dumps(header))
        lines = path.read_text().splitlines() if path.exists() else []
        if lines:
            begun = json.loads(lines[0])
            differing = sorted(key for key in begun | header if begun.get(key) != header.get(key))
            if differing:
                raise UsageError(f"{path} holds another measurement, its {', '.join(differing)} differ; remove it")
            self.entries = [json.loads(line) for line in lines[1:]]
        else:
            write_whole(path, (json.dumps(header) + "\n").encode())

    def add(self, entry: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        self.entries.append(entry)


def summarise(entries: list[dict], name: str) -> dict:
    """JSON of one contender over the texts of `entries`."""
    here, floor = (Predictions.of(entry["found"][key]["by_octave"] for entry in entries) for key in (name, FLOOR))
    kept, candidates = (sum(entry["found"][name][key] for entry in entries) for key in NAMES[1:])
    return {"skip": skip_rate(kept, candidates), **here.summary(), "kl_over_floor": here.kl_over(floor)}


def summaries(entries: list[dict], name: str) -> dict:
    """The same over all texts and, without the positions, over those of each kind."""
    by_kind = {}
    for kind in KINDS:
        chosen = [entry for entry in entries if entry["kind"] == kind]
        if chosen:
            by_kind[kind] = {key: value for key, value in summarise(chosen, name).items() if key != "by_position"}
    return summarise(entries, name) | {"by_kind": by_kind}


def furthest(points: list[dict], metric: str, limit: float) -> float | None:
    """The skip rate at which `metric` passes `limit`, between neighbouring points linearly; None where the first one is
    beyond it, and the last point's skip where none is.
    """

    def value(point: dict) -> float:
        return point[metric]["value"] if metric == "kl_over_floor" else point[metric]

    ordered, before = sorted(points, key=lambda point: point["skip"]), None
    for point in ordered:
        if not value(point) <= limit:
            if before is None:
                return None
            share = (limit - value(before)) / (value(point) - value(before))
            return before["skip"] + share * (point["skip"] - before["skip"])
        before = point
    return before["skip"]


def table(entries: list[dict], names: list[tuple[str, str, str]]) -> dict:
    """{calibration: {recipe: {points, furthest}}}."""
    result: dict[str, dict] = {}
    for calibration, recipe, point in names:
        entry = result.setdefault(calibration, {}).setdefault(recipe, {"points": []})
        entry["points"].append({"name": point, **summaries(entries, "/".join((calibration, recipe, point)))})
    for recipes in result.values():
        for entry in recipes.values():
            entry["furthest"] = {metric: furthest(entry["points"], metric, limit) for metric, limit in LIMITS.items()}
    return result


def measured(options: argparse.Namespace) -> dict:
    """Calibrate, export, judge: JSON of the whole experiment."""
    length, started = options.length, time.monotonic()
    scores = _scores(options.scores)
    device = resolve_device("auto")
    loaded = load_model(
        options.model, device=device, check_config=lambda config: check_positions(config, length, "--length")
    )
    work = options.out / "work"
    chosen, found, hashes = tuple(options.recipe or RECIPES), {}, {}
    for name in options.calibrations.split(","):
        if name not in CALIBRATIONS:
            raise UsageError(f"--calibrations takes {', '.join(CALIBRATIONS)}, got {name!r}")
        place = work / f"{options.name}-{name}"
        begun = run_on(loaded, options.texts, name, options.samples, length, place, need_gradients(chosen))
        hashes[name] = begun.manifest["data"]["hash"]
        for (recipe, point), handlers in contenders(loaded, begun, chosen, RATES, scores).items():
            found[name, recipe, point] = handlers
    judged = {kind: texts_of(options.texts, kind, options.judge, length, loaded.tokenizer) for kind in KINDS}
    header = {
        "model": loaded.identity, "environment": describe(device), "dtype": str(loaded.model.dtype), "length": length,
        "calibrations": hashes, "texts": {kind: data_hash(texts) for kind, texts in judged.items()},
        "points": ["/".join(key) for key in found],
    } | ({"scores": scores} if scores != (EXACT,) else {})  # fmt: skip
    notebook = Notebook(work / f"{options.name}.jsonl", header)
    beside = _unskipped(loaded, found, scores)
    _judge_all(loaded, found, beside, judged, notebook, started + 60 * options.minutes)
    entries = notebook.entries
    if not entries:
        raise UsageError(f"--minutes {options.minutes:g} is too short for one text; the same command goes on from here")
    floor = summaries(entries, FLOOR)
    return {
        "model": loaded.identity, "label": loaded.label, "environment": header["environment"],
        "dtype": header["dtype"].removeprefix("torch."), "tile": "x".join(map(str, TILE)), "length": length,
        "calibration": {"samples": options.samples, "hashes": hashes},
        "evaluation": {"texts": len(entries), "planned": sum(map(len, judged.values())), "hashes": header["texts"]},
        "limits": LIMITS, "floor": floor, "unskipped": {name: summaries(entries, name) for name in beside},
        "calibrations": table(entries, list(found)),
    }  # fmt: skip


def _scores(text: str) -> tuple[str, ...]:
    """Of "exact,int8", exact first. Raises UsageError."""
    scores = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if scores[0] != EXACT or any(part not in (EXACT, INT8) for part in scores):
        raise UsageError(f"--scores takes exact or exact,int8, got {text!r}")
    return scores


def _unskipped(loaded: LoadedModel, found: dict, scores: tuple[str, ...]) -> dict[str, dict]:
    """{name: handlers} of what rounds more than exact scores do, with nothing skipped: int8 scores and, where it is
    installed, FlashAttention-3 in FP8.
    """
    if INT8 not in scores:
        return {}
    handlers = next(iter(found.values()))
    thresholds = next(iter(handlers.values())).thresholds
    whole = everything(thresholds, thresholds.points[0].name)
    rounded = {
        "int8 scores": SparseAttention.for_model(whole, attention_modules(loaded.model), count=True, scores=INT8)
    }
    if loaded.model.device.type == "cuda":
        x = torch.zeros(1, 1, 64, 64, device=loaded.model.device, dtype=loaded.model.dtype)
        reason = flash_attention.dense_fp8(flash_attention.TokensFirst(x, x, x), True)
        if isinstance(reason, str):
            print(f"{flash_attention.FA3_FP8} is left out: {reason}", file=sys.stderr)
        else:
            rounded[flash_attention.FA3_FP8] = dict.fromkeys(handlers, Fp8Attention())
    return rounded


class Fp8Attention:
    """A handler: dense FlashAttention-3 on Q, K and V rounded to FP8."""

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        if spans is not None:
            raise ValueError("FP8 is measured on whole prompts without padding")
        # It scales by head_dim ** -0.5.
        call = flash_attention.dense_fp8(flash_attention.TokensFirst(q * (scale * q.shape[-1] ** 0.5), k, v), causal)
        if isinstance(call, str):
            raise MachineError(f"{flash_attention.FA3_FP8}: {call}")
        return call().to(q.dtype)


def _judge_all(
    loaded: LoadedModel, found: dict, beside: dict, judged: dict, notebook: Notebook, deadline: float
) -> None:
    """Texts that are not in the notebook, kinds in turns, until `deadline`."""
    head, done = Head(loaded.model), {entry["text"] for entry in notebook.entries}
    thresholds = next(iter(next(iter(found.values())).values())).thresholds
    whole = everything(thresholds, thresholds.points[0].name)
    floor = SparseAttention.for_model(whole, attention_modules(loaded.model), count=True, scores=EXACT)
    named = {FLOOR: floor} | beside | {"/".join(key): handlers for key, handlers in found.items()}
    most = max(map(len, judged.values()))
    order = [(kind, texts[i]) for i in range(most) for kind, texts in judged.items() if i < len(texts)]
    for kind, text in order:
        name = f"{kind} {text.id}"
        if name in done:
            continue
        if time.monotonic() > deadline:
            break
        tokens = torch.tensor(text.tokens, device=loaded.model.device)
        measured = judge(head, loaded.model, named, tokens)
        instead = exact_instead(loaded.model)
        if instead:
            raise MachineError("; ".join(instead))
        notebook.add({"text": name, "kind": kind, "found": measured})
        print(f"{len(notebook.entries)} of {len(order)} texts", file=sys.stderr)


def say(result: dict) -> None:
    """The result in lines, on stderr."""
    floor = result["floor"]
    print(
        f"{result['evaluation']['texts']} texts, dense perplexity {floor['perplexity_dense']:.3f}; nothing skipped: KL "
        f"{floor['kl']:.4f}, top-1 {floor['top1']:.4f}, perplexity {floor['perplexity_increase']:+.3%}",
        file=sys.stderr,
    )
    for name, found in result["unskipped"].items():
        print(
            f"{name}, nothing skipped: KL {found['kl']:.4f}, top-1 {found['top1']:.4f}, perplexity "
            f"{found['perplexity_increase']:+.3%}",
            file=sys.stderr,
        )
    for calibration, recipes in result["calibrations"].items():
        for recipe, entry in recipes.items():
            reached = ", ".join(
                f"{metric} {result['limits'][metric]:g} at {'none' if skip is None else format(skip, '.1%')}"
                for metric, skip in entry["furthest"].items()
            )
            print(f"calibrated on {calibration}, {recipe}: {reached}", file=sys.stderr)
            for point in entry["points"]:
                over, ends = point["kl_over_floor"]["value"], point["intervals"]["perplexity_increase"]
                spread = "" if ends is None else f" [{ends[0]:+.2%}, {ends[1]:+.2%}]"
                print(
                    f"    {point['skip']:6.1%} skipped  KL {point['kl']:.4f} ({over:+.4f})  top-1 "
                    f"{point['top1']:.3f}  perplexity {point['perplexity_increase']:+.2%}{spread}",
                    file=sys.stderr,
                )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.real", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory, GGUF file or Hub id")
    parser.add_argument("--texts", type=Path, required=True, help="folder that `experiments.texts` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.json and NAME.svg, and what is done")
    parser.add_argument("--name", default="real", help="of the files in --out")
    parser.add_argument("--length", type=int, default=8192, help="tokens a text")
    parser.add_argument("--samples", type=int, default=16, help="texts to calibrate on, for each calibration")
    parser.add_argument("--judge", type=int, default=8, help="texts of each kind to judge on")
    parser.add_argument("--calibrations", default=",".join(CALIBRATIONS), help="kinds of text to calibrate on")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="only this one; may be given again")
    parser.add_argument("--scores", default=EXACT, help="exact, or exact,int8: int8 ones at the same thresholds too")
    parser.add_argument("--minutes", type=float, default=60.0, help="no text is begun after so many")
    options = parser.parse_args()
    result = measured(options)
    write_json(options.out / f"{options.name}.json", result)
    if figures.available():
        write_whole(options.out / f"{options.name}.svg", figures.svg(real_plot(result)).encode())
    say(result)
    return 0


if __name__ == "__main__":
    end("real", main)
