"""bsfa compare: how do the ways of skipping tiles do against one another?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from ..errors import GateFailed, InputError, UsageError
from ..idle import OF_DATA, refuse_idle
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, numbers

BUNDLED = "bundled"
DEFAULT_LENGTHS = {"cpu": "2048", "cuda": "8192,32768"}


def compare(
    context: Context,
    model: Annotated[
        str | None, Argument(help="Compare inside this model, or `bundled` for bsfa's own; without it, on tensors.")
    ] = None,
    methods: Annotated[str, Option(help="all, or names separated by commas; dense always takes part.")] = "all",
    setting: Annotated[
        list[str] | None,
        Option(
            metavar="METHOD=VALUE",
            help="Values of a method's knob instead of its own (xattention=0.9,0.95), or of another of its fields "
            "(xattention.stride=16). Repeatable; METHOD+bsfa goes on top of METHOD's densest.",
        ),
    ] = None,
    length: Annotated[
        str | None, Option(help="Tokens, separated by commas; 8192,32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    run: Annotated[
        Path | None,
        # Named, because Typer 0.27 makes --RUN of this metavar.
        Option("--run", metavar="RUN", help="Inside a model: run directory of bsfa calibrate, for bsfa's methods."),
    ] = None,
    thresholds: Annotated[
        Path | None, Option(metavar="FILE", help="Inside a model: the points of this artifact instead of a run's.")
    ] = None,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    samples: Annotated[int, Option(min=1, help="Inside a model: number of texts a length.")] = 2,
    tasks: Annotated[
        str | None, Option(help="Inside a model: all, frames, or tasks separated by commas, held out from calibration.")
    ] = None,
    questions: Annotated[int, Option(min=1, help="Questions a task and length, for --tasks.")] = 20,
    ask_at: Annotated[
        float, Option(help="With --tasks: where the question stands, as a share of the length; bundled model only.")
    ] = 1.0,
    minutes: Annotated[
        float | None,
        Option(
            help="With --tasks: begin no question after so many minutes of asking, and take those asked by then. Tasks "
            "take turns."
        ),
    ] = None,
    processes: Annotated[
        int | None,
        Option(min=1, help="Share the questions of --tasks out over so many processes, each with a GPU of its own."),
    ] = None,
    captured: Annotated[
        Path | None, Option(metavar="FILE", help="Compare on the layers in this file of bsfa capture.")
    ] = None,
    calibrate_on: Annotated[
        Path | None, Option(metavar="FILE", help="Captured layers, of another text, to fit bsfa's thresholds to.")
    ] = None,
    layers: Annotated[int, Option(min=1, max=1024, help="Structured layers, each with heads of its own.")] = 1,
    heads: Annotated[int, Option(min=1, help="Query heads of structured layers.")] = 32,
    kv_heads: Annotated[
        int | None, Option(min=1, help="Key/value heads of structured layers; a fourth of the query heads by default.")
    ] = None,
    head_dim: Annotated[int, Option(min=16, help="Head dimension of structured layers.")] = 128,
    causal: Annotated[bool, Option("--causal/--no-causal", help="Structured layers: causal or not.")] = True,
    tile: Annotated[str, Option(help="Tile shape, query rows x keys: 64x128 or 128x64.")] = "64x128",
    seconds: Annotated[float, Option(help="Measuring time per layer; each method runs at least 5 times.")] = 3.0,
    seed: Annotated[int, Option(min=0, help="Seed of structured layers, texts and the order of measuring.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[Path | None, Option("--output", "-o", help="Write the result, raw samples included.")] = None,
    plot: Annotated[
        Path | None, Option(metavar="FILE.svg", help="Plot loss against speed, of one length; .svg or .png.")
    ] = None,
    details: Annotated[bool, Option("--details", help="Show every column, not those that fit 80.")] = False,
    json: Json = False,
    config: Config = None,
) -> None:
    """Run every way of skipping tiles on the same inputs.

    Selection methods, gates and combinations of both, with the same kernel and clock: what each loses, and how fast it
    is.
    """
    from ..timing.plan import Shape

    _refuse_idle(context, model is not None, captured is not None)
    if calibrate_on is not None and captured is None:
        raise UsageError("--calibrate-on belongs to --captured; structured layers are calibrated on a sample of theirs")
    if model is not None and captured is not None:
        raise UsageError("give either a model or --captured")
    if (run is not None or thresholds is not None) and model is None:
        raise UsageError("--run and --thresholds belong to a comparison inside a model; name the calibrated model")
    if run is not None and thresholds is not None:
        raise UsageError("give either --run or --thresholds")
    if tasks is not None and model is None:
        raise UsageError("--tasks are asked of a model; name one")
    if tasks is None and ask_at != 1:
        raise UsageError("--ask-at belongs to --tasks")
    if minutes is not None and tasks is None:
        raise UsageError("--minutes belongs to --tasks")
    if processes is not None and tasks is None:
        raise UsageError("--processes share the questions of --tasks out")
    if processes is not None and processes > questions:
        raise UsageError(f"--processes {processes} for {questions} questions a task: one process has one at least")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UsageError(f"--minutes must be positive, got {minutes:g}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds must be positive, got {seconds}")
    if seed >= 1 << 63:
        raise UsageError(f"--seed must be below 2^63, got {seed}")
    if plot is not None:
        from ..presentation import figures

        figures.check(plot)
    if tile not in ("64x128", "128x64"):
        raise UsageError(f"--tile must be 64x128 or 128x64, got {tile!r}")
    kv_heads = kv_heads or max(1, heads // 4)
    shape = Shape("structured", heads, kv_heads, head_dim, causal)
    lengths = None if length is None else _lengths(length)
    given_data = joined(data, image_root, frames, repeat_data)

    with importing():
        from bsfa_kernels import TileShape

        from ..calibration.group import Group, check_shared, place_of, started
        from ..comparison import run as bench
        from ..comparison.methods import ALL, CALIBRATED, Settings, chosen, named
        from ..comparison.tensors import CapturedSource, StructuredSource
        from ..console import beginner, note, note_speeds, print_json, progress
        from ..data.plans import plan
        from ..data.prompts import check_source
        from ..environment import resolve_device, wake
        from ..files import RESULT, check_writable, write_json
        from ..presentation import compare_table
        from ..timing.interleave import unseen
        from ..timing.sweep import resolve_dtype

    asked_for = named(methods)
    if (model is not None and run is None and thresholds is None) or (captured is not None and calibrate_on is None):
        needy = [name for name in asked_for if name in CALIBRATED and methods != ALL]
        if needy:
            how = "--run RUN or --thresholds FILE" if model is not None else "--calibrate-on FILE"
            raise UsageError(f"--methods {needy[0]} needs thresholds to compare with: give {how}")
    settings = Settings.parse(setting or [])
    settings.check(asked_for)
    resolve_device(device)
    if processes is not None and processes > 1 and started() == 1:
        from ..calibration import spawn

        check_shared(device)
        spawn.run(processes, json, replaceable=False)
        return
    if tasks is None and started() > 1:
        raise UsageError("several processes share the questions of --tasks out; give --tasks, or start one process")
    group = Group.joined(processes)
    place = place_of(device, group)
    first = group is None or group.first
    for path, kind in ((output, RESULT), (plot, None)):
        if path is not None and first:
            check_writable(path, kind)
    shown = TileShape(*map(int, tile.split("x")))
    if model is not None:
        from ..data.prompts import default_data
        from ..data.texts import remarks

        wanted = lengths or _lengths(DEFAULT_LENGTHS[place.type])
        for n in (wanted[0], wanted[-1]):
            check_source(given_data, n, samples)
        for n in wanted if tasks else ():
            plan(tasks, (n,), questions, seed, ask_at=ask_at)
        given, calibration = _thresholds(run, thresholds, shown)
        chosen(methods, calibration, True, settings)
        wake(place)
        loaded = _loaded(model, given, place, dtype, wanted[-1])
        spec = given_data or default_data(loaded)
        for remark in remarks(given_data, spec, samples) if first else ():
            note(remark)
        texts = [_texts(loaded, spec, samples, n, seed + 1) for n in wanted]
        asked = [_questions(loaded, tasks, n, questions, seed, ask_at) if tasks else [] for n in wanted]

        def cell(i: int, begin) -> dict:
            return bench.model_cell(
                loaded, calibration, methods, shown, place, texts[i], seconds, seed, asked[i], begin, settings, minutes,
                group,
            )  # fmt: skip

    else:
        if captured is not None:
            wanted = lengths or [None]
            sources = [CapturedSource(captured, place, n) for n in wanted]
            fitted = [calibrate_on and CapturedSource(calibrate_on, place, n, or_all=True) for n in wanted]
        else:
            wanted = lengths or _lengths(DEFAULT_LENGTHS[place.type])
            sources = [StructuredSource(shape, n, layers, seed, place, resolve_dtype(dtype, place)) for n in wanted]
            fitted = sources

        def cell(i: int, begin) -> dict:
            return bench.cell(sources[i], fitted[i], methods, shown, place, seconds, seed, begin, settings)

    def measured(i: int) -> None:
        """On a CPU nobody answers the next length's questions while this length is timed."""
        if group is not None and place.type == "cpu" and i + 1 < len(wanted):
            group.meet(f"measured/{i}")

    if not first:
        for i in range(len(wanted)):
            cell(i, unseen)
            measured(i)
        return
    result = bench.empty(place, shown, seed) | {"settings": setting or []}
    note_speeds(place)
    for i, n in enumerate(wanted):
        with progress() as display:
            begin = beginner(display, "all tokens" if n is None else f"{n:,} tokens")
            result["cells"].append(cell(i, begin))
        measured(i)
        found = result["cells"][-1]
        if found.get("questions_left"):
            note(f"{n:,} tokens: {minutes:g} minutes were over with {found['questions_left']} questions left unasked")
        compare_table.show_cell(found, details)
        if output:
            write_json(output, result)
    compare_table.show_break_even(result)
    result["complete"] = True
    if output:
        write_json(output, result)
        note(f"written: {output}; next: bsfa report {output} -o report.html")
    if plot:
        from ..files import write_whole
        from ..presentation import figures
        from ..presentation.compare_readme import plot_of

        write_whole(plot, figures.content(plot_of(result), plot))
        note(f"written: {plot}")
    if json:
        print_json(result)
    failures = bench.failures(result)
    if failures:
        raise GateFailed("; ".join(failures))


def _lengths(text: str) -> list[int]:
    lengths = sorted(set(numbers(text, int, "--length takes whole numbers")))
    if lengths[0] < 1:
        raise UsageError(f"--length takes positive numbers, got {text!r}")
    return lengths


def _refuse_idle(context: Context, in_model: bool, captured: bool) -> None:
    """Raise UsageError for an option of the command line that this kind of comparison would not look at."""
    idle = () if in_model else (*OF_DATA, "samples", "questions")
    if in_model or captured:
        idle += ("layers", "heads", "kv_heads", "head_dim", "causal")
    if captured:
        idle += ("dtype",)
    kind = "inside a model" if in_model else "on captured layers" if captured else "on structured layers"
    refuse_idle(context, idle, kind)


def _thresholds(run: Path | None, thresholds: Path | None, tile):
    """(Run or Thresholds, Calibration or Exported), or (None, None). Raises InputError for another tile shape."""
    from bsfa_kernels.thresholds import Thresholds

    from ..calibration.store import Run
    from ..comparison.calibration import Calibration, Exported

    if run is None and thresholds is None:
        return None, None
    given = Thresholds.read(thresholds) if run is None else Run.open(run)
    made_for = given.tile if run is None else given.plan.tile
    if made_for != tile:
        raise InputError(f"{run or thresholds} was calibrated with tiles of {made_for}; give --tile {made_for}")
    return given, Exported(given, thresholds.name) if run is None else Calibration.of_run(given)


def _loaded(model: str, given, place, dtype: str, longest: int):
    """The LoadedModel. Raises InputError or ThresholdsError where `given`, of `_thresholds`, is of another model."""
    from functools import partial

    from ..models.load import check_positions, load_model

    positions = partial(check_positions, length=longest, flag="--length")
    loaded = load_model(None if model == BUNDLED else model, device=place, dtype=dtype, check_config=positions)
    if given is not None:
        given.check_model(loaded.identity)
    return loaded


def _texts(loaded, data: str, samples: int, length: int, seed: int) -> list:
    from ..data.prompts import load_prompts
    from ..data.texts import falls_short

    texts = load_prompts(data, loaded, samples=samples, length=length, seed=seed)
    if any(falls_short(text, length) for text in texts):
        raise InputError(f"{data}: a prompt has {min(len(text.tokens) for text in texts)} tokens, not {length}")
    return texts


def _questions(loaded, names: str, length: int, count: int, seed: int, ask_at: float) -> list:
    from ..data.plans import plan

    return list(plan(names, (length,), count, seed, ask_at=ask_at).questions_for(loaded.tokenizer))
