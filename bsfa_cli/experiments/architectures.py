"""python -m bsfa_cli.experiments.architectures --out FILE.json

A prefill of two layers of each kind of model, with narrow MLPs and random weights, so that attention decides: what it
takes with `sdpa`, with `flex_attention`, and with `bsfa`, without thresholds and at a skip rate. Timing only: a gate of
one value for all heads is set to skip what was asked for.
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import TileShape

from ..environment import describe, resolve_device
from ..files import check_writable, write_json
from ..timing.interleave import Contender, first_call, measure
from . import end

BISECTIONS = 12
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
        vocab_size=1024, hidden_size=1024, intermediate_size=512, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=length, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **more,
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
    from bsfa_kernels.integrations.transformers import attach, notes

    model = build(*KINDS[name], length, device)
    ids = torch.randint(3, 1024, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    attached = []

    def forward():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    def use(implementation: str, gap: float | None = None) -> None:
        while attached:
            attached.pop().detach()
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        if gap is not None:
            attached.append(attach(model, handlers(model, gap)))

    use("bsfa")
    gap, skip = gap_that_skips(model, forward, rate)
    plans = {"sdpa": ("sdpa", None, None), "flex_attention": ("flex_attention", None, None),
             "bsfa, no thresholds": ("bsfa", None, 0.0), "bsfa": ("bsfa", gap, skip)}  # fmt: skip
    contenders, rows, unavailable, dense = [], [], [], None
    for label, (implementation, gate, skipped) in plans.items():
        torch._dynamo.reset()
        try:
            use(implementation, gate)
        except ValueError as error:
            unavailable.append({"name": label, "reason": str(error).splitlines()[0]})
            continue
        out, reason = first_call(forward, device)
        if reason:
            unavailable.append({"name": label, "reason": reason})
            continue
        dense = out.float() if dense is None else dense
        error = float((out.float() - dense).norm() / dense.norm())
        contenders.append(Contender(label, forward, partial(use, implementation, gate), ahead=False))
        rows.append({"name": label, "skip": skipped, "error": error, "finite": bool(out.isfinite().all())})
    timings = measure(contenders, device, seconds=seconds, at_least=7)
    for row in rows:
        row |= timings[row["name"]].as_dict()
    use("bsfa")
    reasons = sorted({(note.route, note.reason) for note in notes(model)})
    return {"name": name, "length": length, "contenders": rows, "unavailable": unavailable, "notes": reasons}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.architectures", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--skip", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, for each architecture")
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    options = parser.parse_args()
    check_writable(options.out)
    warnings.filterwarnings("ignore", message="bsfa: some layers")
    device, cells = resolve_device("auto"), []
    for name in KINDS:
        if options.only not in name:
            continue
        cells.append(cell(name, options.length, options.skip, device, options.seconds))
        print(name, flush=True)
        for row in cells[-1]["contenders"]:
            skip = "      -" if row["skip"] is None else f"{row['skip']:7.1%}"
            print(f"    {row['name']:22} {row['ms_median']:9.2f} ms {skip}  error {row['error']:.4f}", flush=True)
        for absent in cells[-1]["unavailable"]:
            print(f"    {absent['name']:22} {absent['reason'][:90]}", flush=True)
        write_json(options.out, {"environment": describe(device), "tile": str(TileShape()), "cells": cells})
    return 0


if __name__ == "__main__":
    end("architectures", main)
