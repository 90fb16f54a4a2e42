"""Calls of few queries on many keys, without a GPU: who serves them, and into how many programs they are divided."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import Gate, TileShape, backends, devices
from bsfa_kernels.integrations import plan as planner
from bsfa_kernels.integrations.plan import FEW, Call, Route, few_queries
from bsfa_kernels.request import Request

split_kv = pytest.importorskip("bsfa_kernels.split_kv", reason="needs Triton")
CUDA, COUNTED = torch.device("cuda:0"), devices._processors
MEASURED = Path(__file__).parents[1] / "profiles" / "results" / "checks" / "short-calls.nvidia-h200.json"


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    monkeypatch.setattr(devices, "_processors", lambda device: 132)
    monkeypatch.setattr(planner, "fused", lambda *_: ("hopper", ""))


def tensor(*shape: int) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, device=CUDA, dtype=torch.bfloat16, shape=shape)


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "few"),
    [
        (64, 8192, 32, True),
        (128, 8192, 32, True),
        (261, 131072, 32, True),
        (262, 131072, 32, False),
        (205, 8192, 32, False),  # fewer than 40 keys to a query
        (64, 2559, 32, False),
        (8, 1023, 32, False),  # few keys
        (64, 8192, 32 * 5, False),  # five sequences fill the GPU by themselves
    ],
)
def test_a_gate_is_left_out_where_it_would_cost_time(rows, keys, heads, few):
    assert few_queries(rows, keys, heads, CUDA) is few
    assert not few_queries(rows, keys, heads, torch.device("cpu"))
    handler = SimpleNamespace(least_rows=min(rows, 64), fused_tile=TileShape(), knows_scoring=True)
    q, k = tensor(1, heads, rows, 128), tensor(1, 8, keys, 128)
    call = Call(q, k, k, True, True, False, None, None, False)
    step = planner.plan(call, handler)
    assert step == ((Route.KEPT, FEW, True) if few else (Route.GATED, None, True))
    # Of a narrow window, of an image's tokens, and of what a handler of one's own serves, nothing was measured.
    for other in (call._replace(window=500), call._replace(groups=True)):
        assert planner.plan(other, handler).route is Route.GATED
    handler.fused_tile = None
    assert planner.plan(call, handler).route is Route.GATED


def test_a_compiled_model_does_not_trace_how_large_its_gpu_is(monkeypatch):
    def properties(device):
        torch._dynamo.graph_break()
        return SimpleNamespace(multi_processor_count=132)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(devices, "_processors", COUNTED)
    COUNTED.cache_clear()

    @partial(torch.compile, backend="eager", fullgraph=True)
    def layer(x):
        return x + few_queries(x.shape[0], 8192, 32, CUDA)

    assert layer(torch.zeros(64)).sum() == 64
    COUNTED.cache_clear()


def request(rows: int, keys: int, batch: int = 1, heads: int = 32, **options) -> Request:
    q, k = tensor(batch, heads, rows, 128), tensor(batch, 8, keys, 128)
    return Request(q, k, k, Gate(), 1.0, True, TileShape(), True, keys - rows, None, False, False, **options)


@pytest.mark.parametrize(
    ("call", "suits"),
    [
        (request(1, 8192), True),
        (request(63, 8192), True),
        (request(320, 8192), True),
        (request(512, 8192), False),  # two thirds of the GPU are busy
        (request(1, 1023), False),
        (request(2048, 2048, heads=8), False),  # few heads, but not many keys to a query
        (request(1, 8192, batch=64), True),  # all of it, but with 63 of 64 rows for nothing
        (request(64, 8192, batch=8), False),
    ],
)
def test_which_calls_are_split(call, suits):
    assert split_kv.suits(call) is suits
    assert backends._suits("split_kv", call) is suits and backends._suits("hopper", call)


def test_what_is_chosen_is_what_took_less_time():
    stored = json.loads(MEASURED.read_text())
    heads, kv_heads, head_dim = stored["shape"]
    assert (heads, kv_heads, head_dim) == (32, 8, 128) and len(stored["cells"]) == 31
    for cell in stored["cells"]:
        rows, keys, batch = cell["rows"], cell["keys"], cell["batch"]
        ms = {row["name"]: row["ms_median"] for row in cell["contenders"]}
        found = request(rows, keys, batch)
        assert split_kv.suits(found) is (cell["backend"] == "split_kv")
        assert ms["bsfa, no gate"] < 1.002 * ms["bsfa, no gate, hopper"]
        if "bsfa, gate" in ms:
            few = few_queries(rows, keys, batch * heads, CUDA)
            cost = ms["bsfa, no gate"] / ms["bsfa, gate"] if few else ms["bsfa, gate"] / ms["bsfa, no gate"]
            assert cost < (1.06 if (batch, rows, keys) == (4, 64, 32768) else 1)


def test_as_few_splits_as_fill_the_gpu():
    shape = split_kv.shape_of(4, torch.bfloat16, 128, 128, True)
    assert split_kv.divide(4, 8, 131072, shape, 132) == (1, 15)  # 120 programs of 132
    assert split_kv.divide(4, 8, 1024, shape, 132) == (1, 4)  # no less than 256 keys each
    assert split_kv.divide(4, 8, 100, shape, 132) == (1, 1)
    assert split_kv.divide(4, 1024, 131072, shape, 132) == (1, 1)
    wide = split_kv.shape_of(256, torch.bfloat16, 128, 128, True)
    assert split_kv.divide(256, 8, 131072, wide, 132) == (2, 8)
    for programs in (1, 7, 40, 100, 131, 133):
        splits = split_kv.fewest_splits(programs, 128, 132)
        assert programs * splits / (-(-programs * splits // 132) * 132) > 0.8


def test_which_calls_may_hold_a_query_tile():
    for rows, offset, may in ((63, 0, False), (64, 0, True), (64, 1, False), (126, 1, False), (127, 1, True)):
        q = tensor(1, 2, rows, 128)
        asked = Request(q, q, q, Gate(), 1.0, True, TileShape(), True, offset, None, False, False)
        assert asked.may_hold_tiles is may
        assert Request(
            q, q, q, Gate(), 1.0, True, TileShape(), True, 0, torch.zeros(1, 4), False, False
        ).may_hold_tiles is (rows >= 64)
