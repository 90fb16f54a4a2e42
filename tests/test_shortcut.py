"""The shortcut of calls whose signature was served before: the kernel is given what the long way gives it, nothing is
remembered but by signature, and whoever looks at operators still sees them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import (
    BlockLists,
    Gate,
    TileShape,
    api,
    block_sparse_attention,
    hopper,
    make_spans,
    pack,
    schedule,
    shortcut,
)
from fake_hopper import Function, pretend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

B, T, H, KV, D = 2, 256, 8, 2, 128
POINTERS = range(3, 19)  # among the kernel's arguments


def tensor(heads, rows=T, columns=D, dtype=torch.bfloat16):
    return torch.randn(B, rows, heads, columns).to(dtype).transpose(1, 2)


Q, K, V = tensor(H), tensor(KV), tensor(KV)
GAP = torch.full((H, 4), -3.0)
CACHE = [tensor(KV, 128) for _ in range(2)]  # two pages
TABLE = torch.zeros(B, 2, dtype=torch.int32)
PACKED = pack([0, 200], [200, 56], [256, 200])
BASE = dict(q=Q, k=K, v=V, gate=Gate(gap=GAP))


def lists(capacity=2, tiles=T // 64):
    return BlockLists(torch.zeros(B, H, tiles, capacity, dtype=torch.int32), torch.ones(B, H, tiles, dtype=torch.int32))


CHANGES = {
    "dtype": dict(q=Q.half(), k=K.half(), v=V.half()),
    "queries": dict(q=tensor(H, 320), k=tensor(KV, 320), v=tensor(KV, 320)),
    "keys": dict(k=tensor(KV, 384), v=tensor(KV, 384)),
    "batch": dict(q=Q[:1], k=K[:1], v=V[:1]),
    "heads": dict(q=Q[:, :4], gate=Gate(gap=GAP[:4].clone())),
    "kv-heads": dict(k=K[:, :1], v=V[:, :1]),
    "values": dict(v=tensor(KV, columns=64)),
    "strides-of-q": dict(q=Q.contiguous()),
    "strides-of-k": dict(k=K.contiguous()),
    "strides-of-v": dict(v=V.contiguous()),
    "no-gate": dict(gate=Gate()),
    "absolute": dict(gate=Gate(absolute=GAP)),
    "both-gates": dict(gate=Gate(absolute=GAP, gap=GAP.clone())),
    "columns": dict(gate=Gate(gap=torch.full((H, 5), -3.0))),
    "one-column": dict(gate=Gate(gap=torch.full((H,), -3.0))),
    "spans": dict(spans=make_spans(B)),
    "spans-to-read": dict(spans=make_spans(B), return_lse=True, return_counts=True),
    "lists": dict(blocks=lists()),
    "longer-lists": dict(blocks=lists(3)),
    "lists-counted": dict(blocks=lists(), return_counts=True),
    "lists-spans": dict(blocks=lists(tiles=T // 64 + 1), spans=make_spans(B)),
    "sinks": dict(sinks=torch.zeros(H)),
    "sinks-of-another-dtype": dict(sinks=torch.nn.Parameter(torch.zeros(H, dtype=torch.bfloat16))),
    "out": dict(out=torch.empty(B, T, H, D, dtype=torch.bfloat16).transpose(1, 2)),
    "wider-out": dict(out=torch.empty(B, T, H + 1, D, dtype=torch.bfloat16)[:, :, :H].transpose(1, 2)),
    "scale": dict(scale=0.5),
    "not-causal": dict(causal=False),
    "q-offset": dict(q_offset=64, k=tensor(KV, 320), v=tensor(KV, 320)),
    "tile": dict(tile=TileShape(128, 128)),
    "no-sink": dict(keep_sink=False),
    "window": dict(window=100),
    "longer-window": dict(window=101),
    "softcap": dict(softcap=5.0),
    "larger-softcap": dict(softcap=6.0),
    "logsumexp": dict(return_lse=True),
    "counts": dict(return_counts=True),
    "backend": dict(backend="auto"),
    "pages": dict(k=CACHE[0], v=CACHE[1], block_table=TABLE),
    "row-of-pages": dict(k=CACHE[0], v=CACHE[1], block_table=torch.zeros(B, 3, dtype=torch.int32)[:, :2]),
    "packed": dict(
        q=tensor(H)[:1], k=CACHE[0], v=CACHE[1], block_table=TABLE, packed=PACKED, out=torch.zeros_like(Q[:1])
    ),
}  # fmt: skip


@pytest.fixture
def kernel(monkeypatch):
    """Stands for the compiled kernel: what it was launched with."""
    pretend(monkeypatch)
    function = Function()
    monkeypatch.setattr(hopper.launches, "function", function)
    monkeypatch.setattr(schedule.launches, "function", Function())
    return function


@pytest.fixture
def long_ways(monkeypatch):
    """Calls that took the long way."""
    taken, long_way = [], api._long_way
    monkeypatch.setattr(api, "_long_way", lambda *arguments: taken.append(arguments) or long_way(*arguments))
    return taken


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def call(**changes):
    return block_sparse_attention(**dict(backend="hopper") | BASE | changes)


def launched(kernel, **changes):
    """(grid, arguments) of a call, tensors by the names of those that were given, "new" for others, and the result."""
    kernel.front_end.clear(), kernel.by_hand.clear()
    given = BASE | changes
    result = call(**changes)
    gate, packed = given["gate"], given.get("packed")
    flat = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
    flat |= dict(absolute=gate.absolute, gap=gate.gap)
    if packed is not None:
        flat |= dict(table=packed.table, spans=packed.spans)
    names = {x.data_ptr(): name for name, x in flat.items() if x is not None}
    [(grid, arguments)] = kernel.front_end + kernel.by_hand

    def name(x, place):
        if hasattr(x, "block_shape"):
            return names[x.base.data_ptr()], tuple(x.shape), tuple(x.strides), x.block_shape, x.layout
        if place not in POINTERS:
            return x
        found = names.get(x if isinstance(x, int) else x.data_ptr(), "new")
        return found if place == 3 or found != "out" else "new"  # any address serves where nothing is read

    said = [None if x is None else (x.shape, x.stride(), x.dtype) for x in result]
    return grid, [name(x, place) for place, x in enumerate(arguments)], said


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_one_thing_is_another_signature_and_the_kernel_is_given_the_same_both_ways(
    kernel, long_ways, change
):
    first = launched(kernel)
    assert launched(kernel) == first and len(long_ways) == 1
    changed = launched(kernel, **change)
    assert len(long_ways) == 2 and len(shortcut.plans) == 2
    assert launched(kernel, **change) == changed and launched(kernel) == first
    assert len(long_ways) == 2


def test_addresses_are_looked_at_in_every_call(kernel, long_ways):
    room = torch.zeros(Q.numel() + 8, dtype=torch.bfloat16)
    for offset in (0, 0, 8, 4, 1, 0):
        q = room.as_strided(Q.shape, Q.stride(), offset)
        grid, (described, *_), _ = launched(kernel, q=q) if offset % 8 == 0 else (0, [("copied",)], 0)
        assert offset % 8 or described[0] == "q"
        if offset % 8:
            call(q=q)
    assert len(long_ways) == 3
    gap = torch.zeros(H * 4 + 1)[1:].view(H, 4)
    call(gate=Gate(gap=gap))
    assert len(long_ways) == 4


def test_an_output_that_lies_in_the_queries_is_copied(kernel, long_ways):
    both = torch.zeros(B, T, 2 * H, D, dtype=torch.bfloat16).transpose(1, 2)
    for out in (torch.zeros_like(both)[:, H:], both[:, H:]):
        for _ in range(2):
            call(q=both[:, :H], out=out)
    assert len(long_ways) == 3  # the first, and both of the last


def test_autograd_knows_that_an_output_was_written(kernel, long_ways):
    with torch.enable_grad():
        x = torch.ones_like(Q).requires_grad_()
        kept = x.exp()  # which its backward pass reads
    for ways in (1, 1):
        version = kept._version
        call(out=kept)
        assert kept._version > version and len(long_ways) == ways
    with torch.enable_grad(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
    with torch.inference_mode():
        for _ in range(2):
            call(out=torch.empty_like(Q))


def test_values_are_never_remembered(kernel, long_ways):
    scale = torch.tensor(0.5)
    scales = []
    for value in (0.5, 0.5, 0.25):
        scale.fill_(value)
        scales.append(launched(kernel, scale=scale)[1][19])
        call(gate=Gate(gap=-3.0 - value))
    assert scales == [0.5, 0.5, 0.25] and len(long_ways) == 6
    assert not shortcut.plans  # which would keep the tensor


def test_numbers_are_of_the_same_type_both_ways(kernel, long_ways):
    both = [launched(kernel, scale=1, softcap=5)[1][19:21] for _ in range(2)]
    assert both[0] == both[1] == [1.0, 5.0] and len(long_ways) == 1
    assert {type(number) for numbers in both for number in numbers} == {float}


@pytest.mark.parametrize("known", [False, True])
def test_a_class_of_ones_own_is_asked_in_every_call(kernel, long_ways, known):
    class Twice(Gate):
        def expanded(self, heads, device):
            return Gate(gap=self.gap * 2)

    class Alike:
        absolute, gap, expanded = None, GAP, Twice(gap=GAP).expanded

    class Lists(BlockLists):
        pass

    for changes in (dict(gate=Twice(gap=GAP)), dict(gate=Alike()), dict(blocks=Lists(*lists().__dict__.values()))):
        if known:
            call(), call(blocks=lists())
        for _ in range(2):
            call(**changes)
        assert len(long_ways) == 2 * known + 2
        long_ways.clear(), shortcut.plans.clear()


@pytest.mark.parametrize(
    "changes",
    [
        dict(q_offset=0.0),
        dict(q_offset="0"),
        dict(scores=["exact"]),
        dict(packed=(PACKED.table, *PACKED[1:]), block_table=TABLE, k=CACHE[0], v=CACHE[1], q=Q[:1]),
        dict(packed=PACKED, spans=PACKED.spans, block_table=TABLE, k=CACHE[0], v=CACHE[1], q=Q[:1]),
        dict(packed=([0], [1]), block_table=TABLE, k=CACHE[0], v=CACHE[1], q=Q[:1]),
        dict(q=Q.float()),
        dict(q=Q.to_sparse()),
        dict(gate=GAP),
        dict(tile=None),
        dict(q=[1.0]),
        dict(window=0),
        dict(softcap=float("nan")),
        dict(q=Q[0]),
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_is_refused_is_refused_behind_a_call_that_was_served(kernel, changes):
    good = dict(packed=PACKED, block_table=TABLE, k=CACHE[0], v=CACHE[1], q=Q[:1]) if "packed" in changes else {}
    with pytest.raises(Exception) as before:
        call(**changes)
    for _ in range(2):
        call(**good)
    with pytest.raises(type(before.value)) as behind:
        call(**changes)
    assert str(behind.value) == str(before.value)


def test_few_queries_are_not_remembered(kernel):
    call(q=Q[:, :, :63])
    assert not shortcut.plans


SMALL_PAGES = [tensor(KV, 64) for _ in range(2)]
NO_PLAN = {
    "strides-no-descriptor-takes": dict(q=torch.empty(B, T, H, D + 1, dtype=Q.dtype)[..., :D].transpose(1, 2)),
    "output-no-wide-store-reaches": dict(out=torch.empty(B, T, H, D + 1, dtype=Q.dtype)[..., :D].transpose(1, 2)),
    "every-other-element-of-an-output": dict(out=torch.empty(B, H, T, 2 * D, dtype=Q.dtype)[..., ::2]),
    "strided-spans": dict(spans=make_spans(B).t().contiguous().t()),
    "strided-gate": dict(gate=Gate(gap=torch.zeros(4, H).mT)),
    "strided-lists": dict(blocks=BlockLists(lists(4).indices[..., ::2], lists().counts)),
    "small-pages": dict(k=SMALL_PAGES[0], v=SMALL_PAGES[1], block_table=TABLE.repeat(1, 2)),
}


@pytest.mark.parametrize("change", NO_PLAN.values(), ids=NO_PLAN)
def test_calls_that_need_more_than_a_launch_have_no_plan(kernel, monkeypatch, change):
    class Any(dict):
        def get(self, key):
            return SimpleNamespace(kernel=None)

    monkeypatch.setattr(api, "_long_way", lambda *arguments: None)  # as if it had been served
    monkeypatch.setattr(hopper.launches, "kernels", Any())
    call(), call(**change)
    plan, none = shortcut.plans.values()
    assert plan is not shortcut.nothing and none is shortcut.nothing


def test_padding_is_filled_and_rows_of_no_sequence_stay(kernel):
    out = torch.empty_like(Q)
    for changes in (dict(), dict(out=out)):
        for _ in range(2):
            out.fill_(7.0)
            result = call(spans=make_spans(B), return_lse=True, return_counts=True, **changes)
        assert not result.out.any() and result.lse.eq(-torch.inf).all()
        assert not result.kept.any() and not result.candidates.any()
    packed = CHANGES["packed"]
    packed["out"].fill_(7.0)
    for _ in range(2):
        assert call(**packed).out.eq(7.0).all()


def test_memory_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(shortcut, "MOST", 3)
    for window in range(1, 9):
        call(window=window)
        assert len(shortcut.plans) <= 3


def test_devices_and_dispatch_keys_are_part_of_a_signature(monkeypatch):
    def signature(q):
        return shortcut.find(q, K, V, Gate(), *[None] * 6, TileShape(), ())[0]

    found = {signature(x) for x in (Q, torch._neg_view(Q), torch.nn.Parameter(Q))}
    assert len(found) == 3 and None not in found
    monkeypatch.setattr(shortcut, "_dispatch_keys", lambda x: SimpleNamespace(raw_repr=lambda: 0))  # of one kind
    assert signature(Q) != signature(torch.empty_strided(Q.shape, Q.stride(), dtype=Q.dtype, device="meta"))


def test_negated_and_foreign_tensors_take_the_long_way(kernel, long_ways):
    class Mine(torch.Tensor):
        pass

    for x in (torch._neg_view(Q), Q.as_subclass(Mine)):
        for _ in range(2):
            call(q=x)
    assert len(long_ways) == 4


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        SEEN.append(operator)
        return operator(*arguments, **options or {})


class Listen(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        SEEN.append(function)
        return function(*arguments, **options or {})


SEEN = []


@pytest.mark.parametrize("mode", [Watch, Listen])
def test_modes_see_the_operator(kernel, mode):
    for _ in range(2):
        call()
    SEEN.clear()
    with mode():
        call()
        call(out=torch.empty_like(Q))
    assert torch.ops.bsfa.attend.default in SEEN and torch.ops.bsfa.attend_into.default in SEEN


def test_fake_tensors_profilers_and_compilers_see_the_operator(kernel):
    for _ in range(2):
        call()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert type(call(q=mode.from_tensor(Q)).out) is not torch.Tensor
        assert type(call().out) is not torch.Tensor
    with torch.profiler.profile() as profile:
        call()
    assert "bsfa::attend" in {event.key for event in profile.key_averages()}
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda q: call(q=q).out + 1, fullgraph=True, backend=keep)(Q)
    assert torch.ops.bsfa.attend.default in [node.target for node in graphs[0].graph.nodes]
    torch._dynamo.reset()


def test_transforms_tracing_compiling_and_gradients_close_it(monkeypatch):
    opened = []

    def look(x):
        opened.append(shortcut.is_open())
        return x * 2

    look(Q), torch.vmap(look)(Q)
    with torch.inference_mode():
        look(Q)
    with torch.enable_grad():
        look(Q)
        torch.func.grad(lambda x: look(x).sum())(Q.float())
        torch.jit.trace(look, Q, check_trace=False)
    assert opened == [True, False, True, False, False, False]
    monkeypatch.setattr(shortcut, "_compiling_callback", lambda: look)  # in a frame that torch.compile gave up
    assert not shortcut.is_open()


def test_tensors_that_require_gradients_still_refuse_a_backward_pass(kernel):
    q = Q.clone().requires_grad_()
    for _ in range(2):
        call(q=q)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="no backward pass"):
        call(q=q).out.float().sum().backward()
