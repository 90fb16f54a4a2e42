"""The SGLang backend against SGLang's interface as it was read (0.5.23): a registry, a pool, batches made up here."""

import logging
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations import plan as planner
from bsfa_kernels.integrations import sglang as backend_module
from bsfa_kernels.integrations.dense import attention
from bsfa_kernels.integrations.sparse import SparseAttention
from bsfa_kernels.request import make_spans
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds, ThresholdsError
from transformers import LlamaConfig

HEADS, KV_HEADS, DIM, LAYERS, SLOTS = 4, 2, 64, 2, 4096
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, hidden_size=256,
    architectures=["LlamaForCausalLM"],
)  # fmt: skip
Mode = Enum("ForwardMode", "EXTEND DECODE MIXED TARGET_VERIFY")
Kind = Enum("AttentionType", {"DECODER": "decoder", "ENCODER_ONLY": "encoder_only"})


class MHATokenToKVPool:
    """Keys and values [slots, Hkv, D] of every layer."""

    def __init__(self, heads=KV_HEADS, dtype=torch.float32):
        self.dtype = self.store_dtype = dtype
        self.buffers = torch.full((LAYERS, 2, SLOTS, heads, DIM), float("nan"), dtype=dtype)

    def set_kv_buffer(self, layer, loc, k, v):
        self.buffers[layer.layer_id, 0, loc.loc], self.buffers[layer.layer_id, 1, loc.loc] = k, v

    def get_kv_buffer(self, layer_id):
        return self.buffers[layer_id].unbind(0)


class KVWriteLoc:
    def __init__(self, loc):
        self.loc = loc

    @classmethod
    def for_batch(cls, forward_batch):
        return cls(forward_batch.out_cache_loc)


class Stock:
    """Dense attention, and a record of its calls."""

    def __init__(self, runner):
        self.runner, self.calls = runner, 0

    def forward_decode(self, *_):
        return "decoded"

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **options):
        self.calls += 1
        return torch.zeros_like(q)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """(registry, choices, parallel state); SGLang's modules are made up, and a thresholds file is configured."""
    backends, choices = {"triton": Stock, "fa3": Stock}, ["triton", "fa3"]
    parallel = SimpleNamespace(attn_tp_rank=0, attn_tp_size=1, attn_cp_size=1, attn_dcp_size=1)

    def register_attention_backend(name):
        return lambda make: backends.setdefault(name, make)

    content = {
        "arg_groups.choices": dict(ATTENTION_BACKEND_CHOICES=choices, add_attention_backend_choices=choices.extend),
        "layers.attention.attention_registry": dict(
            ATTENTION_BACKENDS=backends, register_attention_backend=register_attention_backend),
        "mem_cache.memory_pool": dict(MHATokenToKVPool=MHATokenToKVPool, KVWriteLoc=KVWriteLoc),
        "runtime_context": dict(get_parallel=lambda: parallel),
    }  # fmt: skip
    for name, members in content.items():
        parts = f"sglang.srt.{name}".split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module := ModuleType(".".join(parts[:i])))
        vars(module).update(members)
    thresholds().write(tmp_path / "t.safetensors")
    monkeypatch.setenv("SGLANG_BSFA_THRESHOLDS", str(tmp_path / "t.safetensors"))
    return SimpleNamespace(backends=backends, choices=choices, parallel=parallel, path=tmp_path / "t.safetensors")


def thresholds(**model) -> Thresholds:
    """Another gap for every head."""
    return Thresholds(
        dict.fromkeys(MODEL_KEYS) | {"id": "tiny"} | backend_module.identity(CONFIG) | model, TileShape(), True,
        (32, 4096), (Point("only", "gap", "by-hand", 0),),
        {f"model.layers.{i}.self_attn": torch.linspace(-1, 3, HEADS)[None, :, None].repeat(1, 1, 2)
         for i in range(LAYERS)},
    )  # fmt: skip


def make_runner(heads=KV_HEADS):
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=CONFIG, context_len=2048), decode_attention_backend_str="fa3",
        token_to_kv_pool=MHATokenToKVPool(heads), kv_index_translator=SimpleNamespace(is_translating=False),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.randperm(SLOTS).view(4, 1024).int()),
    )  # fmt: skip


def make_layer(heads=HEADS, kv_heads=KV_HEADS, **changes):
    plain = dict(
        layer_id=1, tp_q_head_num=heads, tp_k_head_num=kv_heads, qk_head_dim=DIM, v_head_dim=DIM, scaling=0.3,
        logit_cap=0.0, sliding_window_size=-1, is_cross_attention=False, attn_type=Kind.DECODER, k_scale=None,
        v_scale=None, use_irope=False, pos_encoding_mode="NONE", xai_temperature_len=-1,
    )  # fmt: skip
    return SimpleNamespace(**plain | changes)


def make_batch(runner, prefixes, rows, requests=None, **changes):
    requests = list(range(len(rows))) if requests is None else requests
    table = runner.req_to_token_pool.req_to_token
    at = [table[r, p : p + n] for r, p, n in zip(requests, prefixes, rows, strict=True)]
    plain = dict(
        forward_mode=Mode.EXTEND, extend_prefix_lens_cpu=prefixes, extend_seq_lens_cpu=rows,
        req_pool_indices=torch.tensor(requests), out_cache_loc=torch.cat(at).long(), encoder_lens=None, spec_info=None,
    )  # fmt: skip
    return SimpleNamespace(**plain | changes)


def inputs(rows, heads=HEADS, kv_heads=KV_HEADS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, h, DIM, generator=generator) for h in (heads, kv_heads, kv_heads))
    return 1.5 * q.flatten(1), k, v


def expected(q, k, v, heads=slice(None), prefix=0):
    """One sequence by the handler itself: q [rows, Hq * D], k and v [Tk, Hkv, D]."""
    handler = SparseAttention(thresholds(), None, "model.layers.1.self_attn", heads=heads)
    q = q.view(1, len(q), -1, DIM).transpose(1, 2)
    k, v = k[None].transpose(1, 2), v[None].transpose(1, 2)
    out = handler(q, k, v, scale=0.3, causal=True, spans=make_spans(1, prefix))
    dense = attention(q, k, v, scale=0.3, causal=True, spans=make_spans(1, prefix, 0, k.shape[2]))
    assert not torch.equal(out, dense) and (out - dense).norm() < dense.norm()
    return out[0].transpose(0, 1).flatten(1)


def create(engine, runner=None):
    backend_module.register()
    return engine.backends["bsfa"](runner or make_runner())


def test_the_plug_in_makes_the_name_known(engine):
    backend_module.register()
    backend_module.register()
    assert engine.choices == ["triton", "fa3", "bsfa"] and engine.backends["bsfa"] is backend_module.create


def test_the_entry_point_is_declared():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["sglang.srt.plugins"]["bsfa"].split(":")
    assert module == backend_module.__name__ and name == backend_module.register.__name__


def test_it_is_the_stock_backend_but_for_extending(engine):
    backend = create(engine)
    assert isinstance(backend, Stock) and backend.forward_decode() == "decoded"


def test_sequences_of_a_batch_are_judged_one_by_one(engine):
    runner = make_runner()
    backend = create(engine, runner)
    q, k, v = inputs(400 + 130)
    out = backend.forward_extend(q, k, v, make_layer(), make_batch(runner, [0, 0], [400, 130]))
    parts = [expected(q[s], k[s], v[s]) for s in (slice(0, 400), slice(400, 530))]
    assert torch.equal(out, torch.cat(parts)) and backend.calls == 0


def test_a_cached_prefix_and_a_later_chunk(engine):
    runner = make_runner()
    backend = create(engine, runner)
    q, k, v = inputs(700)
    for start, end in ((0, 256), (256, 700)):
        out = backend.forward_extend(q[start:end], k[start:end], v[start:end], make_layer(),
                                     make_batch(runner, [start], [end - start]))  # fmt: skip
        assert torch.equal(out, expected(q[start:end], k[:end], v[:end], prefix=start))


def test_a_process_judges_its_own_heads(engine):
    engine.parallel.attn_tp_rank, engine.parallel.attn_tp_size = 1, 2
    runner = make_runner(1)
    backend = create(engine, runner)
    q, k, v = inputs(300, 2, 1)
    out = backend.forward_extend(q, k, v, make_layer(2, 1), make_batch(runner, [0], [300]))
    assert torch.equal(out, expected(q, k, v, slice(2, 4)))


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(layer=dict(is_cross_attention=True)), "cross-attention"),
        (dict(layer=dict(attn_type=Kind.ENCODER_ONLY)), "attention of type encoder_only"),
        (dict(layer=dict(sliding_window_size=128)), "sliding window of 128 tokens"),
        (dict(layer=dict(logit_cap=30.0)), "soft-capped at 30"),
        (dict(layer=dict(v_head_dim=32)), "differ in head dim"),
        (dict(layer=dict(k_scale=2.0)), "the layer has k_scale"),
        (dict(layer=dict(use_irope=True)), "the layer has use_irope"),
        (dict(layer=dict(xai_temperature_len=9)), "temperature by length"),
        (dict(layer=dict(layer_id=7)), "layer 7 has no thresholds"),
        (dict(layer=dict(tp_q_head_num=8)), "8 query heads on each of 1 processes are not the 4"),
        (dict(batch=dict(forward_mode=Mode.MIXED)), "batches of mode MIXED"),
        (dict(batch=dict(forward_mode=Mode.TARGET_VERIFY)), "batches of mode TARGET_VERIFY"),
        (dict(batch=dict(spec_info=object())), "the batch has spec_info"),
        (dict(batch=dict(token_type_ids=torch.zeros(1))), "the batch has token_type_ids"),
        (dict(batch=dict(extend_seq_lens_cpu=None)), "does not say its lengths"),
        (dict(batch=dict(extend_seq_lens_cpu=[200])), "rows of no sequence"),
        (dict(options=dict(sinks=torch.zeros(4))), "the call has sinks"),
        (dict(options=dict(save_kv_cache=False)), "in the pool already"),
        (dict(parallel=dict(attn_cp_size=2)), "divided over processes"),
        (dict(translating=True), "a unified key-value pool"),
        (dict(pool=torch.float16), "a key-value cache of torch.float16"),
        (dict(pool=type("SWAKVPool", (MHATokenToKVPool,), {})), "a key-value pool of type SWAKVPool"),
        (dict(rows=20), "calls of fewer than 64 queries"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_goes_to_the_stock_backend_with_one_note(change, reason, engine, caplog):
    runner, rows = make_runner(), change.get("rows", 300)
    vars(engine.parallel).update(change.get("parallel", {}))
    runner.kv_index_translator.is_translating = change.get("translating", False)
    pool = change.get("pool")
    if pool is not None:
        runner.token_to_kv_pool = pool() if isinstance(pool, type) else MHATokenToKVPool(dtype=pool)
    backend = create(engine, runner)
    layer = make_layer(**change.get("layer", {}))
    q, k, v = inputs(rows, layer.tp_q_head_num)
    batch = make_batch(runner, [0], [rows])
    vars(batch).update(change.get("batch", {}))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            backend.forward_extend(q, k, v, layer, batch, **change.get("options", {}))
    assert backend.calls == 2
    said = [record.getMessage() for record in caplog.records if "run SGLang's own attention" in record.getMessage()]
    assert len(said) == 1 and reason in said[0]


@pytest.mark.parametrize(("rows", "stock"), [([100, 200], 1), ([100, 300], 0)])
def test_short_chunks_alone_go_to_the_stock_backend(rows, stock, engine, monkeypatch):
    asked = []

    def few(rows, keys, heads, device):
        asked.append((rows, keys, heads))
        return rows <= 200

    monkeypatch.setattr(backend_module, "few_queries", few)
    runner = make_runner()
    backend = create(engine, runner)
    prefixes = [500, 600]
    backend.forward_extend(*inputs(sum(rows)), make_layer(), make_batch(runner, prefixes, rows))
    assert backend.calls == stock
    assert asked == [(n, prefix + n, HEADS) for n, prefix in zip(rows, prefixes, strict=True)]


def test_many_short_prompts_are_not_few_queries_of_many_keys(engine, monkeypatch):
    monkeypatch.setattr(planner, "_few", lambda call, tile: call.k.shape[2] >= 2 * call.q.shape[2])
    runner = make_runner()
    backend = create(engine, runner)
    backend.forward_extend(*inputs(300), make_layer(), make_batch(runner, [0] * 3, [100] * 3))
    assert backend.calls == 0


def test_settings_that_cannot_be_meant_are_refused(engine, monkeypatch):
    backend_module.register()
    make = engine.backends["bsfa"]
    monkeypatch.setenv("SGLANG_BSFA_STOCK", "bsfa")
    with pytest.raises(ValueError, match="must be one of fa3, triton"):
        make(make_runner())
    monkeypatch.delenv("SGLANG_BSFA_STOCK")
    monkeypatch.setenv("SGLANG_BSFA_POINT", "skip-90")
    with pytest.raises(ThresholdsError, match="no point 'skip-90' of: only"):
        make(make_runner())
    monkeypatch.delenv("SGLANG_BSFA_POINT")
    thresholds(head_dim=128).write(engine.path)
    with pytest.raises(ThresholdsError, match="head_dim is 128 there and 64 here"):
        make(make_runner())
    monkeypatch.delenv("SGLANG_BSFA_THRESHOLDS")
    with pytest.raises(ValueError, match="needs SGLANG_BSFA_THRESHOLDS"):
        make(make_runner())


def test_modules_must_be_one_for_each_layer():
    assert backend_module.layer_paths(["model.layers.3.self_attn", "model.layers.12.self_attn"]).keys() == {3, 12}
    for paths in (["visual.merger.attn"], ["a.layers.1.attn", "b.layers.1.attn"]):
        with pytest.raises(ValueError, match="not the only one"):
            backend_module.layer_paths(paths)
