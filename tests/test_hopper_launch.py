"""What the hopper backend hands to the GPU: Triton compiles, and a fake driver takes the calls."""

from __future__ import annotations

import pytest
import torch
from bsfa_kernels import BlockLists, Gate, block_sparse_attention, hopper, make_spans, split_kv
from bsfa_kernels.launch import Launches
from fake_hopper import Function, pretend
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction


@pytest.fixture
def gpu(monkeypatch):
    return pretend(monkeypatch)


def call(length: int, columns: int, head_dim: int = 128, mask: torch.Tensor | None = None):
    q, k = (torch.randn(2, heads, length, head_dim, dtype=torch.bfloat16) for heads in (8, 2))
    gate = Gate(gap=torch.full((8, columns), -3.0))
    blocks = None if mask is None else BlockLists.from_mask(mask)
    return block_sparse_attention(q, k, k, gate, backend="hopper", blocks=blocks, return_counts=True)


@pytest.fixture
def front_end(monkeypatch):
    """The calls that Triton's front end serves: [kernel name]."""
    seen, run = [], JITFunction.run

    def watched(self, *arguments, **options):
        seen.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", watched)
    return seen


def test_one_kernel_serves_every_length_and_threshold(gpu, front_end):
    for length, columns in ((192, 3), (1000, 16), (4099, 1)):
        result = call(length, columns)
        assert result.out.shape == (2, 8, length, 128) and result.kept.shape == (2, 8, -(-length // 64))
    assert gpu.loaded == ["forward"] and front_end == ["forward"]
    assert [grid for _, grid, _ in gpu.launched] == [(8, 1, 2), (8, 6, 2), (8, 22, 2)]
    for _, _, arguments in gpu.launched:
        q, k, v = arguments[:3]
        for descriptor, rows in ((q, 64), (k, 128), (v, 128)):
            block = [1, 1, rows, 128]
            assert isinstance(descriptor, TensorDescriptor) and descriptor.block_shape == block
            assert descriptor.layout == gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)


def test_the_output_is_written_by_its_strides(gpu):
    q = torch.randn(1, 4, 200, 64, dtype=torch.bfloat16)
    names = hopper.forward.arg_names
    tokens = torch.zeros(300, 6, 64, dtype=torch.bfloat16)
    out = tokens[20:220, :4].transpose(0, 1)[None]
    for place in (None, out):
        block_sparse_attention(q, q, q, backend="hopper", out=place)
        given = dict(zip(names, gpu.launched[-1][2], strict=False))
        row = (4 if place is None else 6) * 64
        assert [given[name] * 8 for name in ("out_head", "out_row")] == [64, row]
        assert place is None or given["out_ptr"].data_ptr() == place.data_ptr()
    assert gpu.loaded == ["forward"]  # other strides, the same kernel


def test_an_output_that_wide_stores_do_not_reach_is_copied(gpu):
    q = torch.randn(1, 4, 200, 64, dtype=torch.bfloat16)
    out = torch.zeros(200 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 4, 200, 64)
    block_sparse_attention(q, q, q, backend="hopper", out=out)
    given = dict(zip(hopper.forward.arg_names, gpu.launched[-1][2], strict=False))
    assert given["out_ptr"].data_ptr() % 16 == 0 and given["out_row"] * 8 == 64


def test_pages_are_described_as_they_lie(gpu):
    q = torch.randn(2, 4, 200, 64, dtype=torch.bfloat16)
    cache = torch.randn(2, 9, 128, 2, 64, dtype=torch.bfloat16)
    table = torch.tensor([[7, 3, 1], [4, 4, 0]], dtype=torch.int32)
    k, v = (x.transpose(1, 2) for x in cache)
    block_sparse_attention(q, k, v, backend="hopper", block_table=table[:, :2], q_offset=56)
    given = dict(zip(hopper.forward.arg_names, gpu.launched[-1][2], strict=False))
    for name, x in (("k_desc", k), ("v_desc", v)):
        assert given[name].base.data_ptr() == x.data_ptr() and list(given[name].strides) == list(x.stride())
        assert given[name].block_shape == [1, 1, 128, 64] and list(given[name].shape) == [9, 2, 128, 64]
    assert given["table_ptr"].data_ptr() == table.data_ptr() and given["table_row"] == 3
    assert given["k_rows"] == 256 and gpu.launched[-1][1] == (4, 2, 2)


def test_block_lists_are_scheduled_first(gpu, front_end):
    mask = torch.rand(2, 8, 16, 8) < 0.5
    for _ in range(2):
        call(1000, 16, head_dim=64, mask=mask)
    assert front_end == ["_schedule", "forward"]
    for (first, streams, lists), (second, grid, arguments) in (gpu.launched[:2], gpu.launched[2:]):
        assert (first, second) == ("_schedule", "forward") and streams[:2] == (16, 6) and grid == (8, 6, 2)
        assert arguments[0].block_shape == [1, 1, 64, 64]
        assert [type(x) for x in lists] == [type(x) for x in gpu.launched[0][2]]
        assert [type(x) for x in arguments[3:]] == [type(x) for x in gpu.launched[1][2][3:]]
    for mine, checked in zip(gpu.launched[3][2][:3], gpu.launched[1][2][:3], strict=True):
        assert vars(mine).keys() == vars(checked).keys() and mine.layout == checked.layout
        assert (mine.shape, mine.strides, mine.padding) == (checked.shape, checked.strides, checked.padding)


def test_what_makes_another_kernel_is_seen_by_the_front_end(gpu, monkeypatch):
    function = Function()
    monkeypatch.setattr(hopper.launches, "function", function)
    q, k = (torch.randn(2, heads, 200, 128, dtype=torch.bfloat16) for heads in (8, 2))
    gap = torch.full((8, 5), -3.0)
    calls = [
        dict(),
        dict(q=q.half(), k=k.half(), v=k.half()),
        dict(v=k[..., :64]),
        dict(q=q[:, :4], gate=Gate()),
        dict(causal=False),
        dict(keep_sink=False),
        dict(window=100),
        dict(softcap=5.0),
        dict(sinks=torch.zeros(8)),
        dict(spans=make_spans(2)),
        dict(gate=Gate(absolute=gap)),
    ]
    for options in calls:
        for _ in range(2):
            block_sparse_attention(**dict(q=q, k=k, v=k, gate=Gate(gap=gap), backend="hopper") | options)
    assert len(function.front_end) == len(function.by_hand) == len(calls)


@torch.no_grad()
def test_strides_that_int32_does_not_hold_are_left_to_the_front_end(gpu, monkeypatch):
    """Launched by hand, a kernel compiled for int32 would be given their low half (Triton 3.7)."""
    function = Function()
    monkeypatch.setattr(hopper.launches, "function", function)
    q, out = (torch.zeros(1, 4, 200, 64, dtype=torch.bfloat16) for _ in range(2))
    for stride in (2**34 - 8, 2**34, 2**34 - 8, 2**34):
        for _ in range(2):
            place = out.as_strided(out.shape, (stride, *out.stride()[1:]))
            block_sparse_attention(q, q, q, backend="hopper", out=place)
    at = hopper.forward.arg_names.index("out_batch")
    assert [arguments[at] for _, arguments in function.front_end] == [2**31 - 1, 2**31, 2**31, 2**31, 2**31]
    assert [arguments[at] for _, arguments in function.by_hand] == [2**31 - 1] * 3


@pytest.mark.parametrize("given, name", [("q", "q_batch"), ("k", "k_batch"), ("v", "v_batch"), ("out", "out_batch")])
def test_so_are_those_of_few_queries(monkeypatch, given, name):
    for reason in ("unreachable", "wide_products"):
        monkeypatch.setattr(split_kv, reason, lambda _: None)
    functions = []
    for launches in (split_kv.first, split_kv.second):
        functions.append(Function())
        monkeypatch.setattr(launches, "function", functions[-1]), monkeypatch.setattr(launches, "kernels", {})
    tensors = dict(zip("qkv", torch.zeros(3, 1, 2, 640, 64).bfloat16(), strict=True))
    tensors |= dict(q=tensors["q"][:, :, :8], out=torch.zeros(1, 2, 8, 64).bfloat16())
    x = tensors[given]
    for stride in (2**34 - 8, 2**34, 2**34 - 8):
        tensors[given] = x.as_strided(x.shape, (stride, *x.stride()[1:]))
        block_sparse_attention(**tensors, backend="split_kv", causal=False)
    for function, kernel in zip(functions, (split_kv.attend, split_kv.combine), strict=True):
        assert len(function.front_end) == 2 and len(function.by_hand) == 1
        if name in kernel.arg_names:
            at = kernel.arg_names.index(name)
            assert [a[at] for _, a in (*function.front_end, *function.by_hand)] == [2**31 - 1, 2**31, 2**31 - 1]


def test_addresses_that_are_no_multiples_of_16_are_left_to_the_front_end():
    function = Function()
    launches, even = Launches(function), torch.zeros(64)
    assert even.data_ptr() % 16 == 0
    for x in (even[1:], even, even[2:], even[4:], even):
        launches.of("key", (None, x))((1, 2, 3), x, 5, num_warps=4)
    assert [arguments[0].data_ptr() % 16 for _, arguments in function.front_end] == [4, 0, 8]
    assert [arguments[0].data_ptr() % 16 for _, arguments in function.by_hand] == [0, 0]
    assert function.by_hand[0][0] == (1, 2, 3) and function.by_hand[0][1][1:] == (5,)


def test_a_triton_whose_kernels_cannot_be_launched_by_hand_keeps_its_front_end():
    function = Function(kernels=False)
    for _ in range(2):
        Launches(function).of("key", ())((1, 1, 1), 5)
    assert len(function.front_end) == 2


def test_kernels_of_this_triton_can_be_launched_by_hand():
    """Where not, calls take a fifth more of the host's time: see launch.Launches."""
    assert hasattr(CompiledKernel, "__getitem__")
