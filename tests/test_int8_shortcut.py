"""int8 calls of a known signature: the shortcut launches what the long way launches, on buffers of each call's own."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton
from bsfa_kernels import (
    BlockLists,
    Gate,
    api,
    block_sparse_attention,
    hopper,
    int8,
    make_spans,
    quantise,
    schedule,
    shortcut,
)
from bsfa_kernels.request import Request
from bsfa_kernels.tiles import TileShape
from fake_hopper import PREPARATION, Function, pretend

B, T, H, KV = 2, 320, 8, 2
GAP = torch.full((H, T // 64), -3.0)
BOTH = Gate(absolute=GAP.clone(), gap=GAP)
MADE = {"k8_ptr", "k_scale_ptr", "mean_ptr", "q8_ptr", "q_scale_ptr", "q_shift_ptr", "sums_ptr"}


def tensor(heads, columns=128, rows=T):
    return torch.randn(B, rows, heads, columns).bfloat16().transpose(1, 2)


def heads_of(columns, heads=H, kv_heads=KV, **more):
    return dict(q=tensor(heads, columns), k=tensor(kv_heads, columns), v=tensor(kv_heads, columns), **more)


def lists():
    shape = (B, H, T // 64)
    return BlockLists(torch.zeros(*shape, 2, dtype=torch.int32), torch.ones(*shape, dtype=torch.int32))


CASES = {
    "no-gate": dict(gate=Gate()),
    "gap": dict(),
    "both-gates": dict(gate=BOTH),
    "logsumexp": dict(return_lse=True),
    "counts": dict(return_counts=True),
    "sinks": dict(sinks=torch.zeros(H)),
    "window": dict(window=100),
    "not-causal": dict(causal=False),
    "keys-in-front": dict(q_offset=64, k=tensor(KV, rows=384), v=tensor(KV, rows=384)),
    "no-groups": heads_of(128, 2, 2, gate=Gate()),
    "64": heads_of(64),
    "72": heads_of(72),
    "192": heads_of(192),
    "256": heads_of(256),
    "64-both-gates": heads_of(64, gate=BOTH),
    "256-spans": heads_of(256, spans=make_spans(B), gate=Gate()),
    "narrow-v": dict(v=tensor(KV, 64)),
    "spans": dict(spans=make_spans(B), gate=Gate()),
    "spans-both-gates": dict(spans=make_spans(B), gate=Gate(absolute=torch.zeros(H), gap=torch.zeros(H))),
    "lists": dict(blocks=lists()),
    "lists-counted": dict(blocks=lists(), gate=BOTH, return_counts=True),
    "out": dict(out=torch.empty(B, H, T, 128, dtype=torch.bfloat16)),
    "heads-first": dict(q=tensor(H).contiguous(), k=tensor(KV).contiguous(), v=tensor(KV).contiguous()),
    "parts-of-one": dict(zip("qkv", tensor(H + 2 * KV).split([H, KV, KV], 1), strict=True)),
    "strides-no-descriptor-takes": dict(q=tensor(H, 131)[..., :128], k=tensor(KV, 129)[..., :128]),
}


@pytest.fixture
def log(monkeypatch):
    """Launches: [(kernel's argument names, grid, arguments, options or None where compiled before)]."""
    pretend(monkeypatch)
    taken = []

    class Recorded(Function):
        def __init__(self, function):
            super().__init__()
            self.__name__, self.arg_names = function.__name__, function.arg_names
            self.by_hand = self  # of fake_hopper.Kernel

        def append(self, launch):
            taken.append((self.__name__, self.arg_names, *launch, "by hand"))

        def __getitem__(self, grid):
            launch = super().__getitem__(grid)

            def run(*arguments, **options):
                taken.append((self.__name__, self.arg_names, grid, arguments, "front end"))
                return launch(*arguments, **options)

            return run

    for launches in (hopper.launches, schedule.launches, *PREPARATION):
        monkeypatch.setattr(launches, "function", Recorded(launches.function))
    with torch.no_grad():
        yield taken


def call(**changes):
    base = dict(q=Q, k=K, v=V, gate=Gate(gap=GAP), scores="int8", backend="hopper")
    return block_sparse_attention(**base | changes)


Q, K, V = tensor(H), tensor(KV), tensor(KV)


def launched(log, **changes):
    """Of a call, kernel by kernel: (name, grid, arguments by name), addresses by whose they are."""
    log.clear()
    result = call(**changes)
    given = dict(q=Q, k=K, v=V, gate=Gate(gap=GAP)) | changes
    gate = given["gate"]
    given |= dict(absolute=gate.absolute, gap=gate.gap)
    owners = {x.data_ptr(): name for name, x in given.items() if isinstance(x, torch.Tensor) and name != "out"}
    said, how = [], set()
    for kernel, names, grid, arguments, way in log:
        how.add(way)
        own = {}
        for name, x in zip(names, arguments, strict=True):
            if name.endswith("_desc"):
                owner = owners.get(x.base.data_ptr())
                own[name] = (owner, tuple(x.shape), tuple(x.strides), x.block_shape, x.layout, x.base.dtype)
            elif name.endswith("_ptr") and x is not None:
                address = x if isinstance(x, int) else x.data_ptr()
                if name in MADE and address not in owners and kernel != "forward":
                    owners[address] = f"made: {name}"
                own[name] = owners.get(address, "new")
            else:
                own[name] = x
        said.append((kernel, (*grid, 1)[:3], own))
    shapes = [None if x is None else (x.shape, x.stride(), x.dtype) for x in result]
    return how, said, shapes


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_shortcut_launches_what_the_long_way_launches(log, monkeypatch, changes):
    ways, long_way = [], api._long_way
    monkeypatch.setattr(api, "_long_way", lambda *arguments: ways.append(1) or long_way(*arguments))
    how, said, shapes = launched(log, **changes)
    assert how == {"front end"} and ways == [1]
    for _ in range(2):
        assert launched(log, **changes) == ({"by hand"}, said, shapes)
    assert ways == [1]
    names = [kernel for kernel, _, _ in said]
    made = ["_sum_keys", "_quantise_keys", "_quantise_queries"]
    assert names == [*made, *["_schedule"] * ("blocks" in changes), "forward"]
    sums, keys, queries, forward = (said[i][2] for i in (0, 1, 2, -1))
    shifted = bool(changes.keys() & {"return_lse", "sinks"}) or changes.get("gate", Gate()).absolute is not None
    assert queries["q_shift_ptr"] == ("made: q_shift_ptr" if shifted else None)
    assert forward["q_shift_ptr"] == (queries["q_shift_ptr"] or "new")
    assert forward["q_scale_ptr"] == "made: q_scale_ptr" and forward["k_scale_ptr"] == "made: k_scale_ptr"
    assert [forward[f"{x}_desc"][0] for x in "qkv"] == ["made: q8_ptr", "made: k8_ptr", "v"]
    assert keys["sums_ptr"] == sums["sums_ptr"] == "made: sums_ptr" and queries["mean_ptr"] == keys["mean_ptr"]
    assert (sums["k_ptr"], keys["k_ptr"], queries["q_ptr"]) == ("k", "k", "q")


def test_every_call_prepares_on_buffers_of_its_own(log, monkeypatch):
    call(), log.clear()
    kept, allocate = [], int8.Plan.allocate

    def keep(self, device):
        kept.append(allocate(self, device))  # alive, so that the next call cannot have the same
        return kept[-1]

    monkeypatch.setattr(int8.Plan, "allocate", keep)
    call(), call()
    [again] = shortcut.plans.values()
    made = []
    for (q8, k8, memory), first in zip(kept, (0, 4), strict=True):
        addresses = {}
        for _, names, _, arguments, way in log[first : first + 3]:
            assert way == "by hand"
            addresses |= {name: x for name, x in zip(names, arguments, strict=True) if name in MADE}
        places = [x if x is None else memory.as_strided(*x).data_ptr() for x in again.rounding.plan.parts]
        names = ("sums_ptr", "mean_ptr", "q_scale_ptr", "k_scale_ptr", "q_shift_ptr")
        assert addresses == dict(zip(names, places, strict=True), q8_ptr=q8.data_ptr(), k8_ptr=k8.data_ptr())
        made.append(set(addresses.values()) - {None})
    assert len(made[0]) == len(made[1]) == 6 and not made[0] & made[1]


def request(q, k, spans, shifted, keys=128):
    return Request(q, k, k, Gate(), 1.0, True, TileShape(64, keys), True, 0, spans, shifted, False, scores="int8")


@pytest.mark.parametrize("spans, shifted", list(product([False, True], repeat=2)))
@pytest.mark.parametrize("columns", [64, 72, 128, 192, 256])
def test_parts_of_the_memory_lie_apart_and_begin_on_cache_lines(columns, spans, shifted):
    q, k = tensor(4, columns, 333), tensor(2, columns, 333)
    plan = int8.plan_of(request(q, k, make_spans(B) if spans else None, shifted))
    made, sums = plan.new("cpu")
    q8, k8 = made.q8, made.k8
    wide = quantise.columns(columns)
    assert q8.shape == (2, 4, 333, wide) and k8.shape == (2, 2, 333, wide) and q8.is_contiguous() and k8.is_contiguous()
    assert made.mean.shape == (2, 2, columns) and made.q_scale.shape == (2, 4, 333)
    assert made.k_scale.shape == (2, 2, 3 + spans) and (made.q_shift is not None) == shifted
    parts = [x for x in (sums, made.mean, made.q_scale, made.k_scale, made.q_shift) if x is not None]
    end = 0
    for x in parts:
        begin = x.storage_offset()
        assert x.is_contiguous() and begin % int8.LINE == 0 and begin >= end
        end = begin + x.numel()
    assert end <= plan.floats == sums.untyped_storage().nbytes() // 4


def test_a_key_says_all_that_triton_makes_another_kernel_for(monkeypatch):
    """Calls of one key are of one specialization; nothing compiles."""
    pretend(monkeypatch)
    kernels, asked = {}, []

    def hook(key, fn, **rest):
        asked.append((fn.name, str(key)))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    room = torch.zeros(1 << 22, dtype=torch.bfloat16)
    found = set()
    shapes = [(1, 1), (2, 4), (3, 3)]
    rows = [(1, 128), (8, 64), (200, 128), (333, 256), (333, 72)]
    for (batch, heads), (n, columns), last in product(shapes, rows, (0, 1, 8, 16)):
        wide = columns + last
        strides = [(n * heads * wide, n * wide, wide, 1), (n * heads * wide, wide, heads * wide, 1), (0, 1, wide, 1)]
        for stride in strides:
            x = room.as_strided((batch, heads, n, columns), stride)
            for spans, shifted, keys in product((None, make_spans(batch)), (False, True), (64, 128)):
                call = request(x, x, spans, shifted, keys)
                asked.clear()
                int8.prepare(call)
                for step, specialization in zip(int8.plan_of(call).steps, asked, strict=True):
                    assert kernels.setdefault((step.launches, step.key), specialization) == specialization
                    found.add(specialization)
    assert len(found) > 60 and len(found) > len(kernels) // 2  # and hardly any is kept more than once


@pytest.mark.parametrize("stride", [1, 2, 16, 24, 2**31 - 16, 2**31, 2**31 + 8])
def test_strides_are_told_apart_as_triton_does(stride):
    assert int8.specialised(stride) == (stride % 16 == 0, stride == 1, stride < 2**31)


def test_calls_whose_preparation_was_never_compiled_have_no_plan(log, monkeypatch):
    monkeypatch.setattr(PREPARATION[1].function, "kernels", False)
    for _ in range(2):
        assert launched(log)[1][-1][0] == "forward"
    assert list(shortcut.plans.values()) == [shortcut.nothing]


def test_queries_that_begin_elsewhere_take_the_long_way(log):
    room = torch.zeros(Q.numel() + 8, dtype=torch.bfloat16)
    ways = [launched(log, q=room.as_strided(Q.shape, Q.stride(), at))[0] for at in (0, 0, 8, 1)]
    assert ways == [{"front end"}, {"by hand"}, {"by hand"}, {"front end", "by hand"}]
