"""A tensor-parallel group: models of a folder, loaded with tp_plan, against what one process computed.

    python tests/tensor_parallel_ranks.py FOLDER 2      as torchrun --nproc-per-node 2, but imports are paid for once

`from_pretrained` takes a tp_plan where accelerate is installed; elsewhere the loaded model is divided by what
`from_pretrained` calls for it.

FOLDER/NAME holds a checkpoint and, as NAME/expected.pt, {thresholds, ids, dense, sparse, kept, candidates}. Rank r
writes FOLDER/rank-r.json: {NAME: {dense, sparse: largest error over the logits' scale, kept, candidates: by module}}.
"""

import json
import os
import socket
import sys
from pathlib import Path

import bsfa_kernels.integrations.transformers as bsfa
import torch
import torch.distributed as dist
from bsfa_kernels.thresholds import Thresholds
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import is_accelerate_available


def load(folder: Path, plan="auto"):
    options = dict(dtype=torch.float32, attn_implementation="bsfa")
    config = DistributedConfig(tp_plan=plan)
    if is_accelerate_available():
        return AutoModelForCausalLM.from_pretrained(folder, **options, distributed_config=config).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    config, _, mesh = model.prepare_distribute_model(config)
    return model.maybe_distribute_model(model, config, mesh)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def compare(folder: Path) -> dict:
    expected = torch.load(folder / "expected.pt", weights_only=True)
    model = load(folder)
    dense = model(expected["ids"], use_cache=False).logits
    bsfa.apply(model, Thresholds.from_bytes(bytes(expected["thresholds"].numpy())), count=True)
    sparse = model(expected["ids"], use_cache=False).logits
    handlers = {path: bsfa.active(module) for path, module in model.named_modules() if bsfa.active(module)}
    return {
        "dense": error(dense, expected["dense"]),
        "sparse": error(sparse, expected["sparse"]),
        "kept": {path: handler.counts.kept.tolist() for path, handler in handlers.items()},
        "candidates": {path: handler.counts.candidates.tolist() for path, handler in handlers.items()},
        "notes": [note.reason for note in bsfa.notes(model) if not note.expected],
    }


def refused(folder: Path, plan) -> str:
    content = torch.load(folder / "expected.pt", weights_only=True)["thresholds"]
    thresholds = Thresholds.from_bytes(bytes(content.numpy()))
    model = load(folder, plan)
    try:
        bsfa.apply(model, thresholds)
    except ValueError as found:
        return str(found)
    return "not refused"


def main(root: Path) -> None:
    found = {folder.name: compare(folder) for folder in sorted(root.iterdir()) if (folder / "expected.pt").exists()}
    attention = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
    whole = {"model.layers.*.self_attn.o_proj": "rowwise"}
    gathered = {"model.layers.*.self_attn.k_proj": "colwise_gather_output"}
    found["refused"] = {"mixed": refused(root / "llama", attention | whole | gathered)}
    rank = dist.get_rank()
    (root / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def start(root: Path, processes: int) -> int:
    """Fork the processes, each told who it is as by torchrun; the number of those that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if not pids[-1]:
            place = group | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({name: str(value) for name, value in place.items()})
            main(root)
            sys.exit()
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)


if __name__ == "__main__":
    sys.exit(start(Path(sys.argv[1]), int(sys.argv[2])))
