"""Thresholds of a tensor-parallel model: two processes, each with a part of every layer's heads, on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.head_shards import head_shards
from bsfa_kernels.thresholds import Point, Thresholds
from tiny_models import batch, build
from torch import nn
from transformers import AutoModelForCausalLM

from bsfa_cli.models.bundled import BUNDLED

pytestmark = pytest.mark.long

LENGTH = 400
# olmo2 gathers its projections' outputs, so that every process computes all heads; granite-swa has attention sinks.
MODELS = ("llama", "qwen3", "olmo2", "granite-swa", "bundled")
PROCESSES = 2


def thresholds_for(model) -> Thresholds:
    """A gap gate with a value of its own for every head."""
    modules = bsfa.attention_modules(model)
    return Thresholds(
        {"id": "tiny", "revision": None, **bsfa.model_identity(model)}, TileShape(), True, (32, 4096),
        (Point("only", "gap", "by-hand", 0),),
        {path: torch.linspace(-1, 4, module.query_heads)[None, :, None].repeat(1, 1, 2)
         for path, module in modules.items()},
    )  # fmt: skip


@torch.no_grad()
def save(name: str, folder: Path) -> None:
    if name == "bundled":
        model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    else:
        model = build(name, vocab_size=98)  # transformers divides the output head too
    ids = batch(LENGTH, (0, 0))[0][:1]
    model.set_attn_implementation("bsfa")
    dense = model(ids, use_cache=False).logits
    thresholds = thresholds_for(model)
    bsfa.apply(model, thresholds, count=True)
    sparse = model(ids, use_cache=False).logits
    handlers = {path: bsfa.active(module) for path, module in model.named_modules() if bsfa.active(module)}
    kept, candidates = ({path: getattr(handler.counts, name).tolist() for path, handler in handlers.items()}
                        for name in ("kept", "candidates"))  # fmt: skip
    content = torch.frombuffer(bytearray(thresholds.to_bytes()), dtype=torch.uint8)
    bsfa.remove(model)
    model.save_pretrained(folder / name)
    torch.save({"thresholds": content, "ids": ids, "dense": dense, "sparse": sparse, "kept": kept,
                "candidates": candidates}, folder / name / "expected.pt")  # fmt: skip


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """(what one process found by model, what each of two found)."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in MODELS:
        save(name, folder)
    script = Path(__file__).with_name("tensor_parallel_ranks.py")
    done = subprocess.run([sys.executable, script, folder, str(PROCESSES)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {name: torch.load(folder / name / "expected.pt", weights_only=True) for name in MODELS}
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(PROCESSES)]
    return SimpleNamespace(alone=alone, ranks=ranks)


@pytest.mark.parametrize("name", MODELS)
def test_every_process_computes_what_one_process_computes(name, group):
    alone = group.alone[name]
    assert (alone["sparse"] - alone["dense"]).abs().max() > 1e-2 * alone["dense"].abs().max()
    for rank in group.ranks:
        assert rank[name]["dense"] < 1e-4 and rank[name]["sparse"] < 1e-4 and not rank[name]["notes"]


@pytest.mark.parametrize("name", MODELS)
def test_the_processes_count_the_tiles_of_their_own_heads(name, group):
    for what in ("kept", "candidates"):
        for path, expected in group.alone[name][what].items():
            parts = [rank[name][what][path] for rank in group.ranks]
            if name == "olmo2":
                assert all(part == expected for part in parts)
            else:
                assert sum(parts, []) == expected


def test_a_plan_that_divides_only_some_of_the_projections_is_refused(group):
    for rank in group.ranks:
        said = rank["refused"]["mixed"]
        assert "model.layers.0.self_attn: its tensor-parallel plan" in said and "k_proj 'colwise_gather_output'" in said


class Divided(nn.Linear):
    """A projection divided over `processes`, as far as head_shards looks."""

    def __init__(self, inputs: int, outputs: int, processes: int, rank: int):
        super().__init__(inputs, outputs)
        from torch.distributed.tensor import Shard

        mesh = SimpleNamespace(ndim=1, size=lambda: processes, get_local_rank=lambda: rank)
        del self.weight
        self.weight = SimpleNamespace(device_mesh=mesh, placements=(Shard(0),))


def divided(plan: dict, processes: int, rank: int = 1, **overrides):
    """(model, modules before it was divided)."""
    model = build("llama", **overrides)
    modules = bsfa.attention_modules(model)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, Divided(linear.in_features, linear.out_features, processes, rank))
    model._tp_plan, model._tp_size = plan, processes if plan else None
    return model, modules


PLAN = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
PLAN |= {"model.layers.*.self_attn.o_proj": "rowwise"}


def test_heads_are_contiguous_runs_with_their_key_value_heads():
    model, modules = divided(PLAN, 2, num_attention_heads=8, num_key_value_heads=2)
    assert list(head_shards(model, modules).values()) == 2 * [slice(4, 8)]


def test_heads_that_do_not_divide_are_refused():
    model, modules = divided(PLAN, 4)
    with pytest.raises(ValueError, match="4 query and 2 key-value heads do not divide over 4 processes"):
        head_shards(model, modules)


def test_key_value_heads_that_every_process_holds_are_refused():
    plan = {key: style for key, style in PLAN.items() if "k_proj" not in key and "v_proj" not in key}
    model, modules = divided(plan, 4)
    with pytest.raises(ValueError, match="k_proj None, o_proj 'rowwise', q_proj 'colwise', v_proj None"):
        head_shards(model, modules)


def test_weights_divided_without_a_plan_are_refused():
    model, modules = divided({}, 2)
    with pytest.raises(ValueError, match="not by a transformers tp_plan"):
        head_shards(model, modules)


def test_fused_projections_are_refused():
    model = build("llama")
    modules = bsfa.attention_modules(model)
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = nn.Linear(128, 512)
        for name in ("q_proj", "k_proj", "v_proj"):
            delattr(layer.self_attn, name)
    model._tp_plan, model._tp_size = {"model.layers.*.self_attn.qkv_proj": "packed_colwise"}, 2
    with pytest.raises(ValueError, match="qkv_proj 'packed_colwise'"):
        head_shards(model, modules)
    model._tp_plan = {"model.layers.*.self_attn.qkv_proj": "colwise_gather_output"}
    assert list(head_shards(model, modules).values()) == 2 * [slice(None)]
