"""What the Hopper kernel's programs that spill most spill, by Triton version, as JSON lines; no GPU is needed.

    python tests/spills.py [--only 128,256]                       # head dims
    PYTHONPATH=/where/another/triton/is python tests/spills.py    # an unpacked wheel

kernels/NOTES.md has the table. Half a minute a program.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import sass
import torch
import triton

HEAD_DIMS = {"64": 64, "128": 128, "256": 256, "192/128": (192, 128)}
# causal, gates, spans, block lists, scoring (as in sass.hopper)
PROGRAMS = [
    (True, "g", False, False, ""),
    (True, "ag", True, False, ""),
    (True, "ag", True, True, ""),
    (False, "ag", True, False, ""),
    (False, "ag", True, True, ""),
    (True, "ag", True, False, "w"),
    (True, "", False, False, "c"),
    (True, "g", False, False, "c"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(HEAD_DIMS), help="head dims: " + ", ".join(HEAD_DIMS))
    wanted = parser.parse_args().only.split(",")
    if unknown := set(wanted) - HEAD_DIMS.keys():
        parser.error(f"--only takes {', '.join(HEAD_DIMS)}, not {', '.join(sorted(unknown))}")
    for name in wanted:
        for causal, gates, spans, lists, scoring in PROGRAMS:
            with tempfile.TemporaryDirectory() as folder:
                program = (causal, gates, spans, lists, scoring)
                code = sass.hopper(Path(folder), torch.bfloat16, HEAD_DIMS[name], *program)
            row = dict(head_dim=name, causal=causal, gates=gates, spans=spans, lists=lists, scoring=scoring)
            row |= dict(triton=triton.__version__, bytes=code.spilled, accesses_in_loops=code.spilled_in_loops)
            print(json.dumps(row | dict(serialized=code.serialized)), flush=True)


if __name__ == "__main__":
    main()
