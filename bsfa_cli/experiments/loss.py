"""python -m bsfa_cli.experiments.loss --model FOLDER --texts FOLDER --length 8192 --skip 0.8 --out FOLDER

Where what skipping costs a model's predictions comes from. The thresholds of one recipe at one skip rate are used in
all layers, in each layer alone, in all layers but one, and in each group of query heads (those of one KV head) alone;
the first is broken down by the position, by how the predicted token is spelt and by whether the text has had it before.
Texts, calibration and resuming as in `experiments.real`, whose calibration in OUT/work is used where it is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules
from bsfa_kernels.thresholds import Thresholds

from ..calibration import points
from ..calibration.points import Request, layer_of
from ..data.texts import data_hash
from ..data.token_kinds import HISTORIES, SPELLINGS, histories, spellings
from ..environment import describe, resolve_device
from ..errors import UsageError
from ..files import write_json
from ..metrics.logits import AGREE, DENSE, KL, POSITIONS, PREDICTED, SPARSE, Head, by_octave, compare
from ..models.load import LoadedModel, check_positions, load_model
from ..prefill_tiles import Attending
from ..verification.run import everything
from . import end
from .real import FLOOR, KINDS, Notebook, run_on, summarise, texts_of
from .recipes import QUANTILE, RECIPES, need_gradients

ALL = "all"


def contenders(loaded: LoadedModel, thresholds: Thresholds, by_head: bool) -> dict[str, dict[str, SparseAttention]]:
    """{name: handlers}: the floor, all, "only L" and "without L" for every layer, "group G" and "only L group G" where
    asked for.
    """
    modules = attention_modules(loaded.model)
    point = thresholds.points[0].name

    def handlers(chosen: Thresholds) -> dict[str, SparseAttention]:
        return SparseAttention.for_model(chosen, modules, point, count=True)

    whole, open_ = handlers(thresholds), handlers(everything(thresholds, point))
    found = {FLOOR: open_, ALL: whole}
    for path, handler in whole.items():
        found[f"only {path}"] = open_ | {path: handler}
        found[f"without {path}"] = whole | {path: open_[path]}
    groups = min(modules[path].kv_heads for path in whole) if _grouped(modules, whole) else 0
    for group in range(groups):
        part = handlers(_of_group(thresholds, group, groups))
        found[f"group {group}"] = part
        if by_head:
            found |= {f"only {path} group {group}": open_ | {path: part[path]} for path in whole}
    return found


def _grouped(modules: Mapping, paths: Mapping) -> bool:
    return len({(modules[path].query_heads, modules[path].kv_heads) for path in paths}) == 1


def _of_group(thresholds: Thresholds, group: int, groups: int) -> Thresholds:
    """The same with every tile kept in all heads but those of one KV head."""
    tensors = {}
    for path, tensor in thresholds.tensors.items():
        share = tensor.shape[1] // groups
        kept = torch.full_like(tensor, -torch.inf)
        part = slice(group * share, (group + 1) * share)
        kept[:, part] = tensor[:, part]
        tensors[path] = kept
    return dataclasses.replace(thresholds, tensors=tensors)


@torch.no_grad()
def judge(head: Head, loaded: LoadedModel, found: dict[str, dict], tokens: tuple[int, ...]) -> dict:
    """JSON: {contender: by_octave, kept, candidates}, and of ALL and FLOOR the sums by kind of token."""
    model, ids = loaded.model, torch.tensor(tokens, device=loaded.model.device)
    able = [path for path, module in attention_modules(model).items() if module.dense_reason is None]
    with attach(model, dict.fromkeys(able, dense.attention)):
        exact = head.hidden(ids)
    kinds = [list(pair) for pair in zip(spellings(tokens, loaded.tokenizer), histories(tokens), strict=True)]
    result, by_kind = {}, {}
    for name, handlers in found.items():
        with attach(model, handlers), Attending(model) as attending:
            rows, finite = compare(head, exact, head.hidden(ids), ids)
        if not finite:
            raise UsageError(f"{name}: predictions are not finite")
        kept, candidates = attending.read_counts(handlers)
        result[name] = {"by_octave": by_octave(rows).tolist(), "kept": kept, "candidates": candidates}
        if name in (ALL, FLOOR):
            by_kind[name] = _by_kind(rows[:-1].cpu(), kinds)
    return {"found": result, "by_kind": by_kind}


def _by_kind(rows: torch.Tensor, kinds: list[list[str]]) -> dict[str, list[float]]:
    sums = {}
    for names, side in ((SPELLINGS, 0), (HISTORIES, 1)):
        index = torch.tensor([names.index(kind[side]) for kind in kinds])
        total = rows.new_zeros(len(names), rows.shape[1]).index_add_(0, index, rows)
        sums |= dict(zip(names, total.tolist(), strict=True))
    return sums


def by_kind(entries: list[dict]) -> dict[str, list[dict]]:
    """JSON by spelling and by history: positions and what skipping costs them, above the floor."""
    result = {}
    for title, names in (("spelling", SPELLINGS), ("history", HISTORIES)):
        result[title] = []
        for name in names:
            sparse, floor = (
                torch.tensor([entry["by_kind"][key][name] for entry in entries], dtype=torch.float64).sum(0)
                for key in (ALL, FLOOR)
            )
            if count := float(sparse[POSITIONS]):
                result[title].append({
                    "kind": name, "positions": int(count), "kl_over_floor": float(sparse[KL] - floor[KL]) / count,
                    "top1": float(sparse[AGREE]) / count, "loss_dense": float(sparse[DENSE] / sparse[PREDICTED]),
                    "loss_sparse": float(sparse[SPARSE] / sparse[PREDICTED]),
                })  # fmt: skip
    return result


def table(entries: list[dict], names: list[str]) -> dict:
    """JSON: the whole, and what each layer and group costs alone and what leaving it dense would save."""
    measured = {name: _short(summarise(entries, name)) for name in names if name != ALL}
    whole = summarise(entries, ALL)
    paths = [name.removeprefix("only ") for name in names if name.startswith("only ") and " group " not in name]
    layers = [
        {"path": path, "layer": layer_of(path)} | {side: measured[f"{side} {path}"] for side in ("only", "without")}
        for path in paths
    ]
    total = sum(each["only"]["kl_over_floor"]["value"] for each in layers)
    groups = {name: measured[name] for name in names if "group " in name}
    return {"whole": whole, "layers": layers, "sum_of_layers": total, "groups": groups}


def _short(summary: dict) -> dict:
    keys = ("skip", "kl", "kl_over_floor", "top1", "perplexity_increase")
    return {key: summary[key] for key in keys}


def title(options: argparse.Namespace) -> str:
    """The name of the files of one recipe at one skip rate."""
    recipe = "-".join(re.findall(r"[a-z0-9]+", options.recipe.lower()))
    return f"{options.name}-loss-{recipe}-{100 * options.skip:g}"


def measured(options: argparse.Namespace) -> dict:
    """JSON of the whole experiment."""
    started, length = time.monotonic(), options.length
    device = resolve_device("auto")
    loaded = load_model(
        options.model, device=device, check_config=lambda config: check_positions(config, length, "--length")
    )
    work, recipe = options.out / "work", RECIPES[options.recipe]
    gradients = options.gradients or need_gradients([options.recipe])
    begun = run_on(loaded, options.texts, "mixed", options.samples, length, work / f"{options.name}-mixed", gradients)
    request = Request(recipe.kind, options.skip, recipe.gate, dense=recipe.dense or frozenset())
    thresholds, *_ = points.export(begun, [request], QUANTILE)
    found = contenders(loaded, thresholds, options.by_head)
    judged = {kind: texts_of(options.texts, kind, options.judge, length, loaded.tokenizer) for kind in KINDS}
    header = {
        "model": loaded.identity, "environment": describe(device), "dtype": str(loaded.model.dtype), "length": length,
        "recipe": options.recipe, "skip": options.skip, "calibration": begun.manifest["data"]["hash"],
        "texts": {kind: data_hash(texts) for kind, texts in judged.items()}, "contenders": list(found),
    }  # fmt: skip
    notebook = Notebook(work / f"{title(options)}.jsonl", header)
    done = {entry["text"] for entry in notebook.entries}
    head = Head(loaded.model)
    turns = [(kind, texts[i]) for i in range(options.judge) for kind, texts in judged.items() if i < len(texts)]
    for kind, text in turns:
        name = f"{kind} {text.id}"
        if name not in done and time.monotonic() < started + 60 * options.minutes:
            notebook.add({"text": name, "kind": kind} | judge(head, loaded, found, text.tokens))
            print(f"{len(notebook.entries)} of {len(turns)} texts", file=sys.stderr)
    entries = notebook.entries
    if not entries:
        raise UsageError(f"--minutes {options.minutes:g} is too short for one text; the same command goes on from here")
    return {
        **header, "label": loaded.label, "dtype": header["dtype"].removeprefix("torch."),
        "evaluation": {"texts": len(entries), "planned": len(turns)}, "floor": summarise(entries, FLOOR),
        **table(entries, list(found)), "by_kind": by_kind(entries),
    }  # fmt: skip


def say(result: dict) -> None:
    """The result in lines, on stderr."""
    whole, floor = result["whole"], result["floor"]
    lines = [
        f"{result['recipe']}, {whole['skip']:.1%} skipped: KL {whole['kl']:.4f} (floor {floor['kl']:.4f}), perplexity "
        f"{whole['perplexity_increase']:+.2%}",
        f"layers alone come to {result['sum_of_layers']:.4f} above the floor, all together to "
        f"{whole['kl_over_floor']['value']:.4f}",
    ]
    for each in sorted(result["layers"], key=lambda each: -each["only"]["kl_over_floor"]["value"]):
        only, without = (each[side]["kl_over_floor"]["value"] for side in ("only", "without"))
        saved = whole["kl_over_floor"]["value"] - without
        lines.append(f"  layer {each['layer']}: alone {only:.5f}, dense saves {saved:.5f}")
    for name, group in result["groups"].items():
        if name.startswith("group"):
            lines.append(f"  KV {name} of every layer alone: {group['kl_over_floor']['value']:.5f}")
    for octave in whole["by_position"]:
        lost = octave["loss_sparse"] - octave["loss_dense"]
        lines.append(f"  positions {octave['from']}-{octave['to']}: KL {octave['kl']:.4f}, loss {lost:+.4f}")
    for kinds in result["by_kind"].values():
        for each in kinds:
            share = each["positions"] / sum(other["positions"] for other in kinds)
            lost = each["loss_sparse"] - each["loss_dense"]
            lines.append(f"  {each['kind']} ({share:.0%}): KL {each['kl_over_floor']:.4f} above, loss {lost:+.4f}")
    print("\n".join(lines), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.loss", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint directory, GGUF file or Hub id")
    parser.add_argument("--texts", type=Path, required=True, help="folder that `experiments.texts` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON, and what is done")
    parser.add_argument("--name", default="real", help="of the files in --out")
    parser.add_argument("--length", type=int, default=8192, help="tokens a text")
    parser.add_argument("--samples", type=int, default=16, help="texts to calibrate on")
    parser.add_argument("--judge", type=int, default=4, help="texts of each kind to judge on")
    parser.add_argument("--recipe", default="shared skip, gap", choices=RECIPES)
    parser.add_argument("--skip", type=float, default=0.8, help="share of candidate tiles to skip")
    parser.add_argument("--gradients", action="store_true", help="calibrate with gradients, as `real` did")
    parser.add_argument("--by-head", action="store_true", help="also every group of heads of every layer alone")
    parser.add_argument("--minutes", type=float, default=60.0, help="no text is begun after so many")
    options = parser.parse_args()
    result = measured(options)
    write_json(options.out / f"{title(options)}.json", result)
    say(result)
    return 0


if __name__ == "__main__":
    end("loss", main)
