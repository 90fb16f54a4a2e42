"""Dense attention to be measured against: every SDPA backend by its name, FlexAttention, and what is installed of
FlashAttention-3 and -4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import flash_attention
from .flash_attention import FA3, FA3_FP8, FA4, TokensFirst

SDPA = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_SDPA = {"PyTorch's CPU flash attention": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
FLEX_BLOCK = 128
MATH_LIMIT = 2048  # tokens; beyond, its score matrix dwarfs what is measured


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    wanted: tuple[str, ...] = (),
    laid: TokensFirst | None = None,
) -> dict[str, Callable | str]:
    """{name: call, or the reason why it is left out}. q [B, Hq, T, D]; k, v [B, Hkv, T, D]; calls return q's shape.

    `wanted` names those to run, of plan.BASELINES; all where it names none. `laid`: the same tensors as the libraries
    want them, where others share the copy. A library's call has its version as `library`.
    """
    cpu, laid = q.device.type == "cpu", laid or TokensFirst(q, k, v)
    found: dict[str, Callable | str] = {}
    for name, backend in (CPU_SDPA if cpu else SDPA).items():
        if name == "math" and q.shape[2] > MATH_LIMIT:
            found[name] = f"needs the whole score matrix; timed up to {MATH_LIMIT} tokens"
        elif name == "efficient" and q.shape[1] != k.shape[1]:
            # It has no grouped-query mode; the copies are made outside the timed call.
            group = q.shape[1] // k.shape[1]
            found[name] = _Repeated(q, k, v, causal, group)
        else:
            found[name] = _sdpa(q, k, v, causal, backend)
    found["FlexAttention"] = "timed on CUDA only" if cpu else _Flex(q, k, v, causal)
    for name in () if cpu else (FA3, FA4):
        found[name] = asked(name, wanted) or flash_attention.dense(name, laid, causal)
    return {name: asked(name, wanted) or call for name, call in found.items()}


def approximate(laid: TokensFirst, causal: bool, wanted: tuple[str, ...] = ()) -> dict[str, Callable | str]:
    """Kernels that visit every key but round what they multiply, as `dense`: never the fastest dense one."""
    if laid.given[0].device.type == "cpu":
        return {}
    return {FA3_FP8: asked(FA3_FP8, wanted) or flash_attention.dense_fp8(laid, causal)}


def asked(name: str, wanted: tuple[str, ...]) -> str | None:
    """Why `name` is left out although it may run; None where it is wanted."""
    return "not asked for" if wanted and name not in wanted else None


def _sdpa(q, k, v, causal: bool, backend: SDPBackend) -> Callable:
    grouped = q.shape[1] != k.shape[1]

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


class _Repeated:
    """SDPA's memory-efficient backend with K and V repeated once per query head, on the first call."""

    def __init__(self, q, k, v, causal: bool, group: int):
        self.q, self.shared, self.causal, self.group, self.repeated = q, (k, v), causal, group, None

    def __call__(self):
        if self.repeated is None:
            self.repeated = [x.repeat_interleave(self.group, dim=1) for x in self.shared]
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return scaled_dot_product_attention(self.q, *self.repeated, is_causal=self.causal)


class _Flex:
    """FlexAttention, compiled for this shape alone on the first call, with a causal block mask."""

    def __init__(self, q, k, v, causal: bool):
        self.q, self.k, self.v, self.causal, self.mask, self.compiled = q, k, v, causal, None, None

    def __call__(self):
        if self.compiled is None:
            self._compile()
        grouped = self.q.shape[1] != self.k.shape[1]
        return self.compiled(self.q, self.k, self.v, block_mask=self.mask, enable_gqa=grouped)

    def _compile(self):
        import torch._dynamo  # not at the top: it takes as long as torch itself
        from torch.nn.attention.flex_attention import flex_attention

        # After a few recompilations Dynamo would quietly run FlexAttention uncompiled: start afresh for every shape.
        torch._dynamo.reset()
        if self.causal:
            self.mask = causal_block_mask(self.q.shape[2], self.q.device)
        self.compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)


def causal_block_mask(length: int, device):
    """What `create_block_mask` makes of causality, without compiling it for every length (and without T x T bools)."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-length // FLEX_BLOCK)
    block = torch.arange(blocks, dtype=torch.int32, device=device)
    full, partial = block.clone(), torch.ones_like(block)
    earlier = block.expand(blocks, blocks)
    own = torch.where(earlier == 0, block[:, None], 0)
    if length % FLEX_BLOCK:
        # Its rows past the end see nothing, so no block of the last row is full.
        full[-1], partial[-1], own[-1] = 0, blocks, block
    return BlockMask.from_kv_blocks(
        *(x.contiguous()[None, None] for x in (partial, own, full, earlier)),
        BLOCK_SIZE=FLEX_BLOCK, mask_mod=_causal, seq_lengths=(length, length),
    )  # fmt: skip


def _causal(batch, head, q_index, k_index):
    return q_index >= k_index
