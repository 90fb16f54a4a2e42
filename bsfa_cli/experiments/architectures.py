"""python -m bsfa_cli.experiments.architectures --out FILE.json

A prefill of two layers of each kind of model, with narrow MLPs and random weights, so that attention decides: what it
takes with `sdpa`, with `flex_attention`, with FlashAttention-3, and with `bsfa`, without thresholds and at a skip rate.
Timing only: a gate of one value for all heads is set to skip what was asked for.

FlashAttention-3 takes the place of a handler of `bsfa`, since transformers wants it from the package flash-attn-3, of
which PyPI has no wheel; models with windows, softcap or sinks go without it. Ends with an error, once everything is
written, where nothing was skipped or an output is not finite.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import TileShape

from ..environment import describe, resolve_device
from ..errors import GateFailed, UsageError, said
from ..files import check_writable, write_json
from ..timing import flash_attention
from ..timing.interleave import Contender, first_call, measure
from . import end

BISECTIONS = 12
WIDTH = 1024  # of hidden states and the vocabulary
TRANSFORMERS = ("sdpa", "flex_attention")
OPEN, GATED = "bsfa, no thresholds", "bsfa"
# Architecture and what its attention is made of: heads, KV heads, head dim, window and where, softcap, sinks.
KINDS = {
    "Llama-like: 32/8 heads of 128": ("Llama", 32, 8, 128, None, {}),
    "gpt-oss-like: sinks, window 128 and full, 64/8 heads of 64": (
        "GptOss", 64, 8, 64, 128, dict(num_local_experts=2, num_experts_per_tok=1)),
    "Gemma-2-like: softcap, window 4096 and full, 16/8 heads of 128": (
        "Gemma2", 16, 8, 128, 4096, dict(attn_logit_softcapping=50.0, query_pre_attn_scalar=128)),
    "Mistral-like: window 4096, 32/8 heads of 128": ("Mistral", 32, 8, 128, 4096, {}),
    "Gemma-3-like: window 1024 and full, 8/4 heads of 256": (
        "Gemma3", 8, 4, 256, 1024, dict(query_pre_attn_scalar=256)),
    "Qwen3.5-like: full attention, 16/4 heads of 256": ("Qwen3", 16, 4, 256, None, {}),
    "DeepSeek-like: latent attention, 16 heads of 192, V of 128": (
        "DeepseekV3", 16, 16, 64, None, dict(
            q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            first_k_dense_replace=2)),
}  # fmt: skip


def build(kind: str, heads: int, kv_heads: int, head_dim: int, window: int | None, more: dict, length: int, device):
    """Two layers in bfloat16; windowed models alternate, but for Mistral, whose layers all are."""
    import transformers

    settings = dict(
        vocab_size=WIDTH, hidden_size=WIDTH, intermediate_size=WIDTH // 2, num_hidden_layers=2, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip
    if window is not None:
        settings["sliding_window"] = window
        if kind != "Mistral":
            settings["layer_types"] = ["sliding_attention", "full_attention"]
    owner = getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model = owner(owner.config_class(**settings)).to(device, torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):  # scores with a spread of some units
                parameter.normal_(0, 3**0.5 * parameter.shape[1] ** -0.5)
    return model


def handlers(model, gap: float, count: bool = False) -> dict:
    """A gap gate of one value in every module."""
    from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules
    from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

    modules = attention_modules(model)
    tensors = {path: torch.full((1, module.query_heads, 1), gap) for path, module in modules.items()}
    point = Point("only", "gap", "by-hand", gap)
    thresholds = Thresholds(dict.fromkeys(MODEL_KEYS) | {"id": "random"}, TileShape(), True, (0,), (point,), tensors)
    return SparseAttention.for_model(thresholds, modules, count=count)


def gap_that_skips(model, forward, rate: float) -> tuple[float, float]:
    """(gap, skip rate counted): the gap of one value whose skip rate is nearest to `rate`."""
    from bsfa_kernels.integrations.transformers import attach, skip_rate

    def skipped(gap: float) -> float:
        with attach(model, handlers(model, gap, count=True)):
            forward()
            return skip_rate(model) or 0.0

    low, high = -40.0, 40.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped(middle) < rate else (low, middle)
    return middle, skipped(middle)


@torch.inference_mode()
def cell(name: str, length: int, rate: float, device: torch.device, seconds: float) -> dict:
    """One architecture: {name, length, contenders [{name, skip, error, ms_median, ...}], unavailable, notes}."""
    from bsfa_kernels.integrations.transformers import attach, attention_modules, notes

    model = build(*KINDS[name], length, device)
    ids = torch.randint(3, WIDTH, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    attached = []

    def forward():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def use(implementation: str, own: dict | None = None) -> None:
        while attached:
            attached.pop().detach()
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        if own is not None:
            attached.append(attach(model, own))

    use("bsfa")
    gap, skip = gap_that_skips(model, forward, rate)
    contenders, rows, unavailable, dense = [], [], [], None
    plans: dict[str, tuple] = {name: (name, None, None) for name in TRANSFORMERS}
    library = flash_attention.find(flash_attention.FA3)
    if isinstance(library, str):
        unavailable.append({"name": flash_attention.FA3, "reason": library})
    else:
        own = dict.fromkeys(attention_modules(model), flash_attention.Handler(library))
        plans[flash_attention.FA3] = ("bsfa", own, None)
    plans |= {OPEN: ("bsfa", None, 0.0), GATED: ("bsfa", handlers(model, gap), skip)}
    for label, (implementation, own, skipped) in plans.items():
        torch._dynamo.reset()
        try:
            use(implementation, own)
        except ValueError as error:
            unavailable.append({"name": label, "reason": said(error)})
            continue
        out, reason = first_call(forward, device)
        if reason:
            unavailable.append({"name": label, "reason": reason})
            continue
        dense = out.float() if dense is None else dense
        error = float((out.float() - dense).norm() / dense.norm())
        contenders.append(Contender(label, forward, partial(use, implementation, own), ahead=False))
        rows.append({"name": label, "skip": skipped, "error": error, "finite": bool(out.isfinite().all())})
        if label == flash_attention.FA3:
            rows[-1]["library"] = library.version
    timings = measure(contenders, device, seconds=seconds, at_least=7)
    for row in rows:
        row |= timings[row["name"]].as_dict()
    use("bsfa")
    reasons = sorted({(note.route, note.reason) for note in notes(model)})
    return {"name": name, "length": length, "contenders": rows, "unavailable": unavailable, "notes": reasons}


def failures(cell: dict, rate: float) -> list[str]:
    """What makes a cell no measurement of skipping."""
    found = [f"{cell['name']}: {row['name']} is not finite" for row in cell["contenders"] if not row["finite"]]
    skipped = [row["skip"] for row in cell["contenders"] if row["name"] == GATED]
    if rate and not any(skipped):
        found.append(f"{cell['name']}: nothing was skipped")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.architectures", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, after every architecture")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--skip", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, for each architecture")
    parser.add_argument("--only", default="", help="architectures whose names hold this, or these, by commas")
    options = parser.parse_args()
    wanted = [name for name in KINDS if any(part in name for part in options.only.split(","))]
    if not wanted:
        raise UsageError(f"--only {options.only!r} is part of no architecture's name: {'; '.join(KINDS)}")
    if options.length < 1 or not 0 <= options.skip < 1 or not 0 < options.seconds < float("inf"):
        raise UsageError(
            f"--length must be above 0, --skip from 0 to below 1 and --seconds above 0, got {options.length}, "
            f"{options.skip:g} and {options.seconds:g}"
        )
    check_writable(options.out)
    warnings.filterwarnings("ignore", message="bsfa: some layers")
    device, cells, failed = resolve_device("auto"), [], []
    for name in wanted:
        cells.append(cell(name, options.length, options.skip, device, options.seconds))
        failed += failures(cells[-1], options.skip)
        print(name, flush=True)
        for row in cells[-1]["contenders"]:
            skip = "      -" if row["skip"] is None else f"{row['skip']:7.1%}"
            print(f"    {row['name']:22} {row['ms_median']:9.2f} ms {skip}  error {row['error']:.4f}", flush=True)
        for absent in cells[-1]["unavailable"]:
            print(f"    {absent['name']:22} {absent['reason'][:90]}", flush=True)
        write_json(options.out, {"environment": describe(device), "tile": str(TileShape()), "cells": cells})
    if failed:
        raise GateFailed("; ".join(failed))
    return 0


if __name__ == "__main__":
    end("architectures", main)
