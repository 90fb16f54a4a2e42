"""python3 tests/sanitize.py memcheck|racecheck [BACKEND...]: a few small calls under compute-sanitizer.

Every result is checked as well. Exits 1 when one is wrong, when memory is misused or when accesses race, 2 for what it
does not know, 3 where compute-sanitizer or a GPU is missing. racecheck
does not follow the named barriers by which Triton starts and ends the partitions of a warp-specialized kernel, and
reports the bytes passed there; those reports stand on lines that `dispatch_lines` finds, and only those are let pass.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import replace

from bsfa_cli.errors import MachineError, UsageError
from bsfa_cli.experiments import end

CALLS = "calls"
TOOLS = ("memcheck", "racecheck")
BACKENDS = ("hopper", "triton", "split_kv")
CANNOT = MachineError.exit_code


def calls(backends) -> None:
    """The calls themselves, in the process that compute-sanitizer watches."""
    import importlib
    from itertools import product

    import torch
    from bsfa_kernels.backends import ATTENTION
    from bsfa_kernels.tiles import TileShape
    from kernel_cases import Case, check, check_place, check_statistics
    from paged_attention_cases import Paged, check_packed
    from paged_attention_cases import check as check_pages

    if not torch.cuda.is_available():
        raise MachineError(f"no CUDA here: PyTorch {torch.__version__} finds no GPU to make calls on")
    bf16, fp16 = torch.bfloat16, torch.float16
    cases = (
        Case(1, 4, 2, 500, 500, 128, gate="gap", dtype=bf16),
        Case(1, 2, 1, 193, 650, 64, gate="both", q_offset=333, dtype=fp16),
        Case(3, 2, 1, 320, 585, 128, gate="gap", padded=True, dtype=bf16),
        Case(1, 2, 2, 383, 500, 96, causal=False, gate="absolute", keep_sink=False, dtype=bf16),
    )
    shape = dict(heads=4, kv_heads=2, head_dim=128, tile=TileShape(), page=128, dtype=bf16)
    one, several = Paged((300,), (650,), **shape), Paged((200, 1, 70), (200, 300, 400), **shape)
    short = (
        Case(1, 8, 2, 3, 1100, 128, q_offset=1097, dtype=bf16),
        Case(3, 4, 2, 33, 585, 64, padded=True, window=300, sinks=True, dtype=fp16),
        Case(1, 4, 1, 63, 900, 96, causal=False, gate="absolute", dtype=bf16),
    )
    for backend in backends:
        if backend == "split_kv":
            for case in short:
                check(case, backend, "cuda")
                print(f"{backend} {case}: right", flush=True)
            for pages in (Paged((5,), (700,), **shape | dict(page=16)), Paged((20, 1), (600, 300), **shape)):
                check_pages(pages, backend, "cuda")
                print(f"{backend} pages: right", flush=True)
            check_place(short[0], backend, "tokens-of-wider-rows", "cuda")
            continue
        check_place(cases[1], backend, "tokens-of-wider-rows", "cuda")
        print(f"{backend} pages: right, {check_pages(one, backend, 'cuda'):.0%} skipped", flush=True)
        print(f"{backend} packed: right, {check_packed(several, backend, 'cuda'):.0%} skipped", flush=True)
        module = importlib.import_module(f"bsfa_kernels.{ATTENTION[backend]}")
        for case, blocks, scores in product(cases, ("", "shuffled"), getattr(module, "SCORES", ("exact",))):
            case = replace(case, blocks=blocks)
            skipped = check(case, backend, "cuda", scores=scores)
            print(f"{backend} {case} {scores} scores: right, {skipped:.0%} skipped", flush=True)
        if backend == "triton":
            for scores in ("exact", "int8"):
                check_statistics(cases[0], backend, "cuda", scores=scores)
            print("triton statistics: right", flush=True)


def faults(said: str, dispatch: set[str]) -> list[str]:
    """Lines of compute-sanitizer's report that are errors, less races between two places named in `dispatch`."""
    found = []
    for block in re.split(r"(?m)^=========\s*$", said):
        lines = [line for line in block.splitlines() if line.startswith("=========")]
        errors = [line for line in lines if re.search(r"Error|Warning|Invalid|hazard", line)]
        places = [re.search(r" in (\S+\.py:\d+)", line) for line in errors if " access at " in line]
        if places and all(place and place[1] in dispatch for place in places):
            continue
        found += [line for line in errors if "SUMMARY" not in line and "ERROR SUMMARY: 0" not in line]
    return found


def dispatch_lines() -> set[str]:
    """Where reports of Triton's own dispatch stand; no line of them accesses memory: the kernel's `def`, its
    `warp_specialize` calls, and the `if` that chooses between those; {"hopper_kernel.py:321", ...}.
    """
    from bsfa_kernels import hopper_kernel

    tree = ast.parse(inspect.getsource(hopper_kernel))
    (kernel,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    found = {kernel.lineno}
    for node in ast.walk(kernel):
        if isinstance(node, ast.If) and any("warp_specialize(" in ast.unparse(each) for each in node.body):
            found.add(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "gl.warp_specialize":
            found.add(node.lineno)
    return {f"hopper_kernel.py:{line}" for line in found}


def main(arguments: list[str]) -> int:
    """Raises UsageError for a tool or backend that there is not, MachineError where compute-sanitizer is missing."""
    tool, *backends = arguments or [""]
    if tool not in (*TOOLS, CALLS):
        raise UsageError(f"give {' or '.join(TOOLS)}, got {tool!r}" if arguments else f"give {' or '.join(TOOLS)}")
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise UsageError(f"backends are {', '.join(BACKENDS)}; got {unknown[0]!r}")
    backends = backends or BACKENDS
    if tool == CALLS:
        calls(backends)
        return 0
    if shutil.which("compute-sanitizer") is None:
        raise MachineError("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    return watched(tool, backends)


def watched(tool: str, backends) -> int:
    command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, CALLS, *backends]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:  # at once: a run that a time limit ends has said how far it came
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode == CANNOT:
        return CANNOT
    said = "".join(said)
    found = faults(said, dispatch_lines() if tool == "racecheck" else set())
    for line in found:
        print(f"{tool}: {line}", file=sys.stderr)
    wrong = process.returncode != 0 or "right" not in said
    print(f"{tool}: {'failed' if found or wrong else 'clean'}", file=sys.stderr)
    return 1 if found or wrong else 0


if __name__ == "__main__":
    end("sanitize", lambda: main(sys.argv[1:]))
