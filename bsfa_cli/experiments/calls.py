"""What experiments on calls of attention by their queries and keys are told beside those, and how they say a cell."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ..timing.plan import Shape


def add_options(parser: argparse.ArgumentParser, skip: float, seconds: float) -> None:
    parser.add_argument("--skip", type=float, default=skip)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=seconds, help="of measuring, for each cell")


def check_options(name: str, options: argparse.Namespace) -> tuple[int, int, int]:
    """(heads, KV heads, head dim). Raises UsageError for options that cannot be."""
    if not 0 <= options.skip < 1 or not 0 < options.seconds < float("inf"):
        raise UsageError(
            f"--skip must be from 0 to below 1 and --seconds above 0, got {options.skip:g} and {options.seconds:g}"
        )
    shape = options.heads, options.kv_heads, options.head_dim
    Shape(name, *shape)  # refuses heads that do not fit
    return shape


def say(title: str, cell: dict, digits: int) -> None:
    """A cell as lines: its contenders, and what could not be one."""
    print(title, flush=True)
    for row in cell["contenders"]:
        print(f"    {row['name']:28} {row['ms_median']:9.{digits}f} ms", flush=True)
    for absent in cell["unavailable"]:
        print(f"    {absent['name']:28} {absent['reason'][:90]}", flush=True)
