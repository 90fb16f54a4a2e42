"""compute-sanitizer --tool memcheck python3 tests/sanitize.py BACKEND...: a few small calls, each checked as well.

`make gpu-sanitize` runs it under memcheck and racecheck.
"""

import sys
from dataclasses import replace

import torch
from kernel_cases import Case, check, check_statistics

BF16, FP16 = torch.bfloat16, torch.float16
CASES = (
    Case(1, 4, 2, 500, 500, 128, gate="gap", dtype=BF16),
    Case(1, 2, 1, 193, 650, 64, gate="both", q_offset=333, dtype=FP16),
    Case(3, 2, 1, 320, 385, 128, gate="gap", padded=True, dtype=BF16),
    Case(1, 2, 2, 383, 500, 96, causal=False, gate="absolute", keep_sink=False, dtype=BF16),
)


def main(backends) -> None:
    for backend in backends:
        for case in CASES:
            for blocks in ("", "shuffled"):
                case = replace(case, blocks=blocks)
                print(f"{backend} {case}: right, {check(case, backend, 'cuda'):.0%} skipped", flush=True)
        if backend == "triton":
            check_statistics(CASES[0], backend, "cuda")
            print("triton statistics: right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ("hopper", "triton"))
