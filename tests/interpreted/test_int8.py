"""int8 scores on the Triton kernels in the interpreter: the preparation, and attention against the reference."""

from dataclasses import replace

import pytest
import torch
import whole_tiles
from bsfa_kernels import Gate, TileShape, int8, make_spans, portable, quantise
from bsfa_kernels.request import Request
from kernel_cases import Case, check, check_sliding, check_statistics
from triton.runtime import interpreter
from whole_tiles import Prompt

WIDE, TALL = TileShape(16, 32), TileShape(32, 16)


def request(q, k, spans=None, keys=32, shifted=True) -> Request:
    return Request(q, k, k, Gate(), 1.0, True, TileShape(16, keys), True, 0, spans, shifted, False, scores="int8")


def drawn(rows: int, keys: int, head_dim: int, dtype=torch.float32, batch=1, whole_numbers=False):
    """[B, H, T, D] views of [B, T, H, D], keys with a mean; as whole numbers every sum is exact, whatever its order."""
    generator = torch.Generator().manual_seed(head_dim)
    shapes = (batch, rows, 2, head_dim), (batch, keys, 1, head_dim)
    q, k = (torch.randn(shape, generator=generator) * 3 for shape in shapes)
    if whole_numbers:
        q, k = q.round(), k.round()
    return q.transpose(1, 2).to(dtype), (k + 2).transpose(1, 2).to(dtype)


def agree(made, specified) -> None:
    """Scales to rounding, integers to one step where a value stands at a half."""
    for name in ("q_scale", "k_scale", "mean", "q_shift"):
        torch.testing.assert_close(getattr(made, name), getattr(specified, name), rtol=2e-6, atol=1e-4, equal_nan=True)
    for name in ("q8", "k8"):
        apart = (getattr(made, name).int() - getattr(specified, name).int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, name


@pytest.mark.parametrize(
    "head_dim, dtype", [(8, torch.float32), (40, torch.float16), (128, torch.float16), (160, torch.float32)]
)
def test_preparation(head_dim, dtype):
    q, k = drawn(70, 50, head_dim, dtype)
    agree(int8.prepare(request(q, k)), quantise.prepare(request(q, k)))


def test_preparation_has_the_same_bits_where_sums_are_exact():
    """A mean of whole numbers over a power of two of keys has an exact float32, as all that follows does."""
    q, k = drawn(33, 64, 64, whole_numbers=True)
    made, specified = int8.prepare(request(q, k)), quantise.prepare(request(q, k))
    for name in made._fields:
        assert torch.equal(getattr(made, name), getattr(specified, name)), name


@pytest.mark.parametrize("keys", [16, 128])
def test_preparation_of_padded_and_of_sliding_sequences(keys):
    """Left and right padding, keys that a cache no longer holds, and a sequence without keys."""
    q, k = drawn(40, 150, 16, batch=4)
    offsets, lengths = torch.tensor([-7, 0, 70, -150]), torch.tensor([143, 111, 2**31 - 1, 0])
    for b, padding in enumerate((slice(0, 7), slice(111, None), slice(0, 0), slice(None))):
        k[b, :, padding] = torch.nan
    spans = make_spans(4, offsets.clamp(min=0), offsets, lengths)
    call = replace(request(q, k, spans, keys), window=1)
    made, specified = (prepare(call) for prepare in (int8.prepare, quantise.prepare))
    specified.k8[0, :, :7], specified.k8[3] = made.k8[0, :, :7], made.k8[3]  # rows of no tile are not written
    agree(made, specified)
    assert made.k_scale.isfinite().all() and made.mean.isfinite().all()


@pytest.mark.parametrize(("tile", "first"), [(WIDE, 51), (TALL, 41)], ids=str)
def test_no_scale_is_read_in_front_of_the_first(tile, first, monkeypatch):
    """Key tiles that a sliding cache no longer holds have none, and a query tile may visit some. What is read for them
    is masked, so only the addresses tell.
    """
    scales, read = [], []

    def prepare(request):
        made = int8.prepare(request)
        memory = torch.full((64 + made.k_scale.numel(),), torch.nan)
        scales.append(memory[64:].view(made.k_scale.shape).copy_(made.k_scale))
        return made._replace(k_scale=scales[-1])

    load = interpreter.InterpreterBuilder.create_masked_load

    def noted(self, pointers, mask, *rest, **named):
        read.extend(pointers.data[mask.data].ravel().tolist())
        return load(self, pointers, mask, *rest, **named)

    monkeypatch.setattr(portable, "prepare", prepare)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", noted)
    check_sliding("triton", tile, 20, first, scores="int8")
    [own] = scales
    begin, end = own.data_ptr(), own.data_ptr() + own.nbytes
    assert any(begin <= address < end for address in read)
    assert not any(own.untyped_storage().data_ptr() <= address < begin for address in read)


def test_what_is_not_finite_makes_its_own_scale_nan_and_zeros_give_zero():
    q, k = drawn(20, 100, 64)
    q[0, 0, 3, 5], q[0, 1, 4, 0], q[0, 0, 7] = torch.nan, torch.inf, 0
    k[0, 0, 40, 1] = -torch.inf
    k[0, 0, 96:] = k[0, 0, 96:97]
    k[0, 0, :96, :] -= k[0, 0, :96].nan_to_num(neginf=0).mean(0) - k[0, 0, 96]  # the mean is the last tile's key
    made, specified = int8.prepare(request(q, k)), quantise.prepare(request(q, k))
    agree(made, specified)
    rows = made.q_scale.isnan().nonzero().tolist()
    assert rows == [[0, 0, 3], [0, 1, 4]] and made.k_scale[0, 0].isnan().tolist() == [False, True, False, False]
    assert made.q_scale[0, 0, 7] == 0 and made.q8[0, 0, 7].abs().max() == 0
    assert made.q8[0, 0, 3].abs().max() == 0 and made.k8[0, 0, 32:64].abs().max() == 0


def test_any_layout_gives_the_same_bits():
    q, k = drawn(20, 50, 40)
    expected = int8.prepare(request(q.contiguous(), k.contiguous()))
    padded = [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in (q, k)]
    for layout in ((q, k), padded, (q, k.expand(1, 2, -1, -1)[:, :1])):
        for made, wanted in zip(int8.prepare(request(*layout)), expected, strict=True):
            assert torch.equal(made, wanted)


def test_the_shift_is_made_only_where_something_sees_it():
    assert int8.prepare(request(*drawn(20, 50, 40), shifted=False)).q_shift is None


CASES = [
    *(Case(1, 2, 1, 90, 90, 16, WIDE, True, gate) for gate in ("", "both")),
    Case(1, 2, 1, 70, 90, 40, TALL, False, "both"),
    Case(3, 2, 1, 40, 60, 16, WIDE, True, "both", padded=True),
    Case(3, 1, 1, 40, 40, 16, TALL, False, "gap", padded=True, softcap=2.0),
    Case(1, 2, 1, 40, 101, 16, WIDE, True, "gap", q_offset=61, keep_sink=False),
    Case(1, 2, 1, 70, 70, 16, WIDE, True, "absolute", window=40, sinks=True),
    Case(1, 2, 1, 90, 90, 16, WIDE, True, "gap", blocks="shuffled"),
    Case(1, 1, 1, 1, 1, 16, WIDE),
    Case(1, 2, 1, 70, 70, 48, WIDE, True, "gap", v_head_dim=16),
    Case(1, 1, 1, 200, 200, 96, TileShape(64, 128), gate="gap", dtype=torch.float16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    check(case, "triton", scores="int8")


@pytest.mark.parametrize("padded", (False, True))
def test_statistics(padded):
    case = Case(2, 2, 1, 40, 70, 16, WIDE, True, q_offset=0 if padded else 30, padded=padded)
    check_statistics(case, "triton", scores="int8")


def test_nan_scores_are_kept():
    whole_tiles.nan_scores_are_kept(Prompt("triton", WIDE, length=100, scores="int8"), whole_tiles.DROP_ALL)
