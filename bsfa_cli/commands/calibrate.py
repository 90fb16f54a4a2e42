"""bsfa calibrate: collect from a model what thresholds are chosen from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import UsageError
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, parse_layers

TILES = {"64x128": (64, 128), "128x64": (128, 64)}
DEFAULT_LENGTH = {"cpu": 2048, "cuda": 32768}


def calibrate(
    model: Annotated[
        str | None, Argument(help="Checkpoint directory or Hub id; the bundled retrieval model when left out.")
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="RUN", help="Run directory; the same command resumes it.")
    ] = None,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    samples: Annotated[
        int, Option(min=1, help="Samples; every fourth is held out for checking. More of them extend a run.")
    ] = 8,
    length: Annotated[
        int | None, Option(min=1, help="Tokens a sample, at most; 32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    layers: Annotated[str | None, Option(help="Only these layers, e.g. 0-3,8; the others stay dense.")] = None,
    include_vision: Annotated[
        bool, Option("--include-vision", help="Calibrate the vision tower's attention too, not the text layers alone.")
    ] = False,
    tile: Annotated[str, Option(help="Tile shape, query rows x keys: 64x128, or 128x64 as the BSFA authors.")] = (
        "64x128"
    ),
    top_k: Annotated[
        str | None,
        Option(
            help="Values of k that `export --top-k` takes later, and those between them less exactly; by default 14 "
            "from 1 to 128, or as many as fit shorter samples."
        ),
    ] = None,
    scores: Annotated[
        str,
        Option(
            help="exact, or int8: statistics with Q and K rounded to 8 bits, and what that does to every head's output."
        ),
    ] = "exact",
    gradients: Annotated[
        bool | None,
        Option(
            "--gradients/--no-gradients",
            help="Also run a backward pass over every sample, by which `export` shares skipping out so that "
            "predictions change least; takes several times as long. On a GPU it is the default, where model and data "
            "allow it.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    processes: Annotated[
        int | None,
        Option(
            min=1,
            help="Share the samples out over so many processes, each with a GPU of its own; the run is the same. "
            "`torchrun --nproc-per-node N -m bsfa_cli calibrate` does so too.",
        ),
    ] = None,
    seed: Annotated[int, Option(min=0, help="Seed of generated text and of the choice of samples.")] = 0,
    dry_run: Annotated[bool, Option("--dry-run", help="Print memory, file sizes and samples, and stop.")] = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Collect from a model what thresholds are chosen from.

    Runs the model densely over samples and keeps the statistics from which any operating point can be exported.
    """
    if output is None and not dry_run:
        raise UsageError("where should the run be kept? give -o RUN")
    if tile not in TILES:
        raise UsageError(f"--tile must be one of {', '.join(TILES)}, got {tile!r}")
    if scores not in ("exact", "int8"):
        raise UsageError(f"--scores must be exact or int8, got {scores!r}")
    if gradients and scores != "exact":
        raise UsageError("--gradients knows exact scores only; calibrate once with it, and once with --scores int8")
    if gradients and include_vision:
        raise UsageError("--gradients knows text layers only; calibrate a vision tower without it")
    if length is not None and length < 2 * max(TILES[tile]):
        raise UsageError(f"--length {length} is shorter than two tiles ({2 * max(TILES[tile])} tokens)")
    ranks = None if top_k is None else _ranks(top_k)
    given = joined(data, image_root, frames, repeat_data)

    # First what can be refused without the model: to import transformers takes seconds.
    with importing():
        from ..data.prompts import check_source, default_data, load_prompts
        from ..data.texts import remarks
        from ..files import check_folder

    if layers is not None:
        parse_layers(layers)
    if not dry_run:
        check_folder(output)
    check_source(given, length or min(DEFAULT_LENGTH.values()), samples)

    from ..calibration.group import Group, check_shared, place_of, started
    from ..environment import resolve_device, wake

    if device != "auto":
        resolve_device(device)
    if processes is not None and processes > 1 and started() == 1 and not dry_run:
        check_shared(device)
        if processes > samples:
            raise UsageError(f"--processes {processes} for {samples} samples: one process has a sample at least")
        _spawn(processes, output, json)
        return

    group = None if dry_run else Group.joined(processes)
    place = place_of(device, group)
    wake(place)
    with importing():
        from ..calibration import run
        from ..calibration.curves import int8_words
        from ..console import note, print_json
        from ..models.load import check_positions, load_model

    first = group is None or group.first
    note = note if first else _unsaid
    length = length or DEFAULT_LENGTH[place.type]
    rows, keys = TILES[tile]
    if not dry_run:
        run.Run.check_place(output)
    positions = partial(check_positions, length=length, flag="--length")
    loaded = load_model(model, device=place, dtype=dtype, check_config=positions)
    if loaded.label:
        note(f"{loaded.identity['id']}: {loaded.label}")
    spec = given or default_data(loaded)
    for remark in remarks(given, spec, samples):
        note(remark)
    modules, dense = run.chosen_modules(loaded.model, layers, towers=include_vision)
    texts = load_prompts(spec, loaded, samples=samples, length=length, seed=seed, shortest=2 * max(rows, keys))
    if include_vision:
        run.check_towers(modules, texts)
    if gradients and run.has_images(texts):
        note("with --gradients statistics are not kept by modality, so export --by-modality will not take this run")
    if len(texts) < samples:
        note(f"{spec} gives {len(texts)} of the {samples} samples asked for")
    for reason in sorted(set(dense.values())):
        note(f"{sum(why == reason for why in dense.values())} attention modules stay dense: {reason}")
    ranks = ranks or run.default_ranks(max(len(text.tokens) for text in texts), keys)
    options = run.Options(
        spec,
        samples,
        length,
        seed,
        TILES[tile],
        ranks,
        layers,
        place.type,
        str(loaded.model.dtype).split(".")[-1],
        scores,
        bool(gradients),
    )
    if gradients is None and first:  # the others do what the first begins
        options = _with_gradients(loaded, texts, modules, options, None if dry_run else output)
    plan = run.plan_of(texts, options)
    idle = [k for k in ranks if k >= plan.most_ranked]
    if idle:
        note(
            f"--top-k {', '.join(map(str, idle))} will drop nothing: in samples of {plan.longest:,} tokens a row has "
            f"at most {plan.most_ranked} tiles to choose from"
        )
    needs = run.memory(loaded, modules, plan)
    if dry_run:
        planned = run.manifest(loaded, texts, modules, options)["samples"]
        for purpose, size in needs.items():
            note(f"{purpose:<32} at most {size / 2**20:>10,.1f} MiB" if "pass" not in purpose else
                 f"{purpose:<32}   about {size / 2**20:>10,.1f} MiB")  # fmt: skip
        for sample in planned:
            note(f"{sample['id']:<32} {sample['tokens']:>7,} tokens  {sample['role']:<8} {sample['source']}")
        if json:
            print_json({"bytes": needs, "samples": planned, "modules": len(modules)})
        return
    run.check_memory(needs, place, group.size if group else 1)
    summary = run.calibrate(loaded, texts, modules, options, output, group)
    if not summary["samples"]["heldout"]:
        note("one sample only: nothing is held out, so exported points will be unchecked")
    if summary["int8_error"]:
        note(int8_words(summary["int8_error"]))
    note(f"written: {output} ({len(texts)} samples); next: bsfa export {output} -o thresholds.safetensors")
    if json and first:
        print_json(summary)


def _with_gradients(loaded, texts, modules, options, output: Path | None):
    """`options`, with gradients where they are the default; says so, or what speaks against them."""
    from dataclasses import replace

    from ..calibration.by_default import takes_gradients
    from ..console import note

    wanted, reason = takes_gradients(loaded, texts, modules, options, output)
    if wanted:
        note("with gradients, by which export shares skipping out; --no-gradients takes less time")
    elif reason:
        note(f"without gradients, so export shares skipping out by dropped mass: {reason}")
    return replace(options, gradients=wanted)


def _spawn(processes: int, output: Path, json: bool) -> None:
    """The same command in several processes. A run that they began and collected nothing of is removed."""
    from ..calibration import spawn
    from ..errors import BsfaError

    begun = (output / "run.json").exists()
    try:
        spawn.run(processes, json)
    except BsfaError:
        if not begun and (output / "run.json").exists():
            from ..calibration.store import Run

            run = Run.open(output)
            with run.lock():
                if not run.finished():
                    run.discard()
        raise


def _unsaid(message: str) -> None:
    """The note of a process that is not the first: it would be the same."""


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise UsageError(f"--top-k must be whole numbers separated by commas, got {text!r}") from None
    if not 1 <= len(ranks) <= 32 or any(not 1 <= k <= 65536 for k in ranks):
        raise UsageError(f"--top-k takes 1 to 32 numbers from 1 to 65536, got {text!r}")
    return tuple(ranks)
