"""python -m bsfa_cli.training --minutes 8 --out DIR

One GPU, four or five minutes at least; DIR/checkpoint resumes with the same command and a larger --minutes. Where only
the exported model is left, `--from-model MODEL --seed 1` trains it further on other data, with fresh moments.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ..data import tasks
from . import curriculum, model
from .loop import Budget, Trainer

EVALUATED = {4096: 64, 8192: 64, 16384: 48, 32768: 48, 65536: 20}  # documents a task, by length


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.training", description=__doc__)
    parser.add_argument("--minutes", type=float, required=True, help="training time over all runs, without evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint/, model/ and log.jsonl")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes after which this run ends early")
    parser.add_argument("--chunks", type=int, help="train this many chunks of 16 steps instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--from-model", type=Path, help="begin with this exported model's weights, in the second half of --minutes"
    )
    parser.add_argument("--toy", action="store_true", help="a smaller model at 256 tokens, for a CPU")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    shape, phases = (model.TOY, curriculum.TOY) if options.toy else (model.FULL, curriculum.FULL)
    if options.from_model:
        llama = LlamaForCausalLM.from_pretrained(options.from_model, dtype=torch.float32).to(device)
    else:
        llama = model.build(shape, options.seed).to(device)
    if device.type == "cuda":
        # A layer that cannot be compiled runs uncompiled: slower, but the lease is not lost.
        torch._dynamo.config.suppress_errors = True
        # The residual stream, and RoPE's angles with it, in bfloat16 as in the exported model.
        llama.model.embed_tokens.register_forward_hook(lambda module, arguments, output: output.bfloat16())
    trainer = Trainer(
        llama, phases, Budget(60 * options.minutes, options.chunks), seed=options.seed,
        learning_rate=options.learning_rate, out=options.out,
    )  # fmt: skip
    if (options.out / "checkpoint" / "exp_avg.safetensors").exists():
        trainer.load()
        print(f"going on after {trainer.position.seconds:.0f} s of training", file=sys.stderr)
    elif options.from_model:
        trainer.position = trainer.budget.half()
    trainer.run(60 * options.stop_after)
    model.export(llama, options.out / "model")

    exported = AutoModelForCausalLM.from_pretrained(options.out / "model", dtype=torch.bfloat16).to(device).eval()
    for length, documents in ({256: 64} if options.toy else EVALUATED).items():
        start = time.monotonic()
        found = {
            name: model.accuracy(exported, name, length, documents, rows=max(1, 16384 // length))
            for name in tasks.NAMES
        }
        trainer.log({"evaluated": length, "documents": documents, "exact_and_token_accuracy": found})
        parts = "  ".join(f"{name} {exact:.3f}" for name, (exact, _) in found.items())
        print(f"exact at {length:5d}: {parts}  ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    if device.type == "cuda":
        print(f"most GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", file=sys.stderr)


if __name__ == "__main__":
    main()
