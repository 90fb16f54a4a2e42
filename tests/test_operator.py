"""The registered operators: what torch may assume of them, compilation, refusals, and which backend serves a call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import (
    BackendUnavailable,
    BlockLists,
    Gate,
    TileShape,
    backends,
    block_sparse_attention,
    explain,
    make_spans,
    pack,
    portable,
    tile_statistics,
)
from bsfa_kernels.request import Request
from torch._subclasses.fake_tensor import FakeTensorMode

TILE = TileShape(16, 16)


def tensors(heads=4, kv_heads=2, rows=40, keys=40, head_dim=16, dtype=torch.float32, batch=2, v_head_dim=None):
    generator = torch.Generator().manual_seed(0)
    last = v_head_dim or head_dim
    shapes = ((heads, rows, head_dim), (kv_heads, keys, head_dim), (kv_heads, keys, last))
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


def thresholds(value: float, heads=4, tiles=3) -> torch.Tensor:
    return torch.full((heads, tiles), value)


def operator_arguments(
    q, k, v, absolute=None, gap=None, spans=None, blocks=None, sinks=None, q_offset=0, scale=0.25, window=None,
    softcap=None, causal=True, sink=True, lse=True, counts=True, scores="exact",
    backend="auto", table=None, packed=None,
):  # fmt: skip
    lists = (None, None) if blocks is None else (blocks.indices, blocks.counts)
    tile = (TILE.rows, TILE.keys)
    return (
        q, k, v, absolute, gap, spans, *lists, sinks, q_offset, scale, window, softcap, causal, *tile, sink, lse,
        counts, scores, backend, table, *((None, 0) if packed is None else (packed.table, packed.rows)),
    )  # fmt: skip


def pages(*sequences) -> dict:
    """Keyword arguments: pages of 16 positions, those of each sequence by number."""
    return dict(table=torch.tensor(sequences, dtype=torch.int32))


def lists(tiles=3, batch=2, heads=4) -> BlockLists:
    return BlockLists.from_mask(torch.ones(batch, heads, tiles, 3, dtype=torch.bool).tril(-1))


def packed_arguments(**options):
    """Two sequences, of 30 queries and of 12."""
    packed = pack([5, 40], [30, 12], [48, 20])
    q, (_, k, v) = tensors(batch=1, rows=60)[0], tensors(keys=16, batch=7)
    table = pages([3, 0, 6], [1, 2, 5])
    return operator_arguments(q, k, v, packed=packed, spans=packed.spans, **table, **options)


ATTENTION = {
    "open": lambda: operator_arguments(*tensors()),
    "both-gates": lambda: operator_arguments(*tensors(), absolute=thresholds(0.5), gap=thresholds(-1.0)),
    "output-only": lambda: operator_arguments(*tensors(), gap=thresholds(-1.0), lse=False, counts=False),
    "counts-only": lambda: operator_arguments(*tensors(), absolute=thresholds(0.5), lse=False, causal=False),
    "spans": lambda: operator_arguments(
        *tensors(), gap=thresholds(-1.0), spans=make_spans(2, torch.tensor([0, -5]), torch.tensor([0, -5]))
    ),
    "spans-with-lengths": lambda: operator_arguments(
        *tensors(), spans=make_spans(2, lengths=torch.tensor([40, 17])), sink=False, backend="reference"
    ),
    "window-softcap-sinks": lambda: operator_arguments(
        *tensors(), gap=thresholds(-1.0), window=20, softcap=2.0, sinks=torch.zeros(4)
    ),
    "chunk": lambda: operator_arguments(*tensors(rows=16, keys=56), q_offset=40, gap=thresholds(0.0)),
    "block-lists": lambda: operator_arguments(*tensors(), gap=thresholds(-1.0), blocks=lists()),
    "block-lists-spans": lambda: operator_arguments(
        *tensors(), spans=make_spans(2), blocks=lists(4), causal=False, backend="reference"
    ),
    "pages": lambda: operator_arguments(
        tensors()[0], *tensors(keys=16, batch=7)[1:], gap=thresholds(-1.0), **pages([3, 0, 6], [1, 2, 5])
    ),
    "packed": lambda: packed_arguments(gap=thresholds(-1.0)),
    "int8": lambda: operator_arguments(*tensors(), gap=thresholds(-1.0), lse=False, scores="int8"),
    "int8-spans": lambda: operator_arguments(*tensors(), spans=make_spans(2), sinks=torch.zeros(4), scores="int8"),
    "narrow-values": lambda: operator_arguments(*tensors(head_dim=24, v_head_dim=16), gap=thresholds(-1.0)),
    "half-strided": lambda: operator_arguments(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(dtype=torch.bfloat16)), gap=thresholds(-1.0)
    ),
}


@pytest.mark.parametrize("arguments", ATTENTION.values(), ids=ATTENTION)
def test_attention_is_a_sound_operator(arguments):
    torch.library.opcheck(torch.ops.bsfa.attend, arguments())


@pytest.mark.parametrize("name", ["both-gates", "spans-with-lengths", "block-lists", "int8", "packed"])
def test_attention_into_a_given_place_is_a_sound_operator(name):
    arguments = ATTENTION[name]()
    batch, _, rows, _ = arguments[0].shape
    out = torch.full((batch, rows + 20, 4, 16), torch.nan)[:, 10 : rows + 10].transpose(1, 2)
    torch.library.opcheck(torch.ops.bsfa.attend_into, (out, *arguments))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("spans, scores", [(None, "exact"), ("padded", "exact"), ("padded", "int8")])
def test_tile_statistics_is_a_sound_operator(causal, spans, scores):
    q, k, v = tensors()
    spans = spans and make_spans(2, torch.tensor([0, -5]), torch.tensor([0, -5]))
    lse = block_sparse_attention(q, k, v, causal=causal, spans=spans, return_lse=True, tile=TILE).lse
    arguments = (q, k, lse, spans, 0, 0.25, None, None, causal, TILE.rows, TILE.keys, True, scores, "auto")
    torch.library.opcheck(torch.ops.bsfa.tile_statistics, arguments)


def test_there_is_no_backward_pass_and_it_says_so():
    q, k, v = tensors()
    v.requires_grad_()
    out = block_sparse_attention(q, k, v, tile=TILE, return_lse=True, return_counts=True)
    assert out.out.requires_grad and not out.kept.requires_grad
    with pytest.raises(NotImplementedError, match="block_sparse_attention has no backward pass"):
        out.out.sum().backward()
    with torch.no_grad():
        assert not block_sparse_attention(q, k, v, tile=TILE).out.requires_grad


def test_fake_tensors_have_the_shapes_and_types_of_the_result():
    def call(lse):
        q, k, v = tensors(dtype=torch.float16)
        result = block_sparse_attention(q, k, v, tile=TILE, return_lse=True, return_counts=True)
        return [*result, *tile_statistics(q, k, lse, tile=TILE)]

    real = call(torch.zeros(2, 4, 40))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = call(torch.zeros(2, 4, 40))
    for got, expected in zip(fake, real, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())
    q, k, v = tensors()
    bare = block_sparse_attention(q, k, v, tile=TILE)
    assert bare.lse is None and bare.kept is None and bare.candidates is None


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_function_equals_eager(compiler):
    def layer(q, k, v, gap, spans, mask):
        result = block_sparse_attention(
            q * 1.5, k, v, Gate(gap=gap), blocks=BlockLists.from_mask(mask), spans=spans, tile=TILE, return_lse=True,
            return_counts=True,
        )  # fmt: skip
        return result.out + 1, result.lse, result.kept.sum(), result.candidates.sum()

    q, k, v = tensors()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    spans = make_spans(2, torch.tensor([0, -5]), torch.tensor([0, -5]), torch.tensor([40, 35]))
    mask = torch.ones(2, 4, 4, 3, dtype=torch.bool)
    mask[0] = False
    for gap in (-torch.inf, 1.0):
        arguments = (q, k, v, thresholds(gap), spans, mask)
        got, expected = compiled(*arguments), layer(*arguments)
        torch.testing.assert_close(got, expected)
    assert expected[2] < expected[3]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_function_writes_where_it_is_told(compiler):
    def layer(q, k, v, gap, tokens):
        out = tokens[5:45].transpose(0, 1)[None]
        block_sparse_attention(q * 1.5, k, v, Gate(gap=gap), tile=TILE, out=out)
        return tokens[:, 1] + 1

    q, k, v = tensors(batch=1)
    got, expected = (torch.zeros(50, 4, 16) for _ in range(2))
    returned = torch.compile(layer, fullgraph=True, backend=compiler)(q, k, v, thresholds(1.0), got)
    torch.testing.assert_close(returned, layer(q, k, v, thresholds(1.0), expected))
    torch.testing.assert_close(got, expected)
    assert got[5:45].ne(0).all() and not got[:5].any() and not got[45:].any()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_function_takes_any_head_dim(dynamic):
    torch.compiler.reset()

    def layer(q, k, v, gap):
        return block_sparse_attention(q, k, v, Gate(gap=gap), tile=TILE).out + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for head_dim in (16, 24, 32):
        arguments = (*tensors(head_dim=head_dim), thresholds(1.0))
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))


@pytest.mark.parametrize("dynamic", [None, True])
def test_which_kernel_serves_a_head_dim_is_asked_for_each_when_compiled(dynamic, monkeypatch):
    """Also where torch.compile takes the size to be dynamic: by demand, or since it met another before."""
    torch.compiler.reset()
    monkeypatch.setattr(backends, "_fused", lambda *given: ("hopper", "") if given[2] <= 24 else (None, "too wide"))

    def layer(q):
        backend, reason = backends.fused(q.device, q.dtype, q.shape[-1], q.shape[-1], 64, 128)
        return (q + 1 if backend == "hopper" else q - 1), reason

    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=dynamic)
    for head_dim, added, said in ((16, 1, ""), (24, 1, ""), (32, -1, "too wide"), (16, 1, "")):
        out, reason = compiled(torch.zeros(1, 1, 4, head_dim))
        assert out.eq(added).all() and reason == said


def test_a_head_dim_that_must_stay_dynamic_is_refused_by_torch():
    torch.compiler.reset()
    q = torch.zeros(1, 1, 4, 16)
    torch._dynamo.mark_dynamic(q, 3)
    compiled = torch.compile(
        lambda q: q + len(backends.fused(q.device, q.dtype, q.shape[-1], 16, 64, 128)), backend="eager"
    )
    with pytest.raises(RuntimeError, match=r"size\(\)\[3\] as dynamic but your code specialized it"):
        compiled(q)


def test_the_output_lies_as_the_next_layer_reads_it():
    for backend in ("torch", "reference"):
        for scores in ("exact", "int8"):
            out = block_sparse_attention(*tensors(), tile=TILE, scores=scores, backend=backend).out
            assert out.shape == (2, 4, 40, 16) and out.transpose(1, 2).is_contiguous()


Q, K, V = tensors()
LONG = tensors(keys=48)[1]
TABLE = torch.zeros(2, 3, dtype=torch.int32)
PACKED = pack([5, 40], [30, 12], [48, 20])
REFUSED = [
    (dict(block_table=TABLE[0]), r"block_table must be \[2, pages\], got \[3\]"),
    (dict(block_table=TABLE[:1]), r"block_table must be \[2, pages\], got \[1, 3\]"),
    (
        dict(block_table=TABLE.long()),
        r"block_table must be int32 on cpu, contiguous along its last axis, got torch.int64 on cpu, strides \[3, 1\]",
    ),
    (
        dict(block_table=TABLE, k=K[..., :8], v=V[..., :8]),
        r"q \[2, 4, 40, 16\] and pages \[2, 2, 40, 8\] must agree in head dim",
    ),
    (
        dict(block_table=TABLE, spans=make_spans(2, k_offset=-3)),
        r"pages begin at position 0: with block_table the k_offset of spans must be 0",
    ),
    (
        dict(packed=PACKED, q_offset=1, block_table=TABLE),
        r"packed sequences say where they stand: give neither q_offset nor spans",
    ),
    (dict(packed=PACKED), r"packed sequences need a block_table and take no block lists"),
    (
        dict(packed=PACKED, block_table=TABLE),
        r"packed sequences end at row 52 of q \[1, heads, tokens, head dim\], got q \[2, 4, 40, 16\]",
    ),
    (
        dict(packed=PACKED, q=torch.zeros(1, 4, 52, 16), block_table=TABLE[:1]),
        r"block_table must be \[2, pages\], got \[1, 3\]",
    ),
    (
        dict(block_table=TABLE[:, :1], window=5, q_offset=1),
        r"with a window queries may not pass the keys: they end at position 41, the keys at 40",
    ),
    (dict(q=Q[0]), r"q must have 4 axes \[batch, heads, length, head dim\], got shape \[4, 40, 16\]"),
    (dict(k=K.half()), r"k is torch.float16 on cpu, but q is torch.float32 on cpu"),
    (dict(v=V.to("meta")), r"v is torch.float32 on meta, but q is torch.float32 on cpu"),
    (dict(q=Q.mT.contiguous().mT), r"q must be contiguous along its last axis, got strides \[2560, 640, 1, 40\]"),
    (
        dict(q=Q.int(), k=K.int(), v=V.int()),
        r"q must be float16, bfloat16, float32 or float64, got torch.int32",
    ),
    (dict(v=LONG), r"k and v must agree in all but their last axis, got \[2, 2, 40, 16\] and \[2, 2, 48, 16\]"),
    (dict(v=torch.cat([V, V], -1)), r"v must not be wider than k, got head dims 32 and 16"),
    (dict(v=V[..., :0]), r"empty input: q \[2, 4, 40, 16\], k \[2, 2, 40, 16\], v \[2, 2, 40, 0\]"),
    (dict(v=V[..., :8], out=torch.empty_like(Q)), r"out must be torch.float32 \[2, 4, 40, 8\] on cpu, got .*"),
    (dict(q=Q[:1]), r"q \[1, 4, 40, 16\] and k \[2, 2, 40, 16\] must agree in batch size and head dim"),
    (dict(q=Q[:, :3]), r"query heads \(3\) must be a multiple of key/value heads \(2\)"),
    (dict(q=Q[:, :, :0]), r"empty input: q \[2, 4, 0, 16\], k \[2, 2, 40, 16\], v \[2, 2, 40, 16\]"),
    (dict(scale=0.0), r"scale must be positive and finite in float32, got 0.0"),
    (dict(scale=float("nan")), r"scale must be positive and finite in float32, got nan"),
    (dict(q_offset=-1), r"q_offset must not be negative, got -1; left padding is described by spans"),
    (
        dict(q_offset=2**31),
        r"queries end before position 2,147,483,647, got q_offset 2,147,483,648 and 40 queries",
    ),
    (dict(q_offset=3, spans=make_spans(2)), r"give either q_offset or spans, not both"),
    (dict(spans=make_spans(3)), r"spans must be int32 \[2, 4\] on cpu, got torch.int32 \[3, 4\] on cpu"),
    (dict(spans=make_spans(2).long()), r"spans must be int32 \[2, 4\] on cpu, got torch.int64 \[2, 4\] on cpu"),
    (dict(window=0), r"window must be a positive number of keys, got 0"),
    (dict(window=5, causal=False), r"window needs causal=True: a query sees its last keys"),
    (
        dict(window=5, q_offset=3),
        r"with a window queries may not pass the keys: they end at position 43, the keys at 40",
    ),
    (dict(softcap=-1.0), r"softcap must be positive and finite in float32, got -1.0"),
    (
        dict(k=K[:, :, :1].expand(-1, -1, 2**31, -1), v=V[:, :, :1].expand(-1, -1, 2**31, -1)),
        r"keys end before position 2,147,483,647, got 2,147,483,648",
    ),
    (dict(sinks=torch.zeros(3)), r"sinks must be \[4\] on cpu, got \[3\] on cpu"),
    (dict(gate=Gate(gap=thresholds(0.0, heads=3))), r"gate 'gap' has 3 heads, but q has 4"),
    (dict(gate=Gate(absolute=thresholds(0.0).to("meta"))), r"gate 'absolute' is on meta, but q is on cpu"),
    (
        dict(blocks=lists()),
        r"block lists must be given for \[batch, query heads, query tiles\] = \[2, 4, 1\], got \[2, 4, 3\]",
    ),
    (
        dict(blocks=lists(1), spans=make_spans(2)),
        r"block lists must be given for \[batch, query heads, query tiles\] = \[2, 4, 2\], got \[2, 4, 1\]",
    ),
    (dict(blocks=lists().to("meta")), r"block lists are on meta, but q is on cpu"),
    (dict(scores="fp8"), r"scores must be one of exact, int8, got 'fp8'"),
    (dict(backend="cuda"), r"backend must be 'auto' or one of split_kv, hopper, triton, torch, reference; got 'cuda'"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[said.replace("\\", "")[:40] for _, said in REFUSED])
def test_a_bad_argument_is_named_with_its_value_and_what_was_expected(arguments, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        block_sparse_attention(**dict(q=Q, k=K, v=V) | arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([], [], []), "there is no sequence to pack"),
        (([0], [0], [4]), "a sequence of 0 queries and 4 keys cannot be packed"),
        (([0], [5], [4]), "a sequence of 5 queries and 4 keys cannot be packed"),
        (([9, 0], [3, 10], [3, 10]), "a sequence begins at row 9, before row 10, where the one before it ends"),
        (([-1], [3], [3]), "a sequence begins at row -1, before row 0, where the one before it ends"),
    ],
)
def test_sequences_that_cannot_be_packed_are_refused(arguments, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        pack(*arguments)


def test_bad_tiles_and_lse_are_refused():
    with pytest.raises(ValueError, match="tile keys must be a positive number below 2\\^31, got 0"):
        TileShape(64, 0)
    with pytest.raises(ValueError, match=r"lse must be float32 \[2, 4, 40\], got torch.float32 \[2, 4, 39\]"):
        tile_statistics(Q, K, torch.zeros(2, 4, 39))
    with pytest.raises(TypeError, match="^lse must be a torch.Tensor, got list$"):
        tile_statistics(Q, K, [0.0])


def test_what_is_asked_of_packed_sequences_is_about_them(monkeypatch):
    asked = []
    monkeypatch.setattr(backends, "choose", lambda request: asked.append(request) or ("torch", None, {}))
    explain(torch.zeros(1, 4, 60, 16), K, V, packed=PACKED, block_table=TABLE)
    assert (asked[0].batch, asked[0].rows) == (2, 30) and asked[0].spans is PACKED.spans


def request(**changes) -> Request:
    values = dict(
        q=Q, k=K, v=V, gate=Gate(), scale=0.25, causal=True, tile=TileShape(), keep_sink=True, q_offset=0, spans=None,
        want_lse=False, want_counts=False,
    )  # fmt: skip
    return Request(**values | changes)


def test_auto_says_why_faster_backends_were_passed_over():
    name, module, passed_over = backends.choose(request())
    assert name == "torch" and module.attention
    assert list(passed_over) == ["hopper", "triton"]
    assert passed_over["hopper"] == "tensors are on cpu; the Hopper kernel needs an H100 or H200"
    assert passed_over["triton"] == "tensors are on cpu; the Triton kernel needs a CUDA device"
    assert explain(Q, K, V) == (name, passed_over)
    with pytest.raises(TypeError, match="^block_sparse_attention has no argument 'casual'$"):
        explain(Q, K, V, casual=False)
    assert backends.choose(request(), table=backends.STATISTICS)[0] == "torch"


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_a_demanded_backend_serves_the_call(name):
    chosen, _, passed_over = backends.choose(request(), name)
    assert (chosen, passed_over) == (name, {})


def test_a_backend_without_int8_scores_never_takes_such_a_call(monkeypatch):
    monkeypatch.setattr(backends, "load", lambda module: SimpleNamespace(unsupported=lambda request: None))
    assert backends.choose(request())[0] == "split_kv"
    with pytest.raises(BackendUnavailable, match="backend 'hopper' cannot serve this call: it has no int8 scores"):
        backends.choose(request(scores="int8"), "hopper")


def test_a_demanded_backend_that_cannot_says_so():
    with pytest.raises(BackendUnavailable, match="^backend 'hopper' cannot serve this call: tensors are on cpu; "):
        block_sparse_attention(Q, K, V, backend="hopper")
    with pytest.raises(BackendUnavailable, match="^backend 'triton' cannot serve this call: tensors are on cpu; "):
        tile_statistics(Q, K, torch.zeros(2, 4, 40), backend="triton")
    with pytest.raises(ValueError, match="one of triton, torch, reference; got 'hopper'"):
        tile_statistics(Q, K, torch.zeros(2, 4, 40), backend="hopper")


def test_a_backend_that_cannot_be_imported_is_a_reason(monkeypatch):
    def missing(name, package):
        raise ImportError(f"No module named {name!r}", name="triton")

    backends.load.cache_clear()
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    try:
        reason = "triton cannot be imported (No module named '.hopper')"
        assert backends.reason_against("hopper", request()) == reason
        with pytest.raises(
            BackendUnavailable, match="backend 'hopper' cannot serve this call: triton cannot be imported"
        ):
            backends.choose(request(), "hopper")
    finally:
        backends.load.cache_clear()


@pytest.mark.parametrize(("room", "served"), ((101376, False), (166912, True)))
def test_a_gpu_with_little_shared_memory_is_a_reason(monkeypatch, room, served):
    def gpu(device):
        return SimpleNamespace(shared_memory_per_block_optin=room)

    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu)
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 2, 64, 256))
    reason = portable.unsupported(SimpleNamespace(q=x, v=x, tile=TileShape(64, 128), query_tiles=1, scores="exact"))
    assert reason is None if served else "head dim 256" in reason and "101376" in reason
    tall = SimpleNamespace(q=x, v=x, tile=TileShape(128, 64), query_tiles=1, scores="exact")
    assert portable.unsupported(tall) is None
