"""Several GPUs of one host: a tensor-parallel prefill, and calibration by several processes.

    torchrun --standalone --nproc-per-node 2 -m bsfa_cli.experiments.several_gpus prefill --out FILE.json
    python -m bsfa_cli.experiments.several_gpus calibrate --processes 1,2 --out FILE.json

prefill: layers of Llama-70B's shape with random weights, one prompt: PyTorch's attention (both of its kernels) and bsfa
at several skip rates take turns, first on one GPU, then divided over all; outputs and counts are compared. Random
weights say nothing about accuracy: the gates are one gap for all heads that skips what was asked for.
calibrate: `bsfa calibrate` of a model of Llama-8B's shape with random weights by one process and by several; the runs
must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..environment import describe
from ..errors import GateFailed, MachineError, UsageError
from ..files import check_writable, write_json
from ..timing.interleave import Timing
from . import end

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast is not for every host
SHAPES = {
    "llama-70b": dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
}
VOCABULARY, SPREAD = 1024, 3.0  # scores with a spread of some units
KEEPS_ALL, BISECTIONS, TOKEN_SEED = -1e4, 12, 1
FILES = ("run.json", "fit.safetensors", "heldout.safetensors")


def build(shape: str, layers: int, length: int, device: torch.device, vocabulary: int = VOCABULARY):
    """The same model on every process: random weights in bfloat16 (float32 on a CPU) from one seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=length, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, **SHAPES[shape],
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = model.to(dtype).to_empty(device=device).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = SPREAD**0.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            if parameter.dim() == 2:
                parameter.normal_(0, scale * parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1)
    return model


class Plan(NamedTuple):
    """What runs: PyTorch's attention by the named kernel (None: its own choice), or bsfa with one gap in every head."""

    gap: float | None = None
    kernel: str | None = None


class Prefill:
    """One model and one prompt."""

    def __init__(self, model, length: int, device: torch.device):
        self.model, self.attached, self.kernel = model, [], None
        generator = torch.Generator().manual_seed(TOKEN_SEED)
        self.ids = torch.randint(3, VOCABULARY, (1, length), generator=generator).to(device)

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        with nullcontext() if self.kernel is None else sdpa_kernel(getattr(SDPBackend, self.kernel)):
            return self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits.float()

    def use(self, plan: Plan, count: bool = False) -> dict:
        """Choose what runs; returns {module path: handler}."""
        from bsfa_kernels import TileShape
        from bsfa_kernels.integrations.head_shards import head_shards
        from bsfa_kernels.integrations.transformers import SparseAttention, attach, attention_modules
        from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

        gap, self.kernel = plan
        while self.attached:
            self.attached.pop().detach()
        implementation = "sdpa" if gap is None else "bsfa"
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
        if gap is None:
            return {}
        modules = attention_modules(self.model)
        tensors = {path: torch.full((1, module.query_heads, 1), gap) for path, module in modules.items()}
        point, model = Point("only", "gap", "by-hand", gap), dict.fromkeys(MODEL_KEYS) | {"id": "random"}
        thresholds = Thresholds(model, TileShape(), True, (0,), (point,), tensors)
        shards = head_shards(self.model, modules)
        handlers = SparseAttention.for_model(thresholds, modules, None, shards, count=count)
        self.attached.append(attach(self.model, handlers))
        return handlers

    def counted(self, gap: float) -> tuple[torch.Tensor, int, int]:
        """(logits, tiles kept, candidates) of this process at `gap`."""
        handlers = self.use(Plan(gap), count=True)
        logits = self()
        kept, candidates = (sum(int(h.counts[i].sum()) for h in handlers.values()) for i in range(2))
        return logits, kept, candidates

    def gap_that_skips(self, rate: float) -> float:
        low, high = -40.0, 40.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            _, kept, candidates = self.counted(middle)
            low, high = (middle, high) if 1 - kept / candidates < rate else (low, middle)
        return middle


def timed(prefill: Prefill, plans: dict[str, Plan], rounds: int, together) -> dict[str, Timing]:
    """{name: Timing} of `rounds` rounds in which all take turns, in the same shuffled order on every process. A sample
    is the slowest process's; `together(value)` takes the largest, and waits for all.
    """
    order, samples, shuffle = list(plans), {name: [] for name in plans}, random.Random(0).shuffle
    cuda = prefill.ids.is_cuda
    for turn in range(-1, rounds):  # the first warms up
        shuffle(order)
        for name in order:
            prefill.use(plans[name])
            together(0.0)
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            prefill()
            if cuda:
                torch.cuda.synchronize()
            ms = together((time.perf_counter() - started) * 1e3)
            if turn >= 0:
                samples[name].append(ms)
    return {name: Timing(values) for name, values in samples.items()}


def prefill(options: argparse.Namespace) -> int:
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size < 2:
        raise MachineError("start it by torchrun with at least two processes")
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < size:
        raise MachineError(f"{size} processes need as many GPUs, and there are {torch.cuda.device_count()}")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if rank == 0:
        check_writable(options.out)
    dist.init_process_group("nccl" if cuda else "gloo", **({"device_id": device} if cuda else {}))

    def together(value: float) -> float:
        largest = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def alone(value: float) -> float:
        return value

    prompt = Prefill(build(options.shape, options.layers, options.length, device), options.length, device)
    kernels = {"sdpa, flash": "FLASH_ATTENTION", "sdpa, cudnn": "CUDNN_ATTENTION"} if cuda else {"sdpa": None}
    gaps = [KEEPS_ALL, *(prompt.gap_that_skips(rate) for rate in options.skip)]
    # Every process has found the same gaps; should rounding differ, the first one's count.
    shared = torch.tensor(gaps, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    labels = ["bsfa, gate, nothing skipped", *(f"bsfa, {rate:.0%}" for rate in options.skip)]
    plans = {name: Plan(kernel=kernel) for name, kernel in kernels.items()}
    plans |= {name: Plan(gap) for name, gap in zip(labels, shared.tolist(), strict=True)}
    expected = {}
    for name, plan in plans.items():
        prompt.use(plan)
        expected[name] = (prompt(), None, None) if plan.gap is None else prompt.counted(plan.gap)
    single = timed(prompt, plans, options.rounds, alone) if rank == 0 else {}
    together(0.0)

    prompt.use(Plan())
    config, _, mesh = prompt.model.prepare_distribute_model(DistributedConfig(tp_size=size))
    prompt.model = prompt.model.maybe_distribute_model(prompt.model, config, mesh)
    if cuda:
        torch.cuda.empty_cache()
    rows = []
    for name, plan in plans.items():
        gap = plan.gap
        prompt.use(plan)
        logits, kept, candidates = (prompt(), 0, 0) if gap is None else prompt.counted(gap)
        counts = torch.tensor([kept, candidates], dtype=torch.int64, device=device)
        dist.all_reduce(counts)
        want, kept_alone, candidates_alone = expected[name]
        rows.append({
            "name": name, "gap": gap, "error": float((logits - want).norm() / want.norm()),
            "finite": bool(logits.isfinite().all()),
            "skip": None if gap is None else 1 - int(counts[0]) / int(counts[1]),
            "skip_one_gpu": None if gap is None else 1 - kept_alone / candidates_alone,
        })  # fmt: skip
    divided = timed(prompt, plans, options.rounds, together)
    if rank == 0:
        for row in rows:
            row |= {"one_gpu": single[row["name"]].as_dict(), "tensor_parallel": divided[row["name"]].as_dict()}
            print(f"{row['name']:30} one GPU {single[row['name']].median:9.2f} ms, {size} GPUs "
                  f"{divided[row['name']].median:9.2f} ms, error {row['error']:.1e}, skip {row['skip']}")  # fmt: skip
        write_json(options.out, {
            "kind": "several-gpus-prefill", "environment": describe(device), "gpus": size if cuda else 0,
            "processes": size, "shape": options.shape, "layers": options.layers, "length": options.length,
            "dtype": str(prompt.model.dtype).removeprefix("torch."), "rows": rows,
        })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    wanted = [*(None for _ in kernels), 0.0, *options.skip]
    bad = [
        row["name"] for row, rate in zip(rows, wanted, strict=True)
        if not row["finite"] or (rate is not None and (abs(row["skip"] - row["skip_one_gpu"]) > 0.01
                                                       or abs(row["skip"] - rate) > 0.1))
    ]  # fmt: skip
    if bad:
        raise GateFailed(f"{', '.join(bad)}: not finite, another skip rate than on one GPU, or not the one asked for")
    return 0


def calibrate(options: argparse.Namespace) -> int:
    from ..models.random_weights import build_tokenizer

    check_writable(options.out)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, model = build_tokenizer(), Path(folder) / "model"
        place = torch.device("cuda" if cuda else "cpu")
        build(options.shape, options.layers, options.length, place, len(tokenizer)).cpu().save_pretrained(model)
        tokenizer.save_pretrained(model)
        if cuda:
            torch.cuda.empty_cache()
        rows, first = [], None
        for processes in options.processes:
            run = Path(folder) / f"run-{processes}"
            command = [sys.executable, "-m", "bsfa_cli", "calibrate", str(model), "-o", str(run), "--json",
                       "--samples", str(options.samples), "--length", str(options.length), "--data", "builtin:mixed",
                       "--processes", str(processes), "--no-gradients"]  # fmt: skip
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            wall = time.perf_counter() - started
            if done.returncode:
                raise MachineError(f"bsfa calibrate --processes {processes} ended with exit code {done.returncode}")
            contents = {name: (run / name).read_bytes() for name in FILES}
            first = first or contents
            seconds = json.loads(done.stdout)["seconds"]
            rows.append({"processes": processes, "wall_seconds": wall, "seconds": seconds,
                         "same_bytes": contents == first})  # fmt: skip
            print(f"{processes} processes: {wall:.1f} s with start-up, {sum(seconds.values()):.1f} s of samples, same "
                  f"bytes: {contents == first}", flush=True)  # fmt: skip
        write_json(options.out, {
            "kind": "several-gpus-calibrate", "environment": describe(place), "shape": options.shape,
            "layers": options.layers, "length": options.length, "samples": options.samples, "rows": rows,
        })  # fmt: skip
    if not all(row["same_bytes"] for row in rows):
        raise GateFailed("runs of different numbers of processes differ")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="several_gpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    for name, shape, layers in (("prefill", "llama-70b", 2), ("calibrate", "llama-8b", 4)):
        task = tasks.add_parser(name)
        task.add_argument("--out", type=Path, required=True, help="JSON to write")
        task.add_argument("--shape", choices=SHAPES, default=shape)
        task.add_argument("--layers", type=int, default=layers)
        task.add_argument("--length", type=int, default=32768)
        if name == "prefill":
            task.add_argument("--skip", type=_numbers(float), default=(0.5, 0.75), metavar="RATE,RATE")
            task.add_argument("--rounds", type=int, default=15)
        else:
            task.add_argument("--processes", type=_numbers(int), default=(1, 2), metavar="N,N")
            task.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    _check(options)
    return (prefill if options.task == "prefill" else calibrate)(options)


def _numbers(kind):
    def numbers(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    numbers.__name__ = f"list of {kind.__name__}s"  # argparse's word for it
    return numbers


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for counts and rates that cannot be measured."""
    least = {"layers": 1, "length": 256, "rounds": 1, "samples": 1}
    for name, value in least.items():
        if getattr(options, name, value) < value:
            raise UsageError(f"--{name} must be at least {value}, got {getattr(options, name)}")
    for rate in getattr(options, "skip", ()):
        if not 0 < rate < 1:
            raise UsageError(f"--skip takes rates between 0 and 1, got {rate:g}")
    for processes in getattr(options, "processes", ()):
        if not 1 <= processes <= options.samples:
            raise UsageError(f"--processes takes numbers from 1 to the {options.samples} samples, got {processes}")


if __name__ == "__main__":
    end("several_gpus", main)
