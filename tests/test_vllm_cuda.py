"""The GPU's vLLM backend without vLLM or a GPU: made-up batches on stand-ins for vLLM's classes (vllm_fakes.py)."""

import importlib
import logging
import sys

import pytest
import torch
import vllm_fakes as fakes
from bsfa_kernels import block_sparse_attention
from bsfa_kernels.integrations.identity import configuration
from bsfa_kernels.integrations.vllm import plan
from bsfa_kernels.integrations.vllm.options import OptionsError
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds, ThresholdsError
from bsfa_kernels.tiles import TileShape
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

HEADS, KV_HEADS, HEAD_DIM, PAGE, LAYERS = 4, 2, 32, 128, 2
TILE = TileShape(32, 64)
NAMES = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
FP8 = torch.float8_e4m3fn


def hf_config(**changes):
    return LlamaConfig(
        hidden_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, architectures=["LlamaForCausalLM"], **changes,
    )  # fmt: skip


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A thresholds file for two layers at which about half of the tiles drop."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return write_thresholds(tmp_path / "t.safetensors", TILE)


def write_thresholds(path, tile):
    generator = torch.Generator().manual_seed(3)
    tensors = {name.removesuffix(".attn"): 0.6 + 0.5 * torch.rand(1, HEADS, 1, generator=generator) for name in NAMES}
    identity = dict.fromkeys(MODEL_KEYS) | {"id": "test", "architecture": "LlamaForCausalLM", "weights": "0" * 64}
    identity |= {"head_dim": HEAD_DIM, "scale": HEAD_DIM**-0.5, **configuration(hf_config())}
    Thresholds(identity, tile, True, (0,), (Point("half", "gap", "test", 0.0),), tensors).write(path)
    return path


class Server:
    """Two layers of a rank, their builder, and batches for them."""

    def __init__(self, monkeypatch, file, rank=0, ranks=1, config=None, device="cpu", **layer):
        options = {"bsfa": {"thresholds": str(file), "log_every": 0}}
        self.config = fakes.Config(options, config or hf_config(), rank, ranks)
        fakes.install(monkeypatch, self.config)
        self.cuda = importlib.import_module("bsfa_kernels.integrations.vllm.cuda")
        backend = self.cuda.SparseCUDABackend
        arguments = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto", **layer}
        for name in NAMES:
            impl = backend.get_impl_cls()(HEADS // ranks, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS // ranks, **arguments)
            self.context[name] = fakes.Layer(name, impl, backend)
        self.builder = backend.get_builder_cls()(None, NAMES, self.config, device)
        self.device = device
        self.layers = [self.context[name] for name in NAMES]
        self.ranks = ranks

    @property
    def context(self):
        return self.config.compilation_config.static_forward_context

    def common(self, queries, lengths, **changes):
        """Requests of so many queries and keys, in pages that lie in no order."""
        generator = torch.Generator().manual_seed(sum(lengths))
        starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
        device = self.device
        pages = -(-max(lengths) // PAGE)
        table = torch.randperm(len(lengths) * pages, generator=generator).view(len(lengths), pages).to(torch.int32)
        fields = dict(
            query_start_loc=starts.to(device), query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            num_reqs=len(lengths), num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=max(lengths),
            block_table_tensor=table.to(device), slot_mapping=torch.arange(sum(queries), device=device),
            seq_lens_cpu_upper_bound=torch.tensor(lengths),
        )  # fmt: skip
        return fakes.CommonAttentionMetadata(**{**fields, **changes})

    def tensors(self, common, dtype=torch.float32):
        generator = torch.Generator().manual_seed(9)
        pages = common.block_table_tensor.numel()
        heads = KV_HEADS // self.ranks
        cache = torch.randn(pages, heads, PAGE, 2 * HEAD_DIM, generator=generator).to(dtype)
        query = torch.randn(common.num_actual_tokens, HEADS // self.ranks, HEAD_DIM, generator=generator)
        return query.to(self.device), cache.to(self.device)

    def forward(self, query, cache, metadata, layer=0, key=None):
        dtype = query.dtype if query.dtype.itemsize > 1 else torch.float32
        output = torch.full(query.shape, torch.nan, dtype=dtype, device=self.device)
        layer = self.layers[layer]
        result = layer.impl.forward(layer, query, key, key, cache, metadata, output)
        assert result is output
        return output


def expected(server, query, cache, common, request, layer=0):
    """The gated attention of one request, from its own contiguous keys."""
    start, end = common.query_start_loc[request : request + 2].tolist()
    keys = int(common.seq_lens[request])
    k, v = cache[common.block_table_tensor[request].long()].transpose(0, 1).flatten(1, 2)[:, :keys].chunk(2, -1)
    q = query[start:end].transpose(0, 1)
    gate = server.layers[layer].impl.serving.handler.gate(keys, q.device)
    tile = server.layers[layer].impl.serving.handler.thresholds.tile
    result = block_sparse_attention(
        q[None], k[None], v[None], gate, tile=tile, q_offset=keys - (end - start), return_counts=True
    )
    return result.out[0].transpose(0, 1), result


def dense(server, query, cache, common, layer=0):
    """What vLLM's kernel gives for the whole batch."""
    metadata = fakes.FlashAttentionMetadataBuilder(None, NAMES, server.config, "cpu").build(0, common)
    impl = server.layers[layer].impl
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    return fakes.FlashAttentionImpl.forward(impl, None, query, None, None, cache, metadata, output)


ORDERS = {
    "decodes first": ([1, 1, 300, 20, 64], [70, 5, 300, 250, 500]),
    "decodes between": ([1, 300, 1, 64, 20, 0], [70, 300, 5, 500, 250, 0]),
}


@pytest.mark.parametrize("queries, lengths", ORDERS.values(), ids=ORDERS)
def test_prefills_are_gated_and_the_rest_is_flash_attentions(monkeypatch, file, queries, lengths):
    server = Server(monkeypatch, file)
    common = server.common(queries, lengths)
    query, cache = server.tensors(common)
    metadata = server.builder.build(0, common)
    output = server.forward(query, cache, metadata)
    exact = dense(server, query, cache, common)
    dropped = 0
    for request, rows in enumerate(queries):
        start = sum(queries[:request])
        wanted = exact[start : start + rows]
        if rows >= TILE.rows:
            wanted, result = expected(server, query, cache, common, request)
            dropped += int((result.candidates - result.kept).sum())
        torch.testing.assert_close(output[start : start + rows], wanted)
    assert (output - exact).abs().max() > 0.01
    counts = server.layers[0].impl.serving.handler.counts
    assert int((counts.candidates - counts.kept).sum()) == dropped > 0
    (call,) = server.layers[0].impl.calls[:-1]  # the last is dense()'s
    assert call.metadata.fast and len(call.query) == 22
    assert not server.layers[0].impl.serving.counters.passed


@pytest.mark.parametrize("queries", [[1, 300, 64], [1, 300, 5, 64, 0]], ids=["side by side", "apart"])
def test_prefills_go_in_one_call_where_a_page_is_a_key_tile(monkeypatch, tmp_path, queries):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server = Server(monkeypatch, write_thresholds(tmp_path / "t.safetensors", TileShape(32, PAGE)))
    common = server.common(queries, [70, 1400, *([900] if len(queries) == 3 else [80, 900, 0])])
    query, cache = server.tensors(common)
    handler, calls = server.layers[0].impl.serving.handler, []
    monkeypatch.setattr(handler, "run", lambda *a, **k: calls.append(k) or type(handler).run(handler, *a, **k))
    output = server.forward(query, cache, server.builder.build(0, common))
    prefills = [request for request, rows in enumerate(queries) if rows >= 32]
    (call,) = calls
    assert call["packed"].table.tolist() == [[sum(queries[:r]), queries[r]] for r in prefills]
    assert torch.equal(call["block_table"], common.block_table_tensor[prefills]) and call["packed"].keys == 1400
    exact, dropped = dense(server, query, cache, common), 0
    for request in range(len(queries)):
        own = slice(sum(queries[:request]), sum(queries[: request + 1]))
        wanted = exact[own]
        if request in prefills:
            wanted, result = expected(server, query, cache, common, request)
            dropped += int((result.candidates - result.kept).sum())
        torch.testing.assert_close(output[own], wanted)
    counts = handler.counts
    assert int((counts.candidates - counts.kept).sum()) == dropped > 0


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=str)
def test_a_mixed_batch_on_a_gpu(monkeypatch, tmp_path, cache_dtype):
    """The fused kernels, the gather kernel and the output's place; FlashAttention is still a stand-in."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file = write_thresholds(tmp_path / "t.safetensors", TileShape())
    fp8 = cache_dtype == FP8
    server = Server(monkeypatch, file, device="cuda", kv_cache_dtype="fp8" if fp8 else "auto")
    for scale in ("_q_scale", "_k_scale", "_v_scale"):
        for layer in server.layers:
            setattr(layer, scale, torch.ones((), device="cuda"))
    common = server.common([1, 700, 5, 300], [900, 700, 80, 1000])
    query, cache = server.tensors(common, cache_dtype)
    query = query.bfloat16()
    output = server.forward(query, cache.view(torch.uint8) if fp8 else cache, server.builder.build(0, common))
    exact = dense(server, query, cache.view(torch.uint8) if fp8 else cache, common)
    torch.testing.assert_close(output[[0, *range(701, 706)]].float(), exact[[0, *range(701, 706)]], atol=2e-2, rtol=0)
    dropped = 0
    for request, rows in ((1, slice(1, 701)), (3, slice(706, 1006))):
        wanted, result = expected(server, query, cache.bfloat16(), common, request)
        assert torch.equal(output[rows], wanted)
        dropped += int((result.candidates - result.kept).sum())
    counts = server.layers[0].impl.serving.handler.counts
    assert dropped == int((counts.candidates - counts.kept).sum()) > 0


def test_a_batch_of_prefills_alone_never_calls_flash_attention(monkeypatch, file):
    server = Server(monkeypatch, file)
    common = server.common([100, 40], [100, 40])
    server.forward(*server.tensors(common), server.builder.build(0, common), layer=1)
    assert not server.layers[1].impl.calls


@pytest.mark.parametrize("queries", [[1, 1], [31, 1, 5]], ids=str)
def test_decoding_is_flash_attentions_own(monkeypatch, file, queries):
    """Batches that a CUDA graph may capture take no path of ours."""
    server = Server(monkeypatch, file)
    common = server.common(queries, [200] * len(queries))
    metadata = server.builder.build(0, common)
    assert metadata.bsfa is None
    query, cache = server.tensors(common)
    output = server.forward(query, cache, metadata, key=query)
    (call,) = server.layers[0].impl.calls
    assert call.metadata is metadata and call.query is query and call.key is query
    torch.testing.assert_close(output, dense(server, query, cache, common))


def test_few_queries_of_many_keys_are_flash_attentions_too(monkeypatch, file):
    server, asked = Server(monkeypatch, file), []

    def few(rows, keys, heads, device):
        asked.append((rows, keys, heads))
        return rows == 64

    monkeypatch.setattr(f"{plan.__package__}.layer.few_queries", few)
    common = server.common([64, 300], [500, 300])
    query, cache = server.tensors(common)
    split = (metadata := server.builder.build(0, common)).bsfa
    assert [prefill.request for prefill in split.batch.prefills] == [1] and split.batch.others == (0,)
    assert asked == [(64, 500, HEADS), (300, 300, HEADS)]
    output = server.forward(query, cache, metadata)
    torch.testing.assert_close(output[:64], dense(server, query, cache, common)[:64])
    assert torch.equal(output[64:], expected(server, query, cache, common, 1)[0])


def test_another_cache_groups_block_table(monkeypatch, file):
    server = Server(monkeypatch, file)
    common = server.common([1, 100, 3], [70, 300, 20])
    query, cache = server.tensors(common)
    table = common.block_table_tensor.flip(1).contiguous()
    metadata = server.builder.build(0, common)
    updated = server.builder.update_block_table(metadata, table, common.slot_mapping)
    common.block_table_tensor = table
    torch.testing.assert_close(
        server.forward(query, cache, updated), server.forward(query, cache, server.builder.build(0, common))
    )
    assert metadata.bsfa.others.metadata.block_table is not updated.bsfa.others.metadata.block_table


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_heads_thresholds(monkeypatch, file, rank):
    server = Server(monkeypatch, file, rank=rank, ranks=2)
    whole = Thresholds.read(file).gate("model.layers.1.self_attn", None, 1)
    part = server.layers[1].impl.serving.handler.gate(100, torch.device("cpu"))
    assert torch.equal(part.gap, whole.gap[2 * rank : 2 * rank + 2])


def test_fp8_pages_and_queries_are_dequantised(monkeypatch, file):
    server = Server(monkeypatch, file, kv_cache_dtype="fp8")
    common = server.common([1, 100], [70, 300])
    query, cache = server.tensors(common, FP8)
    query = query.to(FP8)
    split = server.builder.build(0, common)
    split.bsfa = split.bsfa._replace(others=None)
    output = server.forward(query, cache.view(torch.uint8), split)
    scales = server.layers[0]
    halves = (x * s for x, s in zip(cache.float().chunk(2, -1), (scales._k_scale, scales._v_scale), strict=True))
    wanted, result = expected(server, query.float() * scales._q_scale, torch.cat([*halves], -1), common, 1)
    assert result.kept.sum() < result.candidates.sum()
    torch.testing.assert_close(output[1:], wanted)


def whole_batch(server, common, reason, words, caplog, cache_dtype=torch.float32):
    query, cache = server.tensors(common, cache_dtype)
    metadata = server.builder.build(0, common)
    for layer in (0, 0, 1):
        output = server.forward(query, cache, metadata, layer)
        assert server.layers[layer].impl.calls[-1].metadata is metadata
        torch.testing.assert_close(output, dense(server, query, cache, common))
    passed = server.layers[0].impl.serving.counters.passed
    assert passed == {(NAMES[0], reason): 2, (NAMES[1], reason): 1}
    assert sum(words in record.getMessage() for record in caplog.records) == 1  # once, not for each layer or batch


LAYER_REASONS = {
    "window": ({"sliding_window": 9}, "sliding window of 9 tokens"),
    "softcap": ({"logits_soft_cap": 30.0}, "scores are soft-capped at 30"),
    "sinks": ({"sinks": torch.zeros(HEADS)}, "attention sinks"),
    "alibi": ({"alibi_slopes": [0.1] * HEADS}, "ALiBi biases"),
    "cross": ({"attn_type": "encoder_decoder"}, f"{plan.CROSS} (encoder_decoder)"),
}


@pytest.mark.parametrize("layer, reason", LAYER_REASONS.values(), ids=LAYER_REASONS)
def test_layers_that_bsfa_does_not_know_stay_with_flash_attention(monkeypatch, file, caplog, layer, reason):
    server = Server(monkeypatch, file, **layer)
    whole_batch(server, server.common([1, 100], [70, 300]), reason, reason, caplog)


BATCH_REASONS = {
    "not causal": ({"causal": False}, plan.BIDIRECTIONAL),
    "causal by request": ({"causal": torch.ones(2, dtype=torch.int32)}, plan.BIDIRECTIONAL),
    "prefix-LM": ({"mm_req_doc_ranges": {1: [(3, 9)]}}, plan.BIDIRECTIONAL),
    "encoder": ({"encoder_seq_lens": torch.ones(2)}, plan.CROSS),
    "no lengths": ({"seq_lens_cpu_upper_bound": None}, plan.UNKNOWN_LENGTHS),
    "made-up lengths": ({"seq_lens_cpu_upper_bound": torch.tensor([0, 0])}, plan.UNKNOWN_LENGTHS),
}


@pytest.mark.parametrize("changes, reason", BATCH_REASONS.values(), ids=BATCH_REASONS)
def test_batches_that_bsfa_does_not_know_stay_with_flash_attention(monkeypatch, file, caplog, changes, reason):
    server = Server(monkeypatch, file)
    whole_batch(server, server.common([1, 100], [70, 300], **changes), reason, reason, caplog)


def test_contexts_in_parallel_stay_with_flash_attention(monkeypatch, file, caplog):
    server = Server(monkeypatch, file)
    server.config.parallel_config.decode_context_parallel_size = 2
    whole_batch(server, server.common([1, 100], [70, 300]), plan.CONTEXT_PARALLEL, "context", caplog)


def test_scales_by_head_stay_with_flash_attention(monkeypatch, file, caplog):
    server = Server(monkeypatch, file, kv_cache_dtype="fp8_e4m3")
    for layer in server.layers:
        layer._k_scale = torch.ones(KV_HEADS)
    whole_batch(server, server.common([1, 100], [70, 300]), plan.HEAD_SCALES, "one FP8 scale a head", caplog, FP8)


def test_a_quantised_output_stays_with_flash_attention(monkeypatch, file):
    server = Server(monkeypatch, file)
    common = server.common([100], [100])
    query, cache = server.tensors(common)
    layer = server.layers[0]
    metadata = server.builder.build(0, common)
    layer.impl.forward(layer, query, None, None, cache, metadata, torch.empty(query.shape), torch.ones(1))
    assert len(layer.impl.calls) == 1 and (NAMES[0], plan.QUANTISED_OUTPUT) in layer.impl.serving.counters.passed


def test_a_profiling_run_sees_the_longest_sequences_memory(monkeypatch, file):
    server = Server(monkeypatch, file)
    called, sizes = [], []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(tuple(result.shape))
            return result

    monkeypatch.setattr(fakes.FlashAttentionImpl, "forward", lambda self, *args: called.append(args[5]))
    output = torch.empty(7, HEADS, HEAD_DIM)
    with Allocations():
        server.layers[0].impl.forward(server.layers[0], output, None, None, None, None, output)
    assert called == [None] and sizes == [(2, KV_HEADS, 4096, HEAD_DIM)]


def test_the_backend_as_vllm_sees_it(monkeypatch, file):
    server = Server(monkeypatch, file)
    backend = server.cuda.SparseCUDABackend
    assert backend.get_name() == "CUSTOM" and backend.get_supported_kernel_block_sizes() == [fakes.MultipleOf(128)]
    monkeypatch.setattr(fakes.FlashAttentionBackend, "sizes", [64])  # what a kernel of its demands
    assert backend.get_supported_kernel_block_sizes() == [64]
    assert backend.get_builder_cls()._cudagraph_support is fakes.AttentionCGSupport.UNIFORM_BATCH


def test_another_models_thresholds_are_refused(monkeypatch, file):
    with pytest.raises(ThresholdsError, match="rope_theta"):
        Server(monkeypatch, file, config=hf_config(rope_parameters={"rope_type": "default", "rope_theta": 5.0}))
    with pytest.raises(ThresholdsError, match="intermediate_size"):
        Server(monkeypatch, file, config=hf_config(intermediate_size=99))


def test_heads_that_cannot_be_divided_are_refused(monkeypatch, file):
    server = Server(monkeypatch, file)
    server.layers[1].impl.num_heads = HEADS // 2
    with pytest.raises(ThresholdsError, match="cannot be divided"):
        server.cuda.SplittingCUDABuilder(None, NAMES, server.config, "cpu")


def test_a_module_that_vllm_does_not_have_is_refused(monkeypatch, file):
    server = Server(monkeypatch, file)
    del server.context[NAMES[1]]
    with pytest.raises(ThresholdsError, match="model.layers.1.self_attn.*none of vLLM's"):
        server.cuda.SplittingCUDABuilder(None, NAMES[:1], server.config, "cpu")
    server.config.parallel_config.pipeline_parallel_size = 2  # it may lie on another rank
    server.cuda.SplittingCUDABuilder(None, NAMES[:1], server.config, "cpu")


def test_a_wrapped_layer_stays_with_flash_attention(monkeypatch, file):
    server = Server(monkeypatch, file)
    for layer in server.layers:
        layer.backend = type("ChunkedLocal", (server.cuda.SparseCUDABackend,), {})
    server.cuda.SplittingCUDABuilder(None, NAMES, server.config, "cpu")
    assert [layer.impl.serving.handler for layer in server.layers] == [None, None]


def test_a_layer_without_thresholds_stays_with_flash_attention(monkeypatch, file, caplog):
    server = Server(monkeypatch, file)
    backend = server.cuda.SparseCUDABackend
    extra = fakes.Layer(
        "draft.0.attn", backend.get_impl_cls()(HEADS, HEAD_DIM, 1.0, KV_HEADS, kv_cache_dtype="auto"), backend
    )
    server.context["draft.0.attn"] = extra
    server.config.model_config.hf_config = hf_config(intermediate_size=99)  # the drafter's own
    server.cuda.SplittingCUDABuilder(None, ["draft.0.attn"], server.config, "cpu")
    assert extra.impl.serving.handler is None and extra.impl.serving.counters is server.layers[0].impl.serving.counters
    assert "draft.0.attn" in caplog.text


def test_the_log_says_what_is_served(monkeypatch, file, caplog):
    caplog.set_level(logging.INFO, "vllm.bsfa")
    Server(monkeypatch, file)
    assert "point half (gap gate, tiles 32x64): 2 of 2 attention layers, matched by configuration" in caplog.text


def test_options_are_needed_and_versions_known(monkeypatch, file):
    for additional, version, words in (
        ({}, (0, 32, 0), "CUSTOM is bsfa's"),
        ({"bsfa": {"thresholds": str(file)}}, (0, 30, 2), "vLLM 0.30.2"),
    ):
        fakes.install(monkeypatch, fakes.Config(additional, None), version)
        cuda = importlib.import_module("bsfa_kernels.integrations.vllm.cuda")
        with pytest.raises(OptionsError, match=words):
            cuda.SparseCUDABackend.get_impl_cls()


@pytest.fixture(autouse=True)
def forget():
    yield
    sys.modules.pop("bsfa_kernels.integrations.vllm.cuda", None)
