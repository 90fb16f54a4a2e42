"""python -m bsfa_cli.experiments.eight_bits --out FILE.json [--model FOLDER --texts FOLDER --length 8192]

What P and V in 8 bits would cost, before anyone writes a kernel: attention emulated in PyTorch (emulation.py), with
exact, int8 or FP8 scores. Without --model errors of the output on structured data with outliers planted in V; with it
what becomes of a real model's predictions on `experiments.texts`: KL divergence, top-1 agreement and perplexity against
the dense model, beside the noise floor, the same emulation with P and V in bfloat16. With --thresholds, an artifact
with the gap gate, at its points too. FILE is written anew after every text: a run that is cut short leaves whole texts.
Ends with an error, once everything is written, where a prediction is not finite or a point skipped nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from bsfa_kernels import block_sparse_attention
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules
from bsfa_kernels.thresholds import Thresholds, ThresholdsError

from ..data.texts import data_hash
from ..environment import describe, resolve_device
from ..errors import GateFailed, InputError, UsageError
from ..files import check_writable, write_json
from ..metrics.distance import relative, squares
from ..metrics.logits import Head, Predictions
from ..models.load import LoadedModel, check_positions, load_model
from ..timing import sweep
from ..timing.plan import Shape
from . import emulation, end
from .emulation import ADDS, TILE, Rounding
from .real import KINDS, skip_rate, texts_of

FLOOR, INT8 = "exact scores", "int8 scores"
FA3_PV = Rounding(p="e4m3", top=256.0, v="e4m3", scale="head")  # as FlashAttention-3's FP8 rounds P and V
E4M3 = Rounding(p="e4m3", v="e4m3", reference="tile")
U8 = Rounding(p="u8", v="int8", reference="tile")
CHEAP = {"scale": "tile", "rotated": True, "mean": "head"}  # of V: one factor a tile, and all else outside the loop
VALUES = {  # roundings of P and V
    "P e4m3, V e4m3 by head": dataclasses.replace(FA3_PV, top=emulation.LARGEST),
    "P e4m3, V e4m3 by head, 14 bits throughout": dataclasses.replace(FA3_PV, top=emulation.LARGEST, adds="always"),
    "P e4m3 up to 1, V e4m3 by head": dataclasses.replace(FA3_PV, top=1.0),
    "P e4m3 of the tile's maximum, V e4m3 by channel": E4M3,
    "the same, 14 bits within a tile": dataclasses.replace(E4M3, adds="tile"),
    "P e4m3 of the tile's maximum, V e4m3 by tile, rotated, without its mean": dataclasses.replace(E4M3, **CHEAP),
    "P e4m3 alone": Rounding(p="e4m3"),
    "V e4m3 by channel alone": Rounding(v="e4m3"),
    "P u8 alone": Rounding(p="u8"),
    "P u8 of the final maximum alone": Rounding(p="u8", reference="final"),
    "P u8 of the tile's maximum alone": Rounding(p="u8", reference="tile"),
    "V int8 by channel alone": Rounding(v="int8"),
    "V int8 by tile, rotated, without its mean, alone": Rounding(v="int8", **CHEAP),
    "P u8, V int8 by channel": dataclasses.replace(U8, reference="running"),
    "P u8 of the tile's maximum, V int8 by channel": U8,
    "the same, sums of rounded P": dataclasses.replace(U8, divisor="rounded"),
    "P s8 of the tile's maximum, V int8 by channel": dataclasses.replace(U8, p="s8"),
    "P u8 of the tile's maximum, V int8 by head": dataclasses.replace(U8, scale="head"),
    "V int8 by tile": dataclasses.replace(U8, scale="tile"),
    "V int8 by tile, rotated": dataclasses.replace(U8, scale="tile", rotated=True),
    "V int8 by channel, without its mean": dataclasses.replace(U8, mean="head"),
    "V int8 by channel, without the tile's mean": dataclasses.replace(U8, mean="tile"),
    "V int8 by tile, rotated, without its mean": dataclasses.replace(U8, **CHEAP),
}
SHORT = (
    "P e4m3, V e4m3 by head", "P e4m3, V e4m3 by head, 14 bits throughout", "P u8, V int8 by channel",
    "P u8 of the tile's maximum, V int8 by channel", "V int8 by tile, rotated, without its mean",
)  # fmt: skip
GATED = ("P e4m3, V e4m3 by head, 14 bits throughout", SHORT[-1])
LENGTHS = 2048, 1024  # of planted data
PLANTED = (
    "as it is", "two channels far from zero", "one channel 10 times as large", "every 16th channel 8 times as large",
    "heavy tails", "every 64th key 16 times as large",
)  # fmt: skip


def contenders(short: bool) -> dict[str, Rounding]:
    """{name: rounding} with nothing skipped, the floor first: parts of FP8 by themselves, then beside int8 scores."""
    apart = {
        FLOOR: Rounding(),
        INT8: Rounding("int8"),
        "FP8 scores": Rounding("e4m3"),
        "exact scores, FlashAttention-3's FP8 P and V": FA3_PV,
        "exact scores, the same, 14 bits throughout": dataclasses.replace(FA3_PV, adds="always"),
        "FP8 scores, P and V": dataclasses.replace(FA3_PV, scores="e4m3"),
        "FP8 scores, P and V, 14 bits throughout": dataclasses.replace(FA3_PV, scores="e4m3", adds="always"),
        "exact scores, V int8 by tile, rotated, without its mean": VALUES[SHORT[-1]],
    }
    rounded = {name: dataclasses.replace(each, scores="int8") for name, each in VALUES.items()}
    return apart | {f"{INT8}, {name}": each for name, each in rounded.items() if not short or name in SHORT}


class Emulated:
    """A handler (transformers.Handler) that emulates; `gated` has the thresholds, `kept` and `candidates` add up."""

    def __init__(self, rounding: Rounding, gated: SparseAttention | None = None):
        self.rounding, self.gated = rounding, gated
        self.kept = self.candidates = 0

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None) -> torch.Tensor:
        if spans is not None or not causal:
            raise ValueError("emulated on whole causal prompts without padding")
        gate = None if self.gated is None else self.gated.gate(q.shape[2], q.device)
        out, kept, candidates = emulation.attention(q, k, v, self.rounding, scale=scale, gate=gate)
        self.kept, self.candidates = self.kept + kept, self.candidates + candidates
        return out


def handlers(loaded: LoadedModel, thresholds: Thresholds | None, short: bool) -> dict[str, dict[str, Emulated]]:
    """{name: {module path: handler}}, FLOOR first. Raises UsageError or ThresholdsError for other `thresholds`."""
    modules = attention_modules(loaded.model)
    able = [path for path, module in modules.items() if module.dense_reason is None]
    found = {name: {path: Emulated(each) for path in able} for name, each in contenders(short).items()}
    if thresholds is None:
        return found
    if thresholds.tile != TILE or not thresholds.keep_sink or any(point.gate != "gap" for point in thresholds.points):
        raise UsageError(f"--thresholds: expected points of the gap gate, tiles of {TILE} and the sink kept")
    thresholds.check_model(loaded.identity, {path: module.query_heads for path, module in modules.items()})
    if missing := sorted(set(able) - set(thresholds.tensors)):
        raise UsageError(f"--thresholds holds nothing for {missing[0]}; expected every attention module")
    rounded = {f"{INT8}, {name}": dataclasses.replace(VALUES[name], scores="int8") for name in GATED}
    for point in thresholds.points:
        gated = SparseAttention.for_model(thresholds, modules, point.name)
        for name, each in ({FLOOR: Rounding(), INT8: Rounding("int8")} | rounded).items():
            found[f"{point.name}: {name}"] = {path: Emulated(each, gated[path]) for path in able}
    return found


@torch.no_grad()
def judge(head: Head, model, found: dict[str, dict[str, Emulated]], tokens: torch.Tensor, sums: dict) -> None:
    """Adds one text to `sums`, {name: Predictions}."""
    with attach(model, dict.fromkeys(found[FLOOR], dense.attention)):
        exact = head.hidden(tokens)
    for name, each in found.items():
        with attach(model, each):
            sums[name].add(head, exact, head.hidden(tokens), tokens)


def summary(found: dict[str, dict[str, Emulated]], sums: dict[str, Predictions]) -> list[dict]:
    """JSON, a contender a row: what `Predictions` says, and how far the divergence is above the floor's and above that
    of int8 scores, on the same texts.
    """
    rows = []
    for name, each in found.items():
        kept, candidates = (sum(getattr(one, key) for one in each.values()) for key in ("kept", "candidates"))
        here = sums[name].summary()
        del here["by_position"]
        rounding = next(iter(each.values())).rounding
        rows.append({
            "name": name, "rounding": dataclasses.asdict(rounding), "finite": sums[name].finite,
            "skip": skip_rate(kept, candidates) if candidates else 0.0, **here,
            "kl_over_floor": sums[name].kl_over(sums[FLOOR]), "kl_over_int8": sums[name].kl_over(sums[INT8]),
        })  # fmt: skip
    return rows


def planted(data: str, shape: Shape, length: int, device: torch.device):
    """q, k and v of structured data, bfloat16, V changed as one of PLANTED says."""
    q, k, v = sweep.tensors("structured", shape, length, device, torch.bfloat16, 0)
    if data == PLANTED[1]:
        v[..., 3] += 30
        v[..., shape.head_dim // 2] -= 18
    elif data == PLANTED[2]:
        v[..., 7] *= 10
    elif data == PLANTED[3]:
        v[..., ::16] *= 8
    elif data == PLANTED[4]:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(4, *v.shape, generator=generator).to(device)
        v = (normal[0] / normal[1:].square().mean(0).sqrt()).to(v.dtype)  # Student's t, 3 degrees of freedom
    elif data == PLANTED[5]:
        v[:, :, ::64] *= 16
    return q, k, v


def errors(data: str, named: dict[str, Rounding], shape: Shape, length: int, device: torch.device) -> list[dict]:
    """JSON rows, exact scores: relative L2 distance from dense attention in float32 on the same bfloat16 tensors."""
    q, k, v = planted(data, shape, length, device)
    wide = block_sparse_attention(q.float(), k.float(), v.float(), causal=True, backend="torch").out
    rows = []
    for name, rounding in named.items():
        out, *_ = emulation.attention(q, k, v, rounding, scale=shape.head_dim**-0.5)
        rows.append({"data": data, "name": name, "error": relative(*squares(out, wide))})
    return rows


def planted_table(device: torch.device) -> dict:
    """JSON of all PLANTED, and of the ways to add up FP8 products on data that are small enough for the last."""
    shape, (length, short) = Shape("text", 8, 2, 128), LENGTHS
    named = {"bfloat16": Rounding()} | VALUES
    rows = [row for data in PLANTED for row in errors(data, named, shape, length, device)]
    few = Shape("text", 2, 1, 64)
    ways = {f"FlashAttention-3's FP8 P and V, adds: {adds}": dataclasses.replace(FA3_PV, adds=adds) for adds in ADDS}
    return {
        "shape": shape.describe(), "length": length, "rows": rows,
        "adds": {"shape": few.describe(), "length": short, "rows": errors(PLANTED[0], ways, few, short, device)},
    }  # fmt: skip


def say(rows: list[dict], texts: int) -> None:
    """The table in lines, on stderr."""
    print(f"{texts} texts, dense perplexity {rows[0]['perplexity_dense']:.3f}", file=sys.stderr)
    for row in rows:
        ends = row["kl_over_int8"]["interval"]
        spread = "" if ends is None else f" [{ends[0]:+.4f}, {ends[1]:+.4f}]"
        print(
            f"    {row['skip']:6.1%} skipped  KL {row['kl']:.4f}, over int8 scores {row['kl_over_int8']['value']:+.4f}"
            f"{spread}  top-1 {row['top1']:.3f}  perplexity {row['perplexity_increase']:+.2%}  {row['name']}",
            file=sys.stderr,
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.eight_bits", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--model", help="checkpoint directory, GGUF file or Hub id; without it planted data only")
    parser.add_argument("--texts", type=Path, help="folder that `experiments.texts` wrote")
    parser.add_argument("--length", type=int, default=8192, help="tokens a text")
    parser.add_argument("--judge", type=int, default=4, help="texts of each kind to judge on")
    parser.add_argument("--thresholds", type=Path, help="artifact, to skip at its points too")
    parser.add_argument("--short", action="store_true", help="the main roundings only")
    parser.add_argument("--minutes", type=float, default=60.0, help="no text is begun after so many")
    options = parser.parse_args()
    if options.model and not options.texts:
        raise UsageError("--model needs --texts, the folder that experiments.texts wrote")
    if not options.model and (options.short or options.thresholds):
        raise UsageError("--short and --thresholds need a --model")
    if options.judge < 1:
        raise UsageError(f"--judge must be at least 1 text of each kind, got {options.judge}")
    if options.length < 1 or not 0 < options.minutes < float("inf"):
        raise UsageError(f"--length and --minutes must be above 0, got {options.length} and {options.minutes:g}")
    check_writable(options.out)
    started, device = time.monotonic(), resolve_device("auto")
    result = {"environment": describe(device), "tile": str(TILE)}
    if options.model:
        real_model(options, result, started, device)
    else:
        write_json(options.out, result | {"planted": planted_table(device)})
    return 0


def real_model(options: argparse.Namespace, result: dict, started: float, device: torch.device) -> None:
    """Adds the key "model" to `result` and writes it, text by text, in time."""
    loaded = load_model(
        options.model, device=device, check_config=lambda config: check_positions(config, options.length, "--length")
    )
    judged = {kind: texts_of(options.texts, kind, options.judge, options.length, loaded.tokenizer) for kind in KINDS}
    try:
        thresholds = None if options.thresholds is None else Thresholds.read(options.thresholds)
        found = handlers(loaded, thresholds, options.short)
    except ThresholdsError as error:
        raise InputError(f"{options.thresholds}: {error}") from error
    sums, head, done = {name: Predictions() for name in found}, Head(loaded.model), 0
    turns = [texts[i] for i in range(options.judge) for texts in judged.values() if i < len(texts)]
    for text in turns:
        if time.monotonic() > started + 60 * options.minutes:
            break
        judge(head, loaded.model, found, torch.tensor(text.tokens, device=device), sums)
        done += 1
        result["model"] = {
            "identity": loaded.identity, "label": loaded.label, "length": options.length,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "evaluation": {"texts": done, "planned": len(turns),
                           "hashes": {kind: data_hash(texts) for kind, texts in judged.items()}},
            "rows": summary(found, sums),
        }  # fmt: skip
        write_json(options.out, result)
        print(f"{done} of {len(turns)} texts, {time.monotonic() - started:.0f} s", file=sys.stderr)
    if not done:
        raise UsageError(f"--minutes {options.minutes:g} is too short for one text")
    say(result["model"]["rows"], done)
    gated = {name for name, each in found.items() if any(one.gated for one in each.values())}
    failed = failures(result["model"]["rows"], gated)
    if failed:
        raise GateFailed("; ".join(failed))


def failures(rows: list[dict], gated: set[str]) -> list[str]:
    """What makes the rows no measurement: predictions that are not finite, and a gate that dropped nothing."""
    found = [f"{row['name']} is not finite" for row in rows if not row["finite"]]
    return found + [f"{row['name']}: nothing was skipped" for row in rows if row["name"] in gated and not row["skip"]]


if __name__ == "__main__":
    end("eight_bits", main)
