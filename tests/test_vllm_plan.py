"""What vLLM's batches and layers are taken for, and its options; no vLLM needed (with one: test_vllm_engine.py)."""

import json
import logging
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.vllm import plan
from bsfa_kernels.integrations.vllm.counters import Counters, _short, folder
from bsfa_kernels.integrations.vllm.options import Options, OptionsError
from bsfa_kernels.integrations.vllm.plan import Batch, LayerFacts, Prefill
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds, ThresholdsError

PATHS = [f"model.layers.{i}.self_attn" for i in range(3)]


def thresholds(paths=PATHS, heads=4, points=("one",)) -> Thresholds:
    generator = torch.Generator().manual_seed(1)
    tensors = {path: torch.randn(len(points), heads, 1, generator=generator) for path in paths}
    identity = dict.fromkeys(MODEL_KEYS) | {"id": "test"}
    return Thresholds(identity, TileShape(), True, (0,), tuple(Point(p, "gap", "test", 0.0) for p in points), tensors)


def test_a_batch_is_taken_apart():
    # decoding, a whole prompt, a short chunk, a chunk behind a prefix, padding to a captured size
    batch = plan.take_apart([0, 1, 201, 231, 295, 295], [900, 200, 40, 1000, 0], least_rows=64)
    assert batch == Batch((Prefill(1, 1, 200, 200), Prefill(3, 231, 64, 1000)), (0, 2))
    assert [prefill.q_offset for prefill in batch.prefills] == [0, 936]
    assert plan.take_apart([0, 1, 2], [5, 6], 64) == Batch((), (0, 1))
    batch = plan.take_apart([0, 100, 200], [9000, 100], 64, lambda rows, keys: keys > 50 * rows)
    assert batch == Batch((Prefill(1, 100, 100, 100),), (0,))


@pytest.mark.parametrize("starts, lengths", [([0, 5], [4]), ([0, 5, 3], [9, 9]), ([0, 5], [5, 5])])
def test_what_is_no_batch_is_refused(starts, lengths):
    with pytest.raises(ValueError):
        plan.take_apart(starts, lengths, 64)


def test_rows_of_requests_side_by_side_are_a_slice():
    starts = [0, 1, 201, 231, 232]
    assert plan.token_rows(starts, [0, 1]) == slice(0, 201)
    assert plan.token_rows(starts, [2, 3]) == slice(201, 232)
    assert plan.token_rows(starts, [0, 3]) == [0, 231]


def test_heads_of_a_rank():
    assert [plan.head_slice(8, 2, rank, 4) for rank in range(4)] == [slice(i, i + 2) for i in (0, 2, 4, 6)]
    for heads, local, rank, size in ((8, 3, 0, 2), (8, 4, 2, 2), (8, 8, 0, 2)):
        with pytest.raises(ThresholdsError, match="cannot be divided"):
            plan.head_slice(heads, local, rank, size)
    whole = thresholds(points=("one", "two"))
    part = plan.of_heads(whole, "two", PATHS[1], slice(1, 3))
    assert [point.name for point in part.points] == ["two"]
    assert list(part.tensors) == [PATHS[1]] and torch.equal(part.tensors[PATHS[1]], whole.tensors[PATHS[1]][1:, 1:3])


@pytest.mark.parametrize(
    "layer, path",
    [
        ("model.layers.1.self_attn.attn", "model.layers.1.self_attn"),
        ("model.layers.11.self_attn.attn", None),
        ("transformer.h.0.attn.attn", "transformer.h.0.attn"),
        ("model.layers.0.attn.attn", "model.layers.0.self_attn"),
        ("model.layers.2.attn", "model.layers.2.self_attn"),
        ("language_model.model.layers.3.self_attn.attn", "model.language_model.layers.3.self_attn"),
        ("draft_model.model.layers.1.self_attn.attn", None),
        ("visual.blocks.0.attn.attn", None),
    ],
)
def test_layers_are_found_among_the_modules(layer, path):
    paths = [*PATHS, "transformer.h.0.attn", "model.language_model.layers.3.self_attn", "model.visual.blocks.0.attn"]
    assert plan.module_path(layer, paths) == path


def test_two_layers_are_not_one_module():
    layers = ["model.layers.0.self_attn.attn", "model.layers.0.attn"]
    with pytest.raises(ThresholdsError, match="more than one layer"):
        plan.module_paths(layers, PATHS)
    assert plan.module_paths(["model.layers.0.self_attn.attn", "lm_head"], PATHS) == {
        "model.layers.0.self_attn.attn": PATHS[0]
    }


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"attn_type": "encoder_decoder"}, "encoder_decoder"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"sliding_window": 4096}, "sliding window of 4096"),
        ({"logits_soft_cap": 50.0}, "soft-capped at 50"),
        ({"sinks": True}, "sinks"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache of fp8_e5m2"),
        ({"kv_cache_dtype": "turboquant"}, "KV cache of turboquant"),
        ({"others": {"chunk_lookback": 1}}, "chunk_lookback"),
        ({"others": {"brand_new": 0}}, "brand_new"),
    ],
)
def test_layers_that_vllms_kernel_keeps(facts, words):
    for fp8 in (False, True):
        assert words in plan.layer_reason(LayerFacts(**facts), fp8)


def test_layers_that_are_served():
    assert plan.layer_reason(LayerFacts(logits_soft_cap=0, others={"use_alibi_sqrt": False, "q": None}), False) is None
    fp8 = LayerFacts(kv_cache_dtype="fp8_e4m3")
    assert plan.layer_reason(fp8, fp8=True) is None and "fp8" in plan.layer_reason(fp8, fp8=False)


@pytest.mark.parametrize(
    "computed, new, total, wanted",
    [
        (0, 600, 1337, 576),
        (576, 600, 1337, 576),
        (1152, 185, 1337, 185),  # the prompt ends
        (576, 40, 1337, 40),  # less than a tile: go on
        (600, 100, 1337, 40),  # to the end of the tile that an earlier chunk broke
        (640, 64, 1337, 64),
    ],
)
def test_chunks_end_at_tiles(computed, new, total, wanted):
    assert plan.round_to_tiles(computed, new, total, 64) == wanted


def test_options():
    assert Options.of({}) is None and Options.of({"other": 1}) is None and Options.of(None) is None
    assert Options.of({"bsfa": {"thresholds": "f", "point": None}}) == Options("f")
    assert Options.of({"bsfa": {"thresholds": "f", "point": "p", "log_every": 3}}).log_every == 3
    options = Options("f")
    for version in ((0, 32, 0), (0, 33, 1, "dev")):
        options.check_version(version)
    for version in ((0, 31, 0), (0, 34, 0), (1, 32, 0)):
        with pytest.raises(OptionsError, match="any_version"):
            options.check_version(version)
        Options("f", any_version=True).check_version(version)


@pytest.mark.parametrize(
    "given, words",
    [
        ("f", "must be an object"),
        ({}, "needs"),
        ({"thresholds": ""}, "needs"),
        ({"thresholds": 3}, "thresholds must be text, got 3"),
        ({"thresholds": "f", "pont": "p"}, "'pont'.*thresholds, point"),
        ({"thresholds": "f", "log_every": True}, "log_every must be a number of seconds"),
        ({"thresholds": "f", "log_every": -1}, "must be 0 seconds or more"),
        ({"thresholds": "f", "log_every": float("nan")}, "must be 0 seconds or more"),
        ({"thresholds": "f", "any_version": "yes"}, "true or false"),
    ],
)
def test_bad_options(given, words):
    with pytest.raises(OptionsError, match=words):
        Options.of({"bsfa": given})


def test_options_a_gpu_would_ignore_are_refused():
    def config(device, backend, kinds=None):
        attention = SimpleNamespace(backend=backend, backend_per_kind=kinds)
        return SimpleNamespace(attention_config=attention, device_config=SimpleNamespace(device_type=device))

    for refused in (config("cuda", None), config("cuda", SimpleNamespace(name="FLASHINFER"))):
        with pytest.raises(OptionsError, match="--attention-backend CUSTOM"):
            Options.check_backend(refused)
    custom = SimpleNamespace(name="CUSTOM")
    for fine in (config("cpu", None), config("cuda", custom), config("cuda", None, {"full_attention": custom})):
        Options.check_backend(fine)


def test_a_thresholds_file_is_read_anew_when_it_changes(tmp_path):
    file = tmp_path / "t.safetensors"
    with pytest.raises(ThresholdsError, match="cannot read"):
        Options(str(file)).read()
    for stamp, points in ((1, ("a",)), (2, ("a", "b"))):
        thresholds(points=points).write(file)
        os.utime(file, ns=(stamp, stamp))
        assert [point.name for point in Options(str(file), "a").read().points] == list(points)
    with pytest.raises(ThresholdsError, match="choose one of: a, b"):
        Options(str(file)).read()


def test_points_for_int8_scores_are_refused(tmp_path):
    made = thresholds(points=("fine", "coarse"))
    coarse = replace(made.points[1], scores="int8", exact_heads={PATHS[0]: [3]})
    replace(made, points=(made.points[0], coarse)).write(tmp_path / "t.safetensors")
    with pytest.raises(ThresholdsError, match="coarse is for int8 scores"):
        Options(str(tmp_path / "t.safetensors"), "coarse").read()
    read = Options(str(tmp_path / "t.safetensors"), "fine").read()
    plan.of_heads(read, "fine", PATHS[0], slice(0, 2))  # without the other point's heads


class Handler:
    def __init__(self, kept, candidates):
        self.counts = torch.tensor([kept]), torch.tensor([candidates])


@pytest.fixture
def counters(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    counters = Counters("abc", 0, 2, 0.01)
    counters.served.update({"model.layers.0.attn": Handler(25, 100), "model.layers.10.attn": Handler(100, 100)})
    return counters


def test_counts_are_logged_and_left_for_the_server(counters, caplog):
    caplog.set_level(logging.INFO, "vllm.bsfa")
    for _ in range(2):
        counters.passed_over("model.layers.1.attn", "sliding window of 9 tokens", 3)
    counters.report()
    counters.report()  # nothing new
    warned, line = (record.getMessage() for record in caplog.records)
    assert "model.layers.1.attn" in warned and "sliding window of 9 tokens" in warned
    assert "skipped 37.5% of 200 tiles" in line and "0: 75.0%, 10: 0.0%" in line
    assert "rank 0 of 2" in line and line.endswith("vLLM's kernel 6")
    (file,) = folder("abc").iterdir()
    assert json.loads(file.read_text()) == {
        "rank": 0,
        "tiles": {"model.layers.0.attn": [25, 100], "model.layers.10.attn": [100, 100]},
        "passed": [["model.layers.1.attn", "sliding window of 9 tokens", 6]],
    }
    counters.served["model.layers.0.attn"] = Handler(25, 300)
    counters.report()
    assert "skipped 100.0% of 200 tiles" in caplog.records[-1].getMessage()
    counters.close()
    assert not folder("abc").exists()


def test_a_thread_reports_when_there_is_news(counters):
    counters.start()
    assert not folder("abc").exists()
    counters.came()
    for _ in range(500):
        if folder("abc").exists() and list(folder("abc").glob("*.json")):
            break
        time.sleep(0.01)
    assert [file.name.startswith("rank-0-") for file in folder("abc").iterdir()] == [True]
    counters.close()


def test_the_last_counts_are_logged_when_the_process_ends(counters, caplog):
    caplog.set_level(logging.INFO, "vllm.bsfa")
    counters.close()
    assert not caplog.records
    counters.came()
    counters.close()
    assert "skipped 37.5%" in caplog.text and not folder("abc").exists()


def test_names_are_short():
    assert _short(["model.layers.1.attn", "model.layers.10.attn"]) == ["1", "10"]
    assert _short(["one"]) == ["one"] and _short([]) == []
    assert _short(["a.b", "a.b.c"]) == ["b", "b.c"]
