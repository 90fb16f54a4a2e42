"""FlashAttention-3 and -4 as dense baselines, and FlashAttention-3 in FP8 as an approximate one.

    laid = TokensFirst(q, k, v)                   # q [B, Hq, T, D]; k, v [B, Hkv, T, D]
    call = dense("FlashAttention-3", laid, causal=True)
    call if isinstance(call, str) else call()     # why it cannot run, or [B, Hq, T, D]

The libraries want [B, T, H, D], contiguous. That layout is natural to them, since a projection writes it, so tensors
are copied into it once, on the first call, which is not timed; outputs come back as views. Grouped heads are native.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from importlib import import_module

import torch

from .libraries import Library, cached_on_hub, installed
from .plan import FA3

FA4, FA3_FP8 = "FlashAttention-4", "FlashAttention-3 FP8"
MODULES = {  # name: (module, PyPI packages that bring it), the first that is there is taken
    FA3: (("flash_attn_interface", ("flash-attn-3", "tokenspeed-fa3")), ("fa3_fwd_interface", ("fa3-fwd",))),
    FA4: (("flash_attn.cute", ("flash-attn-4",)),),
}
HUB = {FA3: "kernels-community/flash-attn3"}
HOW = {
    FA3: "not installed: `pip install fa3-fwd` brings it for Hopper GPUs, `make gpu-baselines` where the GPU has no "
    "network",
    FA4: "not installed: `pip install flash-attn-4[cu13]` brings it for Hopper and Blackwell GPUs",
}
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class TokensFirst:
    """q, k and v as contiguous [B, T, H, D], copied when first asked for; one copy for all libraries."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        self.given = q, k, v

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [x.transpose(1, 2).contiguous() for x in self.given]


def find(name: str) -> Library | str:
    """The library behind FA3 or FA4, or a sentence that says why there is none and how to get it."""
    reasons = []
    for module, distributions in MODULES[name]:
        found = installed(module, distributions)
        if isinstance(found, Library):
            return found
        reasons.append(found)
    found = cached_on_hub(HUB[name]) if name in HUB else None
    if isinstance(found, Library):
        return found
    return next(filter(None, (*reasons, found)), HOW[name])


def dense(name: str, laid: TokensFirst, causal: bool) -> Callable | str:
    """A call of FA3 or FA4, with `library` for its version; or why it cannot run."""
    library = find(name)
    if isinstance(library, str):
        return library
    return _unfit(laid) or _Call(library, laid, causal)


def dense_fp8(laid: TokensFirst, causal: bool) -> Callable | str:
    """FlashAttention-3 on Q, K and V rounded to FP8 (e4m3, a scale per sequence and KV head) before the timed call."""
    library = find(FA3)
    if isinstance(library, str):
        return library
    return _unfit(laid) or _without_fp8(library) or _Fp8Call(library, laid, causal)


def attention(library: Library, q, k, v, *, causal: bool, **options) -> torch.Tensor:
    """[B, T, Hq, D] of q [B, T, Hq, D], k and v [B, T, Hkv, D]; some versions return the log-sum-exp too."""
    out = library.module.flash_attn_func(q, k, v, causal=causal, **options)
    return out[0] if isinstance(out, tuple) else out


class Handler:
    """FA3 or FA4 in a module (bsfa_kernels.integrations.transformers.Handler), on views of what it hands over: nothing
    is copied. Raises ValueError for padding, windows, softcap and sinks.
    """

    knows_scoring = True  # to refuse what it does not know: without it, modules that have such things pass it by

    def __init__(self, library: Library):
        self.library = library

    def __call__(self, q, k, v, *, scale: float, causal: bool, spans: torch.Tensor | None, **scoring) -> torch.Tensor:
        if spans is not None or any(value is not None for value in scoring.values()):
            raise ValueError("timed on whole prompts without padding, windows, softcap and sinks only")
        laid = (x.transpose(1, 2) for x in (q, k, v))
        return attention(self.library, *laid, causal=causal, softmax_scale=scale).transpose(1, 2)


class _Call:
    def __init__(self, library: Library, laid: TokensFirst, causal: bool):
        self.source, self.library, self.laid, self.causal = library, library.version, laid, causal

    def __call__(self) -> torch.Tensor:
        return attention(self.source, *self.laid.tensors, causal=self.causal).transpose(1, 2)


class _Fp8Call(_Call):
    @cached_property
    def rounded(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """([q, k, v] float8, {argument: float32 [B, Hkv]})."""
        q, k, v = self.laid.tensors
        group = q.shape[2] // k.shape[2]
        values, scales = zip(_rounded(q, group), _rounded(k, 1), _rounded(v, 1), strict=True)
        return list(values), dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))

    def __call__(self) -> torch.Tensor:
        values, scales = self.rounded
        return attention(self.source, *values, causal=self.causal, **scales).transpose(1, 2)


def _rounded(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 [B, T, H, D] of x [B, T, H, D], and what it was divided by, float32 [B, H / group]."""
    grouped = x.unflatten(2, (-1, group)).float()  # [B, T, H / group, group, D]
    scale = grouped.abs().amax((1, 3, 4)).clamp(min=1e-12) / FP8_MAX
    return (grouped / scale[:, None, :, None, None]).to(torch.float8_e4m3fn).flatten(2, 3), scale


def _unfit(laid: TokensFirst) -> str | None:
    q = laid.given[0]
    if q.dtype not in DTYPES:
        return f"serves float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    return f"serves head dims up to {MAX_HEAD_DIM}, not {q.shape[-1]}" if q.shape[-1] > MAX_HEAD_DIM else None


def _without_fp8(library: Library) -> str | None:
    """Why this build takes no FP8, if it says so: upstream's builds carry their flags in a module."""
    if "q_descale" not in inspect.signature(library.module.flash_attn_func).parameters:
        return f"{library.version} takes no FP8"
    try:
        flags = import_module(library.module.__name__.replace("interface", "config")).CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return None
    return f"{library.version} was built without FP8" if flags.get("FLASHATTENTION_DISABLE_FP8") else None
