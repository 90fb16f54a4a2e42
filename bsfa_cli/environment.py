"""Versions, GPU and backends: what every result carries, and what `bsfa env` prints."""

from __future__ import annotations

import platform
import re
import subprocess
import threading
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

from .errors import MachineError, UsageError

DRIVER = "/proc/driver/nvidia/version"
ROOT = Path(__file__).resolve().parent.parent


def resolve_device(name: str):
    """torch.device for auto, cpu, cuda or cuda:N. Raises MachineError when CUDA is asked for and not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got '{name}'") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = "is a CPU build" if torch.version.cuda is None else "sees no usable NVIDIA GPU"
            raise MachineError(f"--device {name}: no CUDA here (PyTorch {torch.__version__} {build}); use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise MachineError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def wake(device) -> None:
    """Let CUDA and cuBLAS set themselves up on a GPU beside the imports that follow; nothing for a CPU. What goes wrong
    is said by the first call that needs the GPU.
    """

    def multiply():
        import torch

        with suppress(Exception), torch.inference_mode():
            x = torch.zeros(16, 16, device=device, dtype=torch.bfloat16)
            (x @ x).sum().item()

    if device.type == "cuda":
        threading.Thread(target=multiply, name="bsfa-wake").start()


def free_memory(device) -> int | None:
    """Bytes that are free on a GPU, or in the host for a CPU; None where that cannot be known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def describe(device=None) -> dict:
    """Versions, GPU, driver and the source's git commit; JSON-ready, None where there is no such thing.

    Keys: bsfa, commit, python, platform, torch, triton, transformers, cuda, cudnn, gpu, driver, capability,
    memory_bytes. `device` picks the GPU; the current one by default, none when it is a CPU.
    """
    import torch

    facts = {
        "bsfa": _version("bsfa"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "cudnn": None,
        "gpu": None,
        "driver": None,
        "capability": None,
        "memory_bytes": None,
    }
    if torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda"):
        index = torch.cuda.current_device() if device is None else torch.device(device).index or 0
        properties = torch.cuda.get_device_properties(index)
        facts |= {
            "cudnn": _dotted_cudnn(torch.backends.cudnn.version()),
            "gpu": properties.name,
            "driver": _driver(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    return facts


def backends() -> list[dict]:
    """Every attention backend, fastest first, for a small bf16 call here: {name, available, reason, int8_scores}, the
    last one "yes" or why it has none.
    """
    import torch
    from bsfa_kernels import Gate, TileShape
    from bsfa_kernels.backends import ATTENTION, reason_against
    from bsfa_kernels.request import Request

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.empty(1, 8, 256, 128, device=device, dtype=dtype)
    k = torch.empty(1, 2, 256, 128, device=device, dtype=dtype)
    request = Request(q, k, k, Gate(), 128**-0.5, True, TileShape(), True, 0, None, False, False)
    reasons = {name: reason_against(module, request) for name, module in ATTENTION.items()}
    rounded = replace(request, scores="int8")
    return [
        {
            "name": name,
            "available": reason is None,
            "reason": reason,
            "int8_scores": reason or reason_against(ATTENTION[name], rounded) or "yes",
        }
        for name, reason in reasons.items()
    ]


def baselines() -> list[dict]:
    """Attention libraries that `bsfa profile` measures against where they are installed: {name, version, reason}."""
    from .timing import flash_attention, skip_softmax
    from .timing.libraries import Library

    found = {name: flash_attention.find(name) for name in flash_attention.MODULES} | {
        skip_softmax.NAME: skip_softmax.find()
    }
    return [
        {"name": name, "version": library.version, "reason": None}
        if isinstance(library, Library)
        else {"name": name, "version": None, "reason": library}
        for name, library in found.items()
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache
def commit(root: Path = ROOT) -> str | None:
    """The commit of a checkout, by default of the one this package runs from, with `+` when the tree differs from it;
    None for a folder that is none.
    """
    if not (root / ".git").exists():
        return None
    head = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head and head + ("+" if changed else "")


@cache
def _driver() -> str | None:
    with suppress(OSError):
        found = re.search(r"Kernel Module.*? (\d+(?:\.\d+)+) ", Path(DRIVER).read_text())
        if found:
            return found[1]
    # A container may hide the file; the program asks every GPU, which takes tenths of a second and more.
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0].strip() if lines else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _dotted_cudnn(version: int | None) -> str | None:
    return None if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"
