"""Keys and values out of pages, and outputs into a place that is given: what a serving engine asks of the runtime."""

import paged_cases
import pytest
import torch
from bsfa_kernels import Gate, block_sparse_attention, pack
from bsfa_kernels.pages import gather_pages


@pytest.mark.parametrize("case", paged_cases.CASES)
def test_positions_come_from_their_pages(case):
    paged_cases.check(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", paged_cases.CASES)
def test_positions_come_from_their_pages_on_a_gpu(case):
    paged_cases.check(case, "cuda")


CACHE = torch.zeros(4, 2, 16, 8)
TABLE = torch.zeros(3, dtype=torch.int32)
FP8 = CACHE.to(torch.float8_e4m3fn)
REFUSED = {
    "shapes": ((CACHE, CACHE[:2], TABLE, 9), {}, "alike"),
    "axes": ((CACHE[0], CACHE[0], TABLE, 9), {}, "alike"),
    "dtypes": ((CACHE, CACHE.half(), TABLE, 9), {}, "one dtype"),
    "strides": ((CACHE.transpose(2, 3), CACHE.transpose(2, 3), TABLE, 4), {}, "contiguous"),
    "too long": ((CACHE, CACHE, TABLE, 49), {}, "49 positions do not fit 3 pages of 16"),
    "nothing": ((CACHE, CACHE, TABLE, 0), {}, "0 positions"),
    "table": ((CACHE, CACHE, TABLE[None], 9), {}, "block_table must be"),
    "table's dtype": ((CACHE, CACHE, TABLE.float(), 9), {}, "block_table must be"),
    "no scale": ((FP8, FP8, TABLE, 9), {"dtype": torch.float16}, "key_scale"),
    "no dtype": ((FP8, FP8, TABLE, 9), dict.fromkeys(("key_scale", "value_scale"), torch.ones(1)), "needs dtype"),
    "integers": ((CACHE.to(torch.uint8),) * 2 + (TABLE, 9), {}, "must hold floats"),
    "scale": ((CACHE, CACHE, TABLE, 9), {"key_scale": torch.ones(2)}, "one float32"),
}


@pytest.mark.parametrize("arguments, options, words", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        gather_pages(*arguments, **options)


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 70, 16, generator=generator) for heads in (4, 2, 2)]


def test_the_output_goes_where_it_is_wanted():
    q, k, v = tensors()
    gate = Gate(gap=0.5)
    expected = block_sparse_attention(q, k, v, gate, return_lse=True)
    tokens = torch.full((100, 4, 16), torch.nan)
    out = tokens[10:80].transpose(0, 1)[None]
    found = block_sparse_attention(q, k, v, gate, return_lse=True, out=out)
    assert found.out is out and torch.equal(out, expected.out) and torch.equal(found.lse, expected.lse)
    assert torch.equal(tokens[10:80], expected.out[0].transpose(0, 1))
    assert tokens[:10].isnan().all() and tokens[80:].isnan().all()


def test_the_output_may_be_where_the_queries_are():
    q, k, v = tensors()
    expected = block_sparse_attention(q, k, v).out
    assert torch.equal(block_sparse_attention(q, k, v, out=q).out, expected)


@pytest.mark.parametrize("strides", [(0, 0, 16, 1), (0, 1120, 8, 1), (0, 16, 16, 1)], ids=["heads", "rows", "both"])
def test_two_elements_in_one_place_are_refused(strides):
    out = torch.empty(1, 4, 70, 16).as_strided((1, 4, 70, 16), strides)
    with pytest.raises(ValueError, match="out has more than one element in one place: shape \\[1, 4, 70, 16\\]"):
        block_sparse_attention(*tensors(), out=out)


@pytest.mark.parametrize("number", [-1, 5])
@pytest.mark.parametrize("packed", [None, pack([0], [20], [28])], ids=["one", "packed"])
def test_pages_that_a_cache_on_a_cpu_lacks_are_refused(number, packed):
    q, k, v = tensors()
    k, v = (x.view(1, 2, 5, 14, 16)[0].transpose(0, 1) for x in (k, v))
    table = torch.tensor([[0, number]], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"block_table must name pages 0 to 4, got {number}"):
        block_sparse_attention(q, k, v, block_table=table, packed=packed)


def test_packed_keys_that_their_tables_do_not_hold_are_refused():
    q, k, v = tensors()
    k, v = (x.view(1, 2, 5, 14, 16)[0].transpose(0, 1) for x in (k, v))
    table = torch.tensor([[0, 2]], dtype=torch.int32)
    with pytest.raises(ValueError, match="up to 29 keys, but a row of block_table holds 2 pages of 14"):
        block_sparse_attention(q, k, v, block_table=table, packed=pack([0], [20], [29]))


@pytest.mark.parametrize(
    ("batch", "words"),
    [(([0, 1], [1], [1]), "2 starts, 1 rows and 1 lengths"), (([0], [1], [2**31]), "before row and key 2,147,483,647")],
)
def test_batches_that_cannot_be_packed_are_refused(batch, words):
    with pytest.raises(ValueError, match=words):
        pack(*batch)


def test_gradients_through_a_given_place_are_refused():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="out= does not support gradients"):
        block_sparse_attention(q.requires_grad_(), k, v, out=torch.empty(1, 4, 70, 16))
    with torch.no_grad():
        block_sparse_attention(q, k, v, out=torch.empty(1, 4, 70, 16))


def test_packed_sequences_written_over_their_queries_leave_the_rest_alone():
    q, k, v = tensors()
    k, v = (x.view(1, 2, 5, 14, 16)[0].transpose(0, 1) for x in (k, v))
    where = dict(
        block_table=torch.tensor([[0, 2], [4, 3]], dtype=torch.int32), packed=pack([3, 30], [20, 25], [28, 25])
    )
    expected, was = block_sparse_attention(q, k, v, **where).out, q.clone()
    inside = expected.abs().amax((0, 1, 3)) > 0
    assert inside.nonzero()[:, 0].tolist() == [*range(3, 23), *range(30, 55)]
    block_sparse_attention(q, k, v, out=q, **where)
    assert torch.equal(q, torch.where(inside[:, None], expected, was))


@pytest.mark.parametrize(
    "out", [torch.empty(1, 4, 71, 16), torch.empty(1, 4, 70, 16, dtype=torch.float16)], ids=["rows", "dtype"]
)
def test_a_place_that_does_not_fit_is_refused(out):
    with pytest.raises(ValueError, match="out must be torch.float32 \\[1, 4, 70, 16\\] on cpu"):
        block_sparse_attention(*tensors(), out=out)


@pytest.mark.parametrize(
    "options",
    [{"block_table": [[0, 1]]}, {"block_table": [[0, 1]], "packed": pack([0], [20], [28])}, {"out": "here"},
     {"spans": (0, 0, 70, 70)}, {"sinks": [0.0] * 4}],
    ids=["block_table", "packed block_table", "out", "spans", "sinks"],
)  # fmt: skip
def test_what_is_no_tensor_is_refused_by_its_name(options):
    name, value = next(iter(options.items()))
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got {type(value).__name__}$"):
        block_sparse_attention(*tensors(), **options)


def test_queries_and_packed_have_to_be_what_they_are():
    q, k, v = tensors()
    with pytest.raises(TypeError, match="^q must be a torch.Tensor, got list$"):
        block_sparse_attention(q.tolist(), k, v)
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"^packed must be what pack\(\) gives, got tuple$"):
        block_sparse_attention(q, k, v, block_table=table, packed=([0], [1]))


@pytest.mark.parametrize(
    "batch", [([0.5], [1], [1]), ([0], 1, [1]), ([0], [1], ["many"]), (iter([0]), [1], [1]), ([0], {1}, [1])]
)
def test_packed_rows_are_whole_numbers(batch):
    with pytest.raises(TypeError, match="^(starts|rows|lengths) must be a list of whole numbers, got "):
        pack(*batch)
