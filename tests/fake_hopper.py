"""A GPU that is none: Triton compiles for it, and a driver remembers what it was asked to run."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import triton
from bsfa_kernels import hopper, int8, int8_kernel, schedule, shortcut
from triton.backends.compiler import GPUTarget

ROOM = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
IGNORED = 9  # a launcher's arguments before the kernel's: grid, stream, function, metadata and hooks

PREPARATION = (int8_kernel.sum_keys, int8_kernel.quantise_keys, int8_kernel.quantise_queries)


class Driver:
    """An H100 that remembers what it was asked to run: `loaded` kernels by name, `launched` (name, grid, arguments)."""

    def __init__(self):
        self.loaded, self.launched = [], []
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: ROOM, unload_module=lambda module: None
        )

    def _load(self, name, kernel, shared, device):
        self.loaded.append(name)
        return 1, 2, 128, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, *rest):
            self.launched.append((source.fn.__name__, (x, y, z), rest[IGNORED - 3 :]))

        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def pretend(monkeypatch) -> Driver:
    """The hopper backend takes tensors of the CPU, and remembers nothing of other tests."""
    monkeypatch.setattr(hopper, "unsupported", lambda request: None)
    monkeypatch.setattr(hopper, "device_guard", lambda x: nullcontext())
    monkeypatch.setattr(shortcut, "plans", {})
    monkeypatch.setattr(int8, "device_guard", lambda x: nullcontext())
    for launches in (hopper.launches, schedule.launches, *PREPARATION):
        monkeypatch.setattr(launches, "kernels", {})
        monkeypatch.setattr(launches.function, "device_caches", defaultdict(launches.function.create_binder))
    fake = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    return fake


class Function:
    """A JIT function that compiles nothing: what its front end, and what its compiled kernels were called with."""

    def __init__(self, kernels: bool = True):
        self.front_end, self.by_hand, self.kernels = [], [], kernels

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.front_end.append((grid, arguments))
            return Kernel(self) if self.kernels else None

        return run


class Kernel:
    def __init__(self, function: Function):
        self.function = function

    def __getitem__(self, grid):
        return lambda *arguments: self.function.by_hand.append((grid, arguments))
