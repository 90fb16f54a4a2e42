"""Whole prompts that no gate judges: our kernel where it is known to be faster than PyTorch's attention, else that."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels.integrations import plan as planner
from bsfa_kernels.integrations.plan import LONG, MANY_ROWS, NO_THRESHOLDS, Call, Route, Step

ROOT = Path(__file__).parents[1]
PYTORCH = ("cuDNN", "FlashAttention-2", "efficient")


def tensor(heads: int, rows: int, head_dim: int = 128, device: str = "cuda:0", requires_grad=False) -> SimpleNamespace:
    return SimpleNamespace(
        is_cuda=device != "cpu", device=torch.device(device), dtype=torch.bfloat16, shape=(1, heads, rows, head_dim),
        requires_grad=requires_grad,
    )  # fmt: skip


def route(q, k, *, causal=True, backend="hopper", monkeypatch) -> Route:
    monkeypatch.setattr(planner, "fused", lambda *_: (backend, ""))
    step = planner.plan(Call(q, k, k, causal, False, False, None, None, False), None)
    assert step == Step(step.route, NO_THRESHOLDS, True)
    return step.route


def test_a_long_prompt_without_thresholds_runs_on_the_hopper_kernel(monkeypatch):
    q, k = tensor(32, LONG), tensor(8, LONG)
    assert route(q, k, monkeypatch=monkeypatch) is Route.KEPT
    assert route(q, tensor(8, 2 * LONG), causal=False, monkeypatch=monkeypatch) is Route.KEPT
    for other in (
        dict(q=tensor(32, LONG - 1), k=tensor(8, LONG - 1)),
        dict(q=tensor(MANY_ROWS // LONG - 1, LONG), k=tensor(1, LONG)),
        dict(q=tensor(32, LONG, device="cpu"), k=tensor(8, LONG, device="cpu")),
        dict(q=tensor(32, LONG, 256), k=tensor(8, LONG, 256)),
        dict(q=q, k=tensor(8, LONG, requires_grad=True)),  # our kernel has no backward pass
        dict(q=q, k=k, backend="triton"),
        dict(q=q, k=k, backend=None),
        dict(q=tensor(32, 1), k=tensor(8, 8 * LONG), causal=False),  # a decoding step
    ):
        assert route(**other, monkeypatch=monkeypatch) is Route.LIBRARY
    with torch.no_grad():
        assert route(q, tensor(8, LONG, requires_grad=True), monkeypatch=monkeypatch) is Route.KEPT


def test_every_call_of_a_module_that_is_not_causal_is_planned_as_its_first(monkeypatch):
    from bsfa_kernels.integrations import transformers

    module = torch.nn.Module().eval()
    planned, calls = [], []

    def plan(call, handler):
        planned.append(call.q.shape[2])
        return Step(Route.KEPT if call.q.shape[2] >= 8 else Route.LIBRARY, NO_THRESHOLDS, True)

    def keep(q, k, v, **options):
        calls.append(q.shape[2])
        return q

    monkeypatch.setattr(transformers, "LONG", 8)
    monkeypatch.setattr(transformers, "plan", plan)
    monkeypatch.setattr(transformers, "keep_every_tile", keep)
    for rows in (7, 7, 8, 8):
        q = torch.randn(1, 2, rows, 16)
        transformers.attention(module, q, q, q, None, is_causal=False)
    assert planned == [7, 8, 8] and calls == [8, 8]


def test_it_is_faster_wherever_both_were_measured():
    shares, fewest = [], []
    for file in (ROOT / "profiles" / "results").glob("*.nvidia-h200.json"):
        for cell in json.loads(file.read_text()).get("cells", []):
            times = {row["name"]: row.get("ms_median") for row in cell.get("contenders", [])}
            ours, theirs = times.get("bsfa, skipping compiled out"), [times[name] for name in PYTORCH if name in times]
            narrow = theirs and (cell["shape"].get("v_head_dim") or cell["shape"]["head_dim"]) <= planner.WIDEST_AHEAD
            if ours and narrow and cell["backend"] == "hopper":
                shares.append(ours / min(theirs))
                fewest.append((cell["length"], cell["length"] * cell["shape"]["heads"]))
    assert len(shares) > 20
    words = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % of cuDNN"
    assert max(shares) < 1 and words in planner._faster_than_library.__doc__.replace("\n    ", " ")
    assert words in (ROOT / "docs" / "serving.md").read_text()
    assert min(length for length, _ in fewest) == LONG and min(rows for _, rows in fewest) == MANY_ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_it_gives_what_the_library_gives(causal):
    from bsfa_kernels import backends
    from bsfa_kernels.integrations import dense
    from bsfa_kernels.integrations.transformers import keep_every_tile

    q, k, v = (torch.randn(1, heads, LONG, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    if backends.fused(q.device, q.dtype, 128, 128, 64, 128)[0] != "hopper":
        pytest.skip("needs a Hopper GPU")
    assert planner.plan(Call(q, k, v, causal, False, False, None, None, False), None).route is Route.KEPT
    ours = keep_every_tile(q, k, v, scale=128**-0.5, causal=causal, spans=None).float()
    theirs = dense.library(q, k, v, scale=128**-0.5, causal=causal).float()
    assert (ours - theirs).norm() < 4e-3 * theirs.norm()
