"""int8 scores as the reference defines them, and the torch backend: error, invariances, chunks. No kernel."""

import math

import pytest
import torch
from bsfa_kernels import Gate, TileShape, block_sparse_attention, make_spans, quantise, tile_statistics
from bsfa_kernels.integrations import mixed
from bsfa_kernels.request import Request
from kernel_cases import Case, check, check_statistics
from whole_tiles import Prompt, nan_scores_are_kept

TILE = TileShape(16, 32)


def drawn(rows=150, head_dim=64, batch=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, head_dim) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def attend(q, k, v, gate=Gate(), scores="int8", backend="reference", **options):  # noqa: B008 - frozen
    return block_sparse_attention(
        q, k, v, gate, tile=TILE, scores=scores, backend=backend, return_counts=True, return_lse=True, **options
    )


def error(got, exact) -> float:
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_the_rotation_is_orthogonal_and_flat(columns):
    matrix = quantise.rotation(columns)
    assert torch.equal(matrix @ matrix.T, columns * torch.eye(columns, dtype=torch.float64))
    # Patterns of +1 and -1 that repeat in powers of two are spread, each over at least half of the columns.
    repeating = torch.stack([1 - 2 * (torch.arange(columns) >> bit & 1) for bit in range(columns.bit_length())])
    assert (repeating.double() @ matrix).abs().max() <= math.sqrt(2 * columns)


@pytest.mark.parametrize("head_dim, columns, block", [(8, 32, 32), (40, 64, 64), (128, 128, 128), (160, 256, 128)])
def test_columns(head_dim, columns, block):
    assert (quantise.columns(head_dim), quantise.rotation_block(head_dim)) == (columns, block)


@pytest.mark.parametrize("head_dim", [16, 40, 64, 160])
def test_every_product_is_kept_up_to_rounding(head_dim):
    """The scores themselves, q . mean put back: off by what a half step in Q and in K allows, and no more."""
    q, k, v = drawn(70, head_dim)
    k += 3
    request = Request(q, k, v, Gate(), 1.0, True, TILE, True, 0, None, True, False, scores="int8")
    made = quantise.prepare(request)
    assert made.q8.abs().amax() == 127 and made.k8.abs().amax() == 127
    scored = quantise.dequantised(request, made)
    shift = k.mean(2, keepdim=True)
    for h in range(4):
        exact = q[0, h] @ k[0, h // 2].T
        half_q, half_k = made.q_scale[0, h].double() / 2, made.k_scale[0, h // 2].double() / 2
        half_k = half_k.repeat_interleave(32)[:70]
        root = math.sqrt(made.q8.shape[-1])
        norms_q, norms_k = q[0, h].norm(dim=-1), (k - shift)[0, h // 2].norm(dim=-1)
        bound = root * (half_q[:, None] * norms_k + norms_q[:, None] * half_k + root * half_q[:, None] * half_k)
        assert ((scored.q[0, h] @ scored.k[0, h // 2].T - exact).abs() <= bound + 1e-4).all()


def outliers(q, k):
    """Outlier channels as models have them: in keys an offset, in queries and keys a scale."""
    q, k = q.clone(), k.clone()
    k[..., 3] += 30
    q[..., 7] *= 12
    k[..., -5] *= 10
    return q, k


@pytest.mark.parametrize("head_dim", [64, 96])
def test_error_on_plain_data_and_on_outlier_channels(head_dim):
    """Relative to exact scores: about 1 % on unit-normal data. Outlier channels, which cost 10 % if they are rounded
    as they are, cost 2 % when spread by the rotation.
    """
    q, k, v = drawn(400, head_dim)
    plain = error(attend(q, k, v).out, attend(q, k, v, scores="exact").out)
    assert 0.002 < plain < 0.02
    q, k = outliers(q, k)
    planted = error(attend(q, k, v).out, attend(q, k, v, scores="exact").out)
    assert planted < 0.04, planted


def test_a_common_offset_of_all_keys_costs_nothing():
    q, k, v = drawn()
    plain = attend(q, k, v)
    moved = attend(q, k + 8, v)
    assert error(moved.out, plain.out) < 1e-3
    assert torch.allclose(moved.lse, attend(q, k + 8, v, scores="exact").lse, atol=0.05)


@pytest.mark.parametrize("gate", ["absolute", "gap"])
def test_thresholds_of_exact_scores_drop_nearly_the_same_tiles(gate):
    """With keys far from zero: the absolute gate sees the score with q . mean put back."""
    q, k, v = drawn(400)
    k += 2
    lse = attend(q, k, v, scores="exact").lse.float()
    seen = tile_statistics(q, k, lse, tile=TILE, backend="torch")
    values = seen.maximum if gate == "absolute" else seen.gap
    cut = values[seen.gap.isfinite()].median()
    exact, rounded = (attend(q, k, v, Gate(**{gate: float(cut)}), scores) for scores in ("exact", "int8"))
    kept, also = exact.kept.sum().item(), rounded.kept.sum().item()
    assert 0.3 * exact.candidates.sum() < kept < 0.7 * exact.candidates.sum()
    assert abs(kept - also) < 0.02 * exact.candidates.sum()


@pytest.mark.parametrize("cuts", [[64], [33, 100]], ids=str)
def test_chunks_and_the_whole_prompt_have_the_same_error(cuts):
    """Every chunk subtracts the mean of the keys so far: not the same bits, the same error."""
    q, k, v = drawn(200, 64)
    q, k = outliers(q, k)
    exact, whole = attend(q, k, v, scores="exact").out, attend(q, k, v).out
    parts = [
        attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], q_offset=start).out
        for start, end in zip([0, *cuts], [*cuts, 200], strict=True)
    ]
    chunks = torch.cat(parts, 2)
    assert not torch.equal(chunks, whole)
    for rows in (slice(0, 64), slice(64, 200)):
        both = [error(out[:, :, rows], exact[:, :, rows]) for out in (whole, chunks)]
        assert max(both) < 1.5 * min(both) < 0.06, both


def test_padding_has_no_part_in_means_and_scales():
    q, k, v = drawn(100, 32, dtype=torch.float32)
    expected = attend(q, k, v)
    padded = [torch.nn.functional.pad(x, (0, 0, 7, 9), value=1e4) for x in (q, k, v)]
    got = attend(*padded, spans=make_spans(1, -7, -7, 100))
    assert torch.equal(got.out[:, :, 7:107], expected.out) and torch.equal(got.lse[:, :, 7:107], expected.lse)


CASES = [
    *(Case(1, 4, 2, 173, 173, 16, TILE, causal, gate) for causal in (True, False) for gate in ("", "both")),
    Case(3, 2, 1, 90, 120, 16, TILE, True, "both", padded=True),
    Case(1, 2, 1, 80, 190, 40, TILE, True, "gap", q_offset=101, keep_sink=False),
    Case(3, 2, 1, 90, 120, 16, TILE, True, "gap", padded=True, window=40, sinks=True),
    Case(1, 2, 1, 90, 90, 16, TILE, False, "absolute", softcap=2.0),
    Case(1, 2, 1, 173, 173, 16, TILE, True, "gap", blocks="shuffled"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend(case):
    skipped = check(case, "torch", scores="int8")
    assert skipped > 0.1 or not case.gate or case.blocks or case.padded or case.window


def test_torch_statistics():
    check_statistics(Case(2, 2, 1, 100, 130, 16, TILE, True, q_offset=30), "torch", scores="int8")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nan_scores_are_kept(backend):
    gates = (Gate(gap=torch.full((4, 1), 1e30)), Gate(absolute=torch.full((4, 1), 1e30)))
    nan_scores_are_kept(Prompt(backend, TILE, length=173, scores="int8"), gates)


def test_scores_are_those_asked_for():
    q, k, v = drawn(40, 32)
    assert not torch.equal(attend(q, k, v).out, attend(q, k, v, scores="exact").out)
    half = [x.half() for x in (q, k, v)]
    for backend in ("torch", "reference"):
        assert attend(*half, backend=backend).out.dtype == torch.float16


@pytest.mark.parametrize("exact_heads", [(1,), (4, 5), (0, 7), (0, 2, 4, 6)], ids=str)
def test_some_heads_stay_exact(exact_heads):
    """By KV head, with all of its query heads; every result is that of the head's own mode."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 90, 32, generator=generator) for heads in (8, 4, 4))
    gate, sinks = Gate(gap=torch.linspace(-1, 1, 8)[:, None]), torch.linspace(-2, 2, 8)
    options = dict(tile=TILE, return_lse=True, return_counts=True, sinks=sinks)
    modes = {scores: block_sparse_attention(q, k, v, gate, scores=scores, **options) for scores in ("exact", "int8")}
    result = mixed.attention(q, k, v, gate, exact_heads, **options)
    for head in range(8):
        scores = "exact" if {head, head ^ 1} & {*exact_heads} else "int8"
        for got, wanted in zip(result, modes[scores], strict=True):
            torch.testing.assert_close(got[:, head], wanted[:, head], rtol=1e-5, atol=1e-5)
    bare = mixed.attention(q, k, v, gate, exact_heads, tile=TILE)
    place = torch.full((*q.shape[:2], q.shape[2] + 1, q.shape[3]), torch.nan)[:, :, 1:]
    assert mixed.attention(q, k, v, gate, exact_heads, tile=TILE, out=place).out is place
    assert torch.equal(place, bare.out)
    assert bare.lse is None and torch.equal(bare.out.isfinite(), result.out.isfinite())
