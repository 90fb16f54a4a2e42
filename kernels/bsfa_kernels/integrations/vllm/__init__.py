"""bsfa in vLLM: a general plug-in that vLLM loads by itself where this package is installed.

    vllm serve MODEL --additional-config '{"bsfa": {"thresholds": "thresholds.safetensors", "point": "skip-50"}}' \\
        --attention-backend CUSTOM          # on a GPU; a CPU has one backend, and it is taken over

Without that configuration nothing changes. docs/serving.md says how it is used; what is served is decided in plan.py,
and what that leaves to vLLM's own kernel is noted in the log and counted.
"""

from __future__ import annotations

PLACES = {"TileScheduler": ".scheduler"}


def register() -> None:
    """vLLM calls it in each of its processes, before a configuration is known. Imports neither model nor kernel."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.SparseCPUBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.cuda.SparseCUDABackend")


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(PLACES[name], __name__), name)
