"""NVIDIA's skip-softmax kernel, as FlashInfer ships it, as a rival at several skip rates.

The kernel takes one number for all heads, `factor`: a tile is dropped at the threshold factor / length by the rule in
skip_softmax_rule.py, which also tells the skip rates, since the kernel counts nothing. Its layout is [B * T, H, D], a
view of the [B, T, H, D] that tensors are copied into before the timed call. The first call compiles with nvcc every
variant that FlashInfer has for the layout, which takes minutes; FlashInfer caches them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .flash_attention import DTYPES, TokensFirst
from .interleave import first_call
from .libraries import Library, installed
from .skip_softmax_rule import Rule

NAME = "skip-softmax"
HOW = "not installed: `pip install flashinfer-python` brings NVIDIA's kernel for Hopper GPUs; nvcc compiles it here"
HEAD_DIMS = (32, 40, 48, 64, 80, 96, 104, 128, 160, 192, 256)
WORKSPACE_BYTES = 2**27
NOTHING = 1e-30  # the factor that keeps the rule evaluated and every tile kept; 0 is another kernel, without the rule


def find() -> Library | str:
    """FlashInfer's module of prefill kernels, or why there is none and how to get it."""
    found = installed("flashinfer.prefill", ("flashinfer-python",))
    if isinstance(found, Library) and not hasattr(found.module, "trtllm_fmha_v2_prefill"):
        return f"{found.version} has no trtllm_fmha_v2_prefill, which takes skip-softmax; 0.7.2 does"
    return found or HOW


def key_tile(head_dim: int) -> int:
    """Keys of a tile (select_kv_loop_step in flashinfer.jit.attention.fmha_v2.fmha_library)."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def contenders(laid: TokensFirst, causal: bool, skips: tuple[float, ...]) -> Iterator[tuple[str, Callable | str, dict]]:
    """(name, call or the reason why it cannot run, facts of its row); the first skips nothing."""
    library = find()
    reason = library if isinstance(library, str) else _unfit(laid)
    if reason:
        yield NAME, reason, {}
        return
    call = _Call(library, laid, causal)
    nothing = {"kind": NAME, "skip_target": 0.0, "skip": 0.0, "kept_share": 1.0, "skip_from": "by construction"}
    yield f"{NAME}, 0 % skipped", call.at(NOTHING), nothing
    q, k, _ = laid.given
    rule, reason = first_call(lambda: Rule(q, k, causal=causal, keys=key_tile(q.shape[-1])), q.device)
    if reason:
        yield f"{NAME}, some tiles skipped", f"no thresholds for it: {reason}", {}
        return
    for skip in skips:
        gap = rule.reach(skip)
        found = rule.at(gap)
        looked = "all query tiles" if rule.stride == 1 else f"1 query tile in {rule.stride}"
        facts = {
            "kind": NAME, "skip_target": skip, "skip": found.skip, "kept_share": found.kept_share,
            "skip_from": f"computed from {looked}",
        }  # fmt: skip
        yield f"{NAME}, {skip:.0%} skipped".replace("%", " %"), call.at(math.exp(gap) * q.shape[2]), facts


class _Call:
    """FlashInfer's function on one set of tensors, [B, Hq, T, D] at a factor."""

    def __init__(self, library: Library, laid: TokensFirst, causal: bool):
        self.function, self.library = library.module.trtllm_fmha_v2_prefill, library.version
        q = laid.given[0]
        self.laid, self.mask, self.scale = laid, "causal" if causal else "padding", q.shape[-1] ** -0.5
        self.batch, self.length, self.device = q.shape[0], q.shape[2], q.device
        self.workspace = None

    def at(self, factor: float) -> Callable:
        def call() -> torch.Tensor:
            return self._run(factor)

        call.library = self.library
        return call

    def _run(self, factor: float) -> torch.Tensor:
        if self.workspace is None:
            self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
            self.lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
            self.ends = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * self.length
        q, k, v = (x.flatten(0, 1) for x in self.laid.tensors)  # [B * T, H, D]
        try:
            out = self.function(
                (q, k, v), "SEPARATE_Q_K_V", self.workspace, self.lengths, self.length, self.length, self.scale, 1.0,
                self.batch, self.ends, self.ends, mask_mode=self.mask, skip_softmax_threshold_scale_factor=factor,
            )  # fmt: skip
        except RuntimeError as error:
            raise RuntimeError(_said(str(error))) from error
        return out.unflatten(0, (self.batch, self.length)).transpose(1, 2)


def _said(text: str) -> str:
    """The line of a failed build that names the error, or the text itself."""
    if not text.startswith("Ninja build failed"):
        return text
    return "nvcc failed: " + next((line.strip() for line in text.splitlines()[1:] if "error" in line.lower()), text)


def _unfit(laid: TokensFirst) -> str | None:
    """What FlashInfer does not check: without a kernel for a shape it launches nothing and returns what memory held."""
    q, _, v = laid.given
    if q.dtype not in DTYPES:
        return f"serves float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if v.shape[-1] != q.shape[-1]:
        return f"serves values as wide as keys, not head dims {q.shape[-1]} and {v.shape[-1]}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"serves head dims {', '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}"
    capability = torch.cuda.get_device_capability(q.device)
    return None if capability == (9, 0) else f"skips on Hopper GPUs only, not on compute capability {capability}"
