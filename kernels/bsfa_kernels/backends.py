"""Which backend serves a call, and the reason, in words, when a faster one cannot.

Fastest first: hopper (Gluon, sm_90), triton (any NVIDIA GPU, and Triton's interpreter), torch (blocked matmuls, any
device), reference (the specification). A backend is a module with `unsupported(request) -> reason | None` and
`attention(request) -> (out, lse, kept, candidates)`.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from .request import Request

MODULES = {"hopper": "hopper", "triton": "portable", "torch": "blocked", "reference": "reference_backend"}
NAMES = tuple(MODULES)


class BackendUnavailable(RuntimeError):
    """The backend that was demanded cannot serve this call; the message says why."""


@cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported here."""
    if name in ("hopper", "triton"):
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
    return importlib.import_module(f".{MODULES[name]}", __package__)


def reason_against(name: str, request: Request) -> str | None:
    """Why backend `name` cannot serve `request`, or None when it can."""
    module = load(name)
    return module if isinstance(module, str) else module.unsupported(request)


def choose(request: Request, demanded: str = "auto") -> tuple[str, dict[str, str]]:
    """(backend, {faster backend: why not}). Raises BackendUnavailable when `demanded` cannot serve the call."""
    if demanded != "auto":
        if demanded not in MODULES:
            raise ValueError(f"backend must be 'auto' or one of {', '.join(NAMES)}; got {demanded!r}")
        reason = reason_against(demanded, request)
        if reason:
            raise BackendUnavailable(f"backend '{demanded}' cannot serve this call: {reason}")
        return demanded, {}
    passed_over = {}
    for name in NAMES:
        reason = reason_against(name, request)
        if reason is None:
            return name, passed_over
        passed_over[name] = reason
    raise BackendUnavailable("; ".join(f"{name}: {reason}" for name, reason in passed_over.items()))
