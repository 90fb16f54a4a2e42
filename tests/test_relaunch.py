"""Triton's own launcher on a CUDA driver that is none (libcuda.c): a bare launch hands the GPU what Triton's does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from bsfa_kernels import (
    BlockLists,
    Gate,
    TileShape,
    block_sparse_attention,
    hopper,
    int8,
    make_spans,
    relaunch,
    schedule,
    shortcut,
)
from bsfa_kernels.request import Request
from fake_hopper import ROOM, Function, Kernel, pretend

HERE = Path(__file__).parent
SIZES = {"i32": 4, "i64": 8, "fp32": 4}


@pytest.fixture(scope="module")
def libcuda(tmp_path_factory):
    """The library, loaded under the name of CUDA's."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None or not headers.exists() or torch.cuda.is_available():
        pytest.skip("needs a C compiler with Python's headers, and a machine without a GPU")
    folder = tmp_path_factory.mktemp("cuda")
    path = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-w", "-shared", "-fPIC", HERE / "libcuda.c", "-o", path, f"-Wl,-soname,{path.name}"], check=True
    )
    library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    library.parameter.restype = ctypes.POINTER(ctypes.c_uint8)
    library.folder = str(folder)
    return library


@pytest.fixture
def gpu(libcuda, monkeypatch):
    """Triton's launcher and its functions in C, on that library."""
    from triton.backends.nvidia import driver

    monkeypatch.setattr(triton.knobs.nvidia, "libcuda_path", libcuda.folder)
    driver.libcuda_dirs.cache_clear(), driver.library_dirs.cache_clear()
    fake, real = pretend(monkeypatch), driver.CudaUtils()
    ours = dict(load_binary=fake._load, get_device_properties=lambda device: ROOM)
    fake.utils = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if name[0] != "_"} | ours)
    fake.launcher_cls = driver.CudaLauncher
    libcuda.expect(0, None)  # of launches that nobody looks at
    yield libcuda
    driver.libcuda_dirs.cache_clear(), driver.library_dirs.cache_clear()


def parameters(library, kernel, launch) -> list[bytes]:
    """What the GPU is given by a launch, and the grid."""
    sizes = []
    for kind in kernel.src.signature.values():
        if kind != "constexpr" and not isinstance(kind, tuple):
            rank = kind.count(",") and kind[: kind.index("]")].count(",") + 1
            sizes += [128, *[4] * rank, *[8] * rank] if kind.startswith("tensordesc") else [SIZES.get(kind, 8)]
    library.expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
    launch()
    return [bytes(library.parameter(i)[:n]) for i, n in enumerate([*sizes, 24])]


def given_both_ways(gpu, monkeypatch, launch, arguments) -> list[bytes]:
    """What the GPU is given by a bare launch, and the same by Triton's."""
    assert launch.bare is not None
    bare = parameters(gpu, launch.kernel, lambda: launch(*arguments))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "bare", None)
        assert parameters(gpu, launch.kernel, lambda: launch(*arguments)) == bare
    return bare


@torch.no_grad()
def test_a_bare_launch_gives_the_gpu_what_tritons_own_launcher_gives_it(gpu, monkeypatch):
    q, k, v = (torch.randn(1, 200, heads, 64).bfloat16().transpose(1, 2) for heads in (4, 2, 2))
    gate, lists = Gate(gap=torch.zeros(4, 4)), BlockLists.from_mask(torch.ones(1, 4, 4, 2, dtype=torch.bool))
    for _ in range(2):
        block_sparse_attention(q, k, v, gate, blocks=lists, backend="hopper")
    [again] = shortcut.plans.values()
    [streams] = schedule.launches.kernels.values()
    [attention] = hopper.launches.kernels.values()
    assert again.launch.kernel is attention.kernel
    addresses = [16 * i for i in range(1, 17)]
    indices, *rest = (x * 16 for x in range(1, 8))
    launches = [
        (again.launch, ((3, 2, 1), (q, k, v), *addresses, *again.plan.numbers)),
        (streams, ((5, 1, 4), (), indices, rest[0], None, *rest[2:], *again.lists.numbers)),
    ]
    for launch, arguments in launches:
        bare = given_both_ways(gpu, monkeypatch, launch, arguments)
        assert int.from_bytes(bare[-1][:4], "little") == arguments[0][0] and len(set(bare)) > 10
        if arguments[1]:
            assert int.from_bytes(bare[0][:8], "little") == q.data_ptr()


@pytest.mark.parametrize("shifted", [False, True])
def test_so_does_one_of_the_preparation(gpu, monkeypatch, shifted):
    q, k = (torch.randn(1, 200, heads, 64).bfloat16().transpose(1, 2) for heads in (4, 2))
    spans = make_spans(1) if shifted else None
    request = Request(q, k, k, Gate(), 1.0, True, TileShape(), True, 0, spans, shifted, False, scores="int8")
    int8.prepare(request)
    again = int8.plan_of(request).again()
    addresses = [16 * i for i in range(1, 11)]
    for place in (2, 9):  # of spans and q_shift
        addresses[place] = addresses[place] if shifted else None
    for launch, step, own in zip(again.compiled, again.plan.steps, int8._pointers(*addresses), strict=True):
        bare = given_both_ways(gpu, monkeypatch, launch, (step.grid, (), *own, *step.numbers))
        pointers = [int.from_bytes(x, "little") for x in bare[: sum(x is not None for x in own)]]
        assert pointers == [x for x in own if x is not None]


def test_a_kernel_with_a_hook_and_an_unknown_one_are_launched_by_triton(monkeypatch):
    function, bare, grid = Function(), [], (1, 1, 1)
    launch = relaunch.Relaunch(Kernel(function))
    launch(grid, (), 5)
    assert launch.bare is None and function.by_hand == [(grid, (5,))]
    launch.bare = lambda *arguments: bare.append(arguments)
    launch(grid, (), 6)
    assert bare == [(grid, (), (6,))]
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        launch(grid, (), 7)
    finally:
        hook.remove(print)
    assert len(bare) == 1 and function.by_hand[1:] == [(grid, (7,))]
