"""bsfa profile: is it faster here?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from ..errors import GateFailed, MachineError, UsageError
from ..idle import OF_DATA, refuse_idle
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, numbers

# Options, as parameters, that only the sweep reads.
OF_SWEEP = (
    "skip", "heads", "kv_heads", "head_dim", "causal", "gate", "tile", "synthetic", "baselines", "backend",
)  # fmt: skip


def profile(
    context: Context,
    profile: Annotated[
        str | None, Option(help="Bundled profile or YAML file; llama-3.1-8b on a GPU and tiny on a CPU by default.")
    ] = None,
    lengths: Annotated[str | None, Option(help="Sequence lengths, separated by commas.")] = None,
    skip: Annotated[str | None, Option(help="Skip rates between 0 and 1, separated by commas.")] = None,
    heads: Annotated[int | None, Option(help="Query heads.")] = None,
    kv_heads: Annotated[int | None, Option(help="Key/value heads; as many as query heads by default.")] = None,
    head_dim: Annotated[int | None, Option(help="Head dimension.")] = None,
    causal: Annotated[bool | None, Option("--causal/--no-causal", help="Causal attention or not.")] = None,
    gate: Annotated[str | None, Option(help="gap or absolute.")] = None,
    tile: Annotated[str | None, Option(help="Tile shape, query rows x keys.")] = None,
    synthetic: Annotated[
        str | None, Option(help="Kind of synthetic Q, K and V: normal or structured (the patterns of real heads).")
    ] = None,
    baselines: Annotated[
        str | None, Option(help="Baselines to time, separated by commas; all that run here by default.")
    ] = None,
    scores: Annotated[
        str | None, Option(help="Of our kernel: exact, int8 (Q and K rounded to 8 bits), or exact,int8 in one run.")
    ] = None,
    backend: Annotated[str | None, Option(help="Demand this backend; the fastest that can serve by default.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int | None, Option(help="Seed of the synthetic data.")] = None,
    seconds: Annotated[float, Option(help="Measuring time per cell; each contender runs at least 5 times.")] = 3.0,
    end_to_end: Annotated[
        str | None,
        Option(metavar="MODEL", help="Time this model's prefill; the sweep then runs only if --profile is given."),
    ] = None,
    thresholds: Annotated[Path | None, Option(help="Thresholds artifact for --end-to-end.")] = None,
    point: Annotated[str | None, Option(help="Operating point in the artifact, when it holds several.")] = None,
    language_only: Annotated[
        bool,
        Option("--language-only", help="With --end-to-end on images: look at them once, and time the language model."),
    ] = False,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    output: Annotated[Path | None, Option("--output", "-o", help="Write the result, raw samples included.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE.svg", help="Plot speedup against length; .svg or .png.")] = None,
    baseline: Annotated[Path | None, Option(help="Earlier result of this same machine to compare with.")] = None,
    fail_under: Annotated[
        float | None, Option(help="Exit 1 when old time / new time falls below this anywhere (with --baseline).")
    ] = None,
    details: Annotated[bool, Option("--details", help="Show every column, not those that fit 80.")] = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Time bsfa against every dense kernel that runs here.

    All take turns, over lengths, skip rates and head shapes; with --end-to-end MODEL its whole prefill is timed.
    """
    from ..timing.plan import load

    if fail_under is not None and baseline is None:
        raise UsageError("--fail-under compares with an earlier result: give it as --baseline FILE.json")
    if fail_under is not None and not 0 < fail_under < float("inf"):
        raise UsageError(f"--fail-under must be a positive number, got {fail_under:g}")
    if end_to_end is None and (thresholds is not None or point is not None):
        raise UsageError("--thresholds and --point belong to --end-to-end MODEL; the sweep fits its own thresholds")
    if point is not None and thresholds is None:
        raise UsageError("--point names an operating point of --thresholds: give those too")
    if end_to_end is None:
        refuse_idle(context, OF_DATA, "without --end-to-end MODEL")
    elif profile is None:
        refuse_idle(context, OF_SWEEP, "with --end-to-end and no --profile")
    if language_only and end_to_end is None:
        raise UsageError("--language-only belongs to --end-to-end MODEL")
    if plot is not None and end_to_end is not None and profile is None:
        raise UsageError("--plot draws the sweep, which --end-to-end leaves out unless --profile is given")
    if plot is not None:
        from ..presentation import figures

        figures.check(plot)
    asked = None if scores is None else tuple(dict.fromkeys(each.strip() for each in scores.split(",")))
    if asked is not None and end_to_end is not None and (len(asked) > 1 or thresholds is None):
        raise UsageError("with --end-to-end --scores takes one value, and overrides that of a point of --thresholds")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds must be positive, got {seconds}")
    # Everything that can be refused without torch is refused before its import.
    lengths = None if lengths is None else numbers(lengths, int, "--lengths takes numbers")
    skip = None if skip is None else numbers(skip, float, "--skip takes numbers")
    names = None if baselines is None else tuple(name.strip() for name in baselines.split(","))
    plan = None if profile is None else load(profile)

    with importing():
        import torch

        from ..console import beginner, note, note_speeds, print_json, progress
        from ..environment import resolve_device, wake
        from ..files import RESULT, check_writable, write_json, write_whole
        from ..presentation import profile_table
        from ..timing import compare, run

    device = resolve_device(device)
    if device.index is not None:
        torch.cuda.set_device(device)
    plan = plan or load("llama-3.1-8b" if device.type == "cuda" else "tiny")
    plan = plan.with_flags(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, lengths=lengths, skip=skip, gate=gate,
        tile=tile, data=synthetic, backend=backend, baselines=names, seed=seed,
        scores=asked,
        dtype=None if dtype == "auto" else dtype,
    )  # fmt: skip
    if plan.backend != "auto":
        _known_backend(plan.backend)
    given = joined(data, image_root, frames, repeat_data)
    artifact = None if thresholds is None else _artifact(thresholds, point)
    if end_to_end is not None:
        from ..data.prompts import check_source
        from ..models.load import check_model

        check_source(given, max(plan.lengths), 1)
        check_model(end_to_end)  # before the sweep, which may take minutes
    result = run.empty(plan, device)
    stored = compare.read(baseline) if baseline else None
    if stored:
        compare.refuse_other_machine(stored, result["environment"], result["device"], baseline)
    for path, kind in ((output, RESULT), (plot, None)):
        if path is not None:
            check_writable(path, kind)

    note_speeds(device)

    def save(cell=None):
        if cell:
            profile_table.show_cell(cell, details)
        if output:
            write_json(output, result)

    if end_to_end is None or profile is not None:
        with progress() as display:
            run.sweep_cells(plan, device, result, seconds, save, beginner(display, "sweep"))
        note(f"\nmatmul ceiling in this run: {result['ceiling']['tflops']:.4g} TFLOP/s ({result['ceiling']['dtype']})")
    if end_to_end is not None:
        wake(device)
        with importing():
            from ..data.prompts import default_data
            from ..data.texts import remarks
            from ..models.load import check_positions
            from ..timing.prefill import Prefill

        positions = partial(check_positions, length=max(plan.lengths), flag="--lengths")
        override = None if asked is None else asked[0]
        prefill = Prefill(end_to_end, artifact, point, device, dtype, positions, override)
        spec = given or default_data(prefill.loaded)
        for remark in remarks(given, spec, 1):
            note(remark)
        for length in plan.lengths:
            with progress() as display:
                begin = beginner(display, f"{length:,} tokens")
                entry = prefill.time(spec, length, plan.seed, seconds, begin, language_only=language_only)
            result["prefill"].append(entry)
            profile_table.show_prefill(entry)
            save()
    result["complete"] = True
    if stored:
        result["compared"] = compare.changes(stored, result)
    save()
    if plot:
        from ..presentation.plot import speedup_plot

        write_whole(plot, figures.content(speedup_plot(result), plot))
    if plot:
        note(f"written: {plot}")
    if output:
        note(f"written: {output}; next: bsfa report {output} -o report.html")
    if json:
        print_json(result)
    _judge(result, run.failures(result), fail_under)


def _artifact(path: Path, point: str | None):
    """The thresholds at `path`, which hold `point`. Raises UsageError where one of several must be named."""
    from bsfa_kernels.thresholds import Thresholds

    artifact = Thresholds.read(path)
    if point is None and len(artifact.points) > 1:
        names = ", ".join(each.name for each in artifact.points)
        raise UsageError(f"{path} holds several operating points; give one of them as --point: {names}")
    artifact.index(point)
    return artifact


def _judge(result: dict, failures: list[str], fail_under: float | None) -> None:
    absent = [entry for cell in result["cells"] for entry in cell["unavailable"] if entry["name"].startswith("bsfa")]
    if absent and not any(row["kind"].startswith("bsfa") for cell in result["cells"] for row in cell["contenders"]):
        raise MachineError(f"no bsfa kernel ran: {absent[0]['reason']}")
    if fail_under is not None:
        compared = result["compared"]
        if not compared:
            raise UsageError("--baseline holds none of the cells that were measured; use the same profile and flags")
        failures = failures + [
            f"{row['cell']}, {row['name']}: {row['old_ms']:.3f} ms before, {row['new_ms']:.3f} ms now "
            f"({row['ratio']:.2f}, asked for {fail_under})"
            for row in compared
            if row["ratio"] < fail_under
        ]
    if failures:
        raise GateFailed("; ".join(failures))


def _known_backend(name: str) -> None:
    from bsfa_kernels.backends import NAMES

    if name not in NAMES:
        raise UsageError(f"backend must be auto or one of {', '.join(NAMES)}; got {name!r}")
