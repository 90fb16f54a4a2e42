"""bsfa compare: how do the ways of skipping tiles do against one another?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from ..errors import GateFailed, UsageError
from ..options import Config, Device, Dtype, Json

DEFAULT_LENGTHS = {"cpu": "2048", "cuda": "8192,32768"}


def compare(
    methods: Annotated[str, Option(help="all, or names separated by commas; dense always takes part.")] = "all",
    length: Annotated[
        str | None, Option(help="Tokens, separated by commas; 8192,32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    captured: Annotated[
        Path | None, Option(metavar="FILE", help="Compare on the layers in this file of bsfa capture.")
    ] = None,
    calibrate_on: Annotated[
        Path | None, Option(metavar="FILE", help="Captured layers, of another text, to fit bsfa's thresholds to.")
    ] = None,
    layers: Annotated[int, Option(min=1, help="Structured layers, each with heads of its own.")] = 1,
    heads: Annotated[int, Option(min=1, help="Query heads of structured layers.")] = 32,
    kv_heads: Annotated[int | None, Option(min=1, help="Key/value heads; a fourth of the query heads.")] = None,
    head_dim: Annotated[int, Option(min=16, help="Head dimension of structured layers.")] = 128,
    causal: Annotated[bool, Option("--causal/--no-causal", help="Structured layers: causal or not.")] = True,
    tile: Annotated[str, Option(help="Tile shape, query rows x keys: 64x128 or 128x64.")] = "64x128",
    seconds: Annotated[float, Option(help="Measuring time per layer; each method runs at least 5 times.")] = 3.0,
    seed: Annotated[int, Option(min=0, help="Of structured layers and of the order of measuring.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, Option("--output", "-o", help="Write the result, raw samples included.")] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Run every selection method, gate and combination on the same tensors, kernel and clock."""
    from ..timing.plan import Shape

    if calibrate_on is not None and captured is None:
        raise UsageError("--calibrate-on belongs to --captured; structured layers are calibrated on a sample of theirs")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds must be positive, got {seconds}")
    if tile not in ("64x128", "128x64"):
        raise UsageError(f"--tile must be 64x128 or 128x64, got {tile!r}")
    kv_heads = kv_heads or max(1, heads // 4)
    shape = Shape("structured", heads, kv_heads, head_dim, causal)
    lengths = None if length is None else _lengths(length)

    from bsfa_kernels import TileShape

    from ..comparison import run
    from ..comparison.methods import chosen
    from ..comparison.tensors import CapturedSource, StructuredSource
    from ..environment import resolve_device
    from ..files import check_writable, write_json
    from ..presentation import compare_table
    from ..presentation.console import note, print_json, progress
    from ..timing.sweep import resolve_dtype

    chosen(methods, None, causal)
    place = resolve_device(device)
    if place.index is not None:
        import torch

        torch.cuda.set_device(place)
    if captured is not None:
        wanted = lengths or [None]
        sources = [CapturedSource(captured, place, n) for n in wanted]
        calibrated = [calibrate_on and CapturedSource(calibrate_on, place) for _ in wanted]
    else:
        wanted = lengths or _lengths(DEFAULT_LENGTHS[place.type])
        sources = [StructuredSource(shape, n, layers, seed, place, resolve_dtype(dtype, place)) for n in wanted]
        calibrated = sources
    if output:
        check_writable(output)
    tile_shape = TileShape(*map(int, tile.split("x")))
    result = run.empty(place, tile_shape, seed)
    for source, fitted in zip(sources, calibrated, strict=True):
        with progress() as display:

            def begin(total, display=display, source=source):
                task = display.add_task(f"{source.length:,} tokens", total=total)
                return lambda: display.advance(task)

            cell = run.cell(source, fitted, methods, tile_shape, place, seconds, seed, begin)
        result["cells"].append(cell)
        compare_table.show_cell(cell)
        if output:
            write_json(output, result)
    compare_table.show_break_even(result)
    result["complete"] = True
    if output:
        write_json(output, result)
        note(f"written: {output}; next: bsfa report {output} -o report.html")
    if json:
        print_json(result)
    failures = run.failures(result)
    if failures:
        raise GateFailed("; ".join(failures))


def _lengths(text: str) -> list[int]:
    try:
        lengths = sorted({int(part) for part in text.replace("_", "").split(",")})
    except ValueError:
        raise UsageError(f"--length takes whole numbers separated by commas, got {text!r}") from None
    if lengths[0] < 1:
        raise UsageError(f"--length takes positive numbers, got {text!r}")
    return lengths
