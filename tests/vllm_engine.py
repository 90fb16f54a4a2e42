"""A vLLM engine with bsfa, in the venv that `make vllm` makes: one process that runs everything the tests ask about.

    .venv-vllm/bin/python tests/vllm_engine.py FOLDER MODEL      writes thresholds.safetensors, then found.json there

No pytest and nothing of bsfa_cli here. One engine in float32; between runs the layers' handlers are exchanged.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    TORCHDYNAMO_DISABLE="1",  # a sampler's helpers would be compiled
)  # fmt: skip

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations import transformers as bsfa
from bsfa_kernels.integrations.sparse import SparseAttention
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

POINTS = ("keep", "real", "absurd")
BUDGET = 600  # tokens a step: no multiple of a query tile
BLOCK = 128
TOKENS = 8


def prompts() -> dict[str, list[int]]:
    """Token ids: three prompts, the last of which begins as the first does."""
    generator = torch.Generator().manual_seed(19)
    draw = [torch.randint(10, 1200, (length,), generator=generator).tolist() for length in (1337, 700, 200)]
    return {"long": draw[0], "short": draw[1], "shared": draw[0][: 7 * BLOCK] + draw[2]}


def make_thresholds(model) -> Thresholds:
    """Gap gates: all open; one of a value for each layer and head; and one that drops whatever it may."""
    generator = torch.Generator().manual_seed(20)
    tensors = {}
    for path, module in bsfa.attention_modules(model).items():
        real = -1.5 - 3 * torch.rand(module.query_heads, generator=generator)
        tensors[path] = torch.stack([torch.full_like(real, -torch.inf), real, torch.full_like(real, 1e4)])[..., None]
    found = bsfa.model_identity(model)
    points = tuple(Point(name, "gap", "test", 0.0) for name in POINTS)
    identity = {key: found.get(key) for key in MODEL_KEYS} | {"id": "test"}
    return Thresholds(identity, TileShape(), True, (0,), points, tensors)


@torch.no_grad()
def transformers_log_probabilities(model, ids: list[int], thresholds: Thresholds | None) -> tuple[list[float], float]:
    """(log-probability of each prompt token but the first, skip rate) in transformers at the real point."""
    with bsfa.apply(model, thresholds, "real", count=True):
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), bsfa.skip_rate(model)


class Engine:
    """vLLM's LLM, whose layers can be told to serve another point, or none."""

    def __init__(self, model: Path, thresholds: Path):
        from vllm import LLM

        self.thresholds = Thresholds.read(thresholds)
        self.llm = LLM(
            str(model), dtype="float32", enforce_eager=True, max_model_len=2048, max_num_batched_tokens=BUDGET,
            max_num_seqs=8, block_size=BLOCK, seed=0,
            scheduler_cls="bsfa_kernels.integrations.vllm.TileScheduler",
            additional_config={"bsfa": {"thresholds": str(thresholds), "point": "keep", "log_every": 3600}},
        )  # fmt: skip
        config = self.llm.llm_engine.vllm_config
        self.layers = list(config.compilation_config.static_forward_context.values())
        self.serving = [layer.impl.serving for layer in self.layers]
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler

    def serve(self, point: str | None, rounds: bool = True) -> None:
        """Serve `point` (None: vLLM's own kernel serves all), prefix cache empty; chunks in whole tiles or not."""
        for layer, serving in zip(self.layers, self.serving, strict=True):
            handler = serving.handler
            if point is not None:
                handler = SparseAttention(self.thresholds, point, handler.path, count=True, longest=2048)
            layer.impl.serving = None if point is None else serving._replace(handler=handler)
            serving.counters.served[serving.layer] = handler
        self.serving[0].counters._logged = (0, 0)  # counts begin anew
        self.scheduler.tile_rows = self.thresholds.tile.rows if rounds else None
        self.llm.reset_prefix_cache()

    def generate(self, *prompts: list[int], **sampling):
        from vllm import SamplingParams

        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **sampling}
        return self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**sampling), use_tqdm=False
        )

    def tokens(self, *prompts: list[int]) -> list[list[int]]:
        return [list(result.outputs[0].token_ids) for result in self.generate(*prompts)]

    def log_probabilities(self, ids: list[int]) -> list[float]:
        """Of each prompt token but the first."""
        (result,) = self.generate(ids, prompt_logprobs=0, max_tokens=1)
        return [step[token].logprob for token, step in zip(ids[1:], result.prompt_logprobs[1:], strict=True)]

    def tiles(self) -> tuple[int, int]:
        pairs = [layer.impl.serving.handler.counts for layer in self.layers]
        return tuple(sum(int(counts[i].sum()) for counts in pairs) for i in range(2))


def continued(engine: Engine, ids: list[int]) -> dict:
    (result,) = engine.generate(ids, logprobs=0)
    step = result.outputs[0]
    return {
        "cached": result.num_cached_tokens,
        "tokens": list(step.token_ids),
        "log_probabilities": [s[t].logprob for t, s in zip(step.token_ids, step.logprobs, strict=True)],
    }


def cuda_interface() -> dict:
    """What cuda.py and its unit tests suppose of vLLM, as this vLLM has it."""
    import dataclasses
    import inspect

    from bsfa_kernels.integrations.vllm import cuda
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import flash_attn

    def arguments(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    methods = [("FlashAttentionImpl", name) for name in ("__init__", "forward")]
    methods += [("FlashAttentionMetadataBuilder", name) for name in ("__init__", "build", "update_block_table")]
    return {
        "name": cuda.SparseCUDABackend.get_name(),
        "pages": [cuda.SparseCUDABackend.get_preferred_block_size(size) for size in (16, 128, 256)],
        "graphs": cuda.SplittingCUDABuilder._cudagraph_support.name,
        "forward": arguments(cuda.SparseCUDALayer.forward),
        "forward of vLLM": arguments(flash_attn.FlashAttentionImpl.forward),
        "common": [field.name for field in dataclasses.fields(CommonAttentionMetadata)],
        "arguments": {f"{kind}.{name}": arguments(getattr(getattr(flash_attn, kind), name)) for kind, name in methods},
    }


def main(folder: Path, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    texts = prompts()
    found = {"prompts": texts, "cuda": cuda_interface()}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    thresholds = make_thresholds(loaded)
    thresholds.write(folder / "thresholds.safetensors")
    expected, skip = transformers_log_probabilities(loaded, texts["long"], thresholds)
    found["transformers"] = {"log_probabilities": expected, "skip": skip}

    engine = Engine(model, folder / "thresholds.safetensors")
    for name, point in (("stock", None), ("keep", "keep"), ("absurd", "absurd"), ("real", "real")):
        engine.serve(point)
        found[f"tokens {name}"] = engine.tokens(*texts.values())
    engine.serve("keep", rounds=False)  # chunks that end inside query tiles
    found["tokens keep, ragged"] = engine.tokens(*texts.values())
    for name, rounds in (("whole tiles", True), ("ragged", False)):
        engine.serve("real", rounds)
        found[name] = {"log_probabilities": engine.log_probabilities(texts["long"])}
        found[name]["kept"], found[name]["candidates"] = engine.tiles()
        engine.serving[0].counters.report()
    engine.serve("real")
    found["prefix missed"] = continued(engine, texts["shared"])
    found["prefix hit"] = continued(engine, texts["shared"])
    engine.serve("real")
    engine.tokens(texts["long"])
    found["prefix of another"] = continued(engine, texts["shared"])
    found["passed"] = [[*key, count] for key, count in engine.serving[0].counters.passed.items()]
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
