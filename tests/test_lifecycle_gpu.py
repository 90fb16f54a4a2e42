"""Models with thresholds on a GPU: graphs, streams, threads, other GPUs, and what the planner does there."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from test_lifecycle import thresholds_for
from tiny_models import batch, build, chunk
from transformers import DynamicCache

pytestmark = pytest.mark.gpu
LENGTH = 1500


def on(device: str, name: str = "llama", **overrides):
    return build(name, (device, torch.bfloat16), **overrides)


def run(model, ids, **options):
    with torch.no_grad():
        return model(ids.to(model.device), use_cache=False, **options).logits


def applied(model):
    bsfa.apply(model, thresholds_for(model, 3.0), count=True)
    return model, batch(LENGTH, (0, 0))[0][:1]


@pytest.mark.parametrize("masked", [False, True])
def test_a_graph_of_a_model_replays_and_counts(masked):
    model, ids = applied(on("cuda", max_position_embeddings=4 * LENGTH))
    ids = ids.cuda()
    # Without mask and cache transformers takes a captured prompt for packed sequences.
    mask = torch.ones_like(ids) if masked else None
    eager = run(model, ids, attention_mask=mask)  # and compiles
    once = bsfa.active(model.model.layers[0].self_attn).counts.candidates.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    run(model, batch(3 * LENGTH, (0, 0))[0])  # a longer prompt moves no buffer that the graph reads
    handler = bsfa.active(model.model.layers[0].self_attn)
    handler.reset()
    captured.zero_()
    for replays in (1, 2):
        graph.replay()
        assert torch.equal(handler.counts.candidates, replays * once)
    assert torch.equal(captured, eager) and bsfa.skip_rate(model) > 0.05


def test_threads_and_streams_count_every_tile():
    model, ids = applied(on("cuda"))
    prompts = [ids[:, :n].cuda() for n in (400, 800, 1200, LENGTH)]
    alone = [run(model, prompt) for prompt in prompts]
    handler = bsfa.active(model.model.layers[0].self_attn)
    once = handler.counts.candidates.clone()
    handler.reset()
    torch.cuda.synchronize()

    def work(prompt):
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [run(model, prompt) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(work, prompts), alone, strict=True):
            assert all(torch.equal(result, expected) for result in results)
    torch.cuda.synchronize()
    assert torch.equal(handler.counts.candidates, 20 * once)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_and_one_over_two():
    model, ids = applied(on("cuda"))
    expected = run(model, ids)
    twin, _ = applied(on("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(run(twin, ids).cpu(), expected.cpu()) and bsfa.skip_rate(twin) == bsfa.skip_rate(model)
    accelerate = pytest.importorskip("accelerate")
    split = on("cpu")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
              "model.norm": 1, "lm_head": 1}  # fmt: skip
    split = accelerate.dispatch_model(split, places)
    bsfa.apply(split, thresholds_for(split, 3.0), count=True)
    for mask in (None, torch.ones_like(ids)):
        assert torch.equal(run(split, ids, attention_mask=mask).cpu(), expected.cpu())
    assert abs(bsfa.skip_rate(split) - bsfa.skip_rate(model)) < 1e-12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current", [0, 1])
def test_streams_of_a_model_over_two_gpus(current):
    """Each layer's gate lies on its own GPU, and calls on streams of their own, whatever GPU is current, agree."""
    model, ids = applied(on("cuda"))
    expected = run(model, ids).cpu()
    accelerate = pytest.importorskip("accelerate")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1,
              "model.norm": 1, "lm_head": 1}  # fmt: skip
    split = accelerate.dispatch_model(on("cpu"), places)
    bsfa.apply(split, thresholds_for(split, 3.0), count=True)
    for layer in (0, 1):
        assert bsfa.active(split.model.layers[layer].self_attn).counts.kept.device == torch.device("cuda", layer)
    run(split, ids)  # compiles
    once = bsfa.skip_rate(split)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    with ExitStack() as stack:
        for place in (1 - current, current):  # a stream's device becomes the current one
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(place)))
        results = [run(split, ids) for _ in range(5)]
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
    assert all(torch.equal(result.cpu(), expected) for result in results)
    assert bsfa.skip_rate(split) == once


@pytest.mark.parametrize("head_dim", [36, 320])
def test_a_head_dim_without_a_fused_kernel_runs_the_librarys_attention(head_dim):
    model, ids = applied(on("cuda", head_dim=head_dim))
    sparse = run(model, ids)
    bsfa.remove(model)
    assert torch.equal(sparse, run(model, ids))
    notes = bsfa.notes(model)
    assert {note.route for note in notes} == {"library"} and not any(note.expected for note in notes)
    assert all(
        f"no fused kernel: head dim {head_dim} is not a multiple of 8 up to 256" in note.reason for note in notes
    )


def test_a_wide_head_is_judged_on_hopper_and_elsewhere_the_librarys_attention_is_faster():
    model, ids = applied(on("cuda", head_dim=256))
    sparse = run(model, ids)
    if torch.cuda.get_device_capability() == (9, 0):
        assert bsfa.skip_rate(model) > 0.05 and not bsfa.notes(model)
        return
    bsfa.remove(model)
    assert torch.equal(sparse, run(model, ids))
    assert {(note.route, note.expected) for note in bsfa.notes(model)} == {("library", False)}


def test_a_short_chunk_of_a_long_prompt_keeps_every_tile_on_our_kernel():
    model, ids = applied(on("cuda"))
    ids, mask = ids.cuda(), torch.ones_like(ids).cuda()
    model.set_attn_implementation("bsfa")
    cache = DynamicCache(config=model.config)
    chunk(model, ids, mask, 0, 1400, cache)
    judged = bsfa.active(model.model.layers[0].self_attn).counts.candidates.sum().item()
    chunk(model, ids, mask, 1400, 1420, cache)
    assert bsfa.active(model.model.layers[0].self_attn).counts.candidates.sum().item() == judged
    assert "kept" in {note.route for note in bsfa.notes(model)}


def test_autocast_keeps_the_fused_kernel():
    model, ids = applied(build("llama", ("cuda", torch.float32)))
    with torch.autocast("cuda", torch.bfloat16):
        run(model, ids)
    assert bsfa.skip_rate(model) > 0.05 and all(note.expected for note in bsfa.notes(model))
