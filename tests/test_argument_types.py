"""Arguments of the runtime's functions that are None, of a wrong type or out of range: one sentence that names them."""

import inspect

import numpy
import pytest
import torch
from bsfa_kernels import (
    BlockLists,
    Gate,
    TileShape,
    block_sparse_attention,
    explain,
    make_spans,
    tile_statistics,
)

Q, K = torch.randn(1, 2, 70, 16), torch.randn(1, 1, 140, 16)
CALLS = {
    block_sparse_attention: dict(q=Q, k=K, v=K),
    tile_statistics: dict(q=Q, k=K, lse=torch.zeros(1, 2, 70)),
    make_spans: dict(batch=2),
    TileShape: {},
    Gate: {},
    BlockLists: dict(
        indices=torch.zeros(1, 2, 2, 1, dtype=torch.int32), counts=torch.zeros(1, 2, 2, dtype=torch.int32)
    ),
}
PAST_INT = (2**31, 2**63, 2**70)
TENSOR, NUMBERS = torch.zeros(2), (1.5, *PAST_INT)
WRONG = (None, "x", float("nan"), -1, *NUMBERS, [1], object(), {}, TENSOR)
# Those of WRONG that are right, by argument.
RIGHT = {
    **dict.fromkeys(("spans", "block_table", "out", "packed", "blocks", "window"), (None,)),
    "sinks": (None, TENSOR), "scale": (None, *NUMBERS), "softcap": (None, *NUMBERS), "lengths": (None, -1),
    "k_offset": (-1,), "absolute": (None, -1, *NUMBERS, TENSOR), "gap": (None, -1, *NUMBERS, TENSOR),
    "batch": PAST_INT,  # as many as memory holds
}  # fmt: skip


def right(function, name, value) -> bool:
    allowed = RIGHT.get(name, ())
    if function is make_spans and name == "q_offset":
        allowed = (-1,)
    return any(value is each for each in allowed)


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_what_is_no_argument_is_refused_by_its_name(function):
    for name in inspect.signature(function).parameters:
        for value in WRONG if name != "device" else ():
            if right(function, name, value):
                continue
            with pytest.raises((TypeError, ValueError)) as refused:
                function(**CALLS[function] | {name: value})
            said = str(refused.value)
            words = {"q_offset": ("q_offset", "queries end before"), "packed": ("packed", "pages begin")}.get(
                name, (name,)
            )
            assert said and "\n" not in said and any(word in said for word in words), (name, value, said)
            assert "Expected" not in said and "not supported" not in said and refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (dict(gate=None), TypeError, "gate must be a Gate, got NoneType"),
        (dict(gate=-4.0), TypeError, "gate must be a Gate, got float"),
        (dict(backend=None), TypeError, "backend must be a name, got NoneType"),
        (dict(causal=None), TypeError, "causal must be True or False, got NoneType"),
        (dict(keep_sink=0), TypeError, "keep_sink must be True or False, got int"),
        (dict(blocks=[[0]]), TypeError, "blocks must be BlockLists or None, got list"),
        (dict(tile=(64, 128)), TypeError, "tile must be a TileShape, got tuple"),
        (dict(q_offset=1.5), TypeError, "q_offset must be a whole number, got float"),
        (dict(q_offset=torch.tensor(1.5)), TypeError, "q_offset must be a whole number, got Tensor"),
        (dict(q_offset=numpy.float32(1.5)), TypeError, "q_offset must be a whole number, got float32"),
        (dict(scale=torch.tensor(1j)), TypeError, "scale must be a number or None, got Tensor"),
        (dict(packed=[0]), TypeError, "packed must be what pack() gives, got list"),
        (dict(window=1 << 31), ValueError,
         "window must be at most 2,147,483,647 keys, got 2,147,483,648; None is for all"),
        (dict(window=True), ValueError, "window must be a positive number of keys, got True"),
        (dict(scale=1e39), ValueError, "scale must be positive and finite in float32, got 1e+39"),
        (dict(softcap=1e-46), ValueError, "softcap must be positive and finite in float32, got 1e-46"),
        (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    ],
)  # fmt: skip
def test_the_sentence(arguments, error, said):
    with pytest.raises(error) as refused:
        block_sparse_attention(Q, K, K, **arguments)
    assert str(refused.value) == said
    if error is TypeError and "packed" not in arguments:
        with pytest.raises(TypeError) as refused:
            explain(Q, K, K, **arguments)
        assert str(refused.value) == said


def test_an_offset_may_be_a_number_of_any_kind_that_is_whole():
    wanted = block_sparse_attention(Q, K, K, q_offset=3).out
    for offset in (numpy.int64(3), torch.tensor(3), torch.tensor([3])):
        assert torch.equal(block_sparse_attention(Q, K, K, q_offset=offset).out, wanted)


@pytest.mark.parametrize("name", "qkv")
def test_explain_names_what_lacks_an_axis(name):
    with pytest.raises(ValueError, match=rf"^{name} must have 4 axes .*, got shape \[2, 70, 16\]$"):
        explain(**dict(q=Q, k=K, v=K) | {name: Q[0]})


def test_numbers_past_float32_and_tiles_past_int32_are_refused():
    for number in (1e39, -1e300, 10**400):
        with pytest.raises(ValueError, match="^gate 'gap' must be a number .*, got one that float32 does not hold$"):
            Gate(gap=number)
    with pytest.raises(ValueError, match=r"^tile rows must be a positive number below 2\^31, got 2147483648$"):
        TileShape(2**31)
    with pytest.raises(ValueError, match="^lengths must lie within 2,147,483,647 of 0, got 4294967296$"):
        make_spans(1, lengths=1 << 32)
    with pytest.raises(ValueError, match=r"^q_offset must be one number or \[2\], got \[3\]$"):
        make_spans(2, torch.zeros(3, dtype=torch.int64))


def test_what_was_wrong_elsewhere_is_said_as_it_is(monkeypatch):
    """A failure of a right call keeps its own words, and Python's own about a call that is none."""
    monkeypatch.setattr(
        "bsfa_kernels.blocked.visit", lambda *arguments: (_ for _ in ()).throw(RuntimeError("out of it"))
    )
    with pytest.raises(RuntimeError, match="^out of it$"):
        block_sparse_attention(Q, K, K, scale=torch.tensor(0.25), backend="torch")
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        block_sparse_attention(Q, K, K, casual=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'v'"):
        block_sparse_attention(Q, K)
