"""bsfa export: choose operating points from a run, and write them as one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from ..errors import GateFailed, UsageError
from ..idle import refuse_idle
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, parse_layers

OF_SEARCH = ("frames", "repeat_data", "samples", "device", "dtype")  # options, as parameters, that only it reads


def export(
    context: Context,
    run: Annotated[Path | None, Argument(help="Run directory of bsfa calibrate.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE", help="The artifact to write.")] = None,
    top_k: Annotated[
        list[int] | None, Option(metavar="K", help="The BSFA recipe: about K tiles a row; absolute gate. Repeatable.")
    ] = None,
    target_skip: Annotated[
        list[float] | None,
        Option(
            metavar="SHARE",
            help="Skip this share of tiles, where it costs least: as --kl-skip for a run with gradients, else as "
            "--mass-skip. Repeatable.",
        ),
    ] = None,
    mass_skip: Annotated[
        list[float] | None,
        Option(metavar="SHARE", help="Skip this share where the least softmax mass is lost. Repeatable."),
    ] = None,
    effect_skip: Annotated[
        list[float] | None,
        Option(metavar="SHARE", help="Skip this share where the residual stream moves least. Repeatable."),
    ] = None,
    kl_skip: Annotated[
        list[float] | None,
        Option(
            metavar="SHARE",
            help="Skip this share where predictions change least; needs a run with gradients. Repeatable.",
        ),
    ] = None,
    one_threshold: Annotated[
        list[float] | None,
        Option(
            metavar="SHARE",
            help="Skip this share with one lambda for the whole model, as skip-softmax (BLASST). Repeatable.",
        ),
    ] = None,
    max_dropped_mass: Annotated[
        list[float] | None,
        Option(metavar="MASS", help="Drop at most this softmax mass per row, at --quantile. Repeatable."),
    ] = None,
    largest_skip_with: Annotated[
        list[str] | None,
        Option(
            metavar="METRIC=LIMIT",
            help="Search the largest skip at which --model, on held-out texts, keeps top1=0.99, kl=0.01 or "
            "perplexity-increase=0.01, its 95 % interval included. Repeatable.",
        ),
    ] = None,
    gate: Annotated[str, Option(help="gap or absolute; top-k is always absolute.")] = "gap",
    keep_dense: Annotated[
        str | None,
        Option(
            metavar="LAYERS",
            help="Layers such as 0-1,29 that keep every tile, or auto:N, the N in which a dropped tile costs most; the "
            "others skip more to reach the rate.",
        ),
    ] = None,
    aim: Annotated[
        str,
        Option(help="Samples on which the share is reached: fitted, or held-out, which then check all but the share."),
    ] = "fitted",
    scores: Annotated[
        str | None, Option(help="Scores that the points run with: exact or int8; the run's own by default.")
    ] = None,
    max_int8_error: Annotated[
        float | None,
        Option(
            help="With int8 scores: heads whose output they move by more than this (relative, 0.02 is 2 %) keep exact "
            "ones; needs calibrate --scores int8."
        ),
    ] = None,
    by_modality: Annotated[
        bool,
        Option(
            "--by-modality",
            help="Of a run on images: thresholds of their own for query tiles of text, of images and of both.",
        ),
    ] = False,
    quantile: Annotated[
        float, Option(help="Share of rows that --max-dropped-mass holds for, and that bounds are given of.")
    ] = 0.99,
    from_official: Annotated[
        Path | None, Option(metavar="FILE.pt", help="Convert the BSFA authors' file instead; nothing in it is run.")
    ] = None,
    to: Annotated[
        str | None,
        Option(
            metavar="ENGINE",
            help="Write another engine's one number instead: the sparse_attention_config of modelopt, trtllm or "
            "vllm-omni for one --target-skip, and what it loses. An output that is a checkpoint's config.json is "
            "completed.",
        ),
    ] = None,
    from_modelopt: Annotated[
        Path | None,
        Option(
            metavar="CONFIG.json",
            help="Convert such a configuration to thresholds for the model of RUN, for prompts of --length.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="With --largest-skip-with: the calibrated model, the bundled one by default. With --from-official: "
            "the model it is for, whose configuration is then checked."
        ),
    ] = None,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    samples: Annotated[int, Option(min=1, help="With --largest-skip-with: number of texts.")] = 4,
    length: Annotated[
        int | None,
        Option(
            min=2,
            help="With --largest-skip-with: tokens a text, at most. With --from-modelopt: tokens of the prompts. The "
            "run's by default.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Choose operating points from a run, as one thresholds file.

    They are checked on the run's held-out samples; no model is needed, but for --largest-skip-with. Points that the run
    cannot give are left out, named, and end in exit code 1; where it gives none, nothing is written.
    """
    if output is None:
        raise UsageError("where should the thresholds go? give -o thresholds.safetensors")
    if (run is None) == (from_official is None):
        raise UsageError("give either a run directory or --from-official FILE.pt")
    if gate not in ("gap", "absolute"):
        raise UsageError(f"--gate must be gap or absolute, got {gate!r}")
    if aim not in ("fitted", "held-out"):
        raise UsageError(f"--aim must be fitted or held-out, got {aim!r}")
    if not 0 < quantile <= 1:
        raise UsageError(f"--quantile must lie in (0, 1], got {quantile:g}")
    if scores not in (None, "exact", "int8"):
        raise UsageError(f"--scores must be exact or int8, got {scores!r}")
    if max_int8_error is not None and not 0 <= max_int8_error < float("inf"):
        raise UsageError(f"--max-int8-error must be a number from 0 on, got {max_int8_error:g}")
    if max_int8_error is not None and scores == "exact":
        raise UsageError("--max-int8-error belongs to int8 scores, and --scores exact were asked for")
    if from_official is not None and (scores == "int8" or max_int8_error is not None):
        raise UsageError(
            "the authors' file is for exact scores; run it with int8 ones by verify --scores and apply(scores=)"
        )
    searching = bool(largest_skip_with)
    if model is not None and from_official is None and not searching:
        raise UsageError("--model belongs to --largest-skip-with and --from-official; a run knows its model")
    asked = tuple(
        each or [] for each in (top_k, target_skip, mass_skip, effect_skip, kl_skip, one_threshold, max_dropped_mass)
    )  # fmt: skip
    if to is not None or from_modelopt is not None:
        others = (from_official, data, image_root, scores, max_int8_error, keep_dense, by_modality or None)
        others += (length if from_modelopt is None else None,)
        only = not any((*asked[:1], *asked[2:])) and not searching and all(value is None for value in others)
        if not only or gate != "gap" or aim != "fitted":
            raise UsageError("--to and --from-modelopt take RUN, -o and --target-skip, --from-modelopt --length too")
        idle = OF_SEARCH if to is None else (*OF_SEARCH, "quantile")
        refuse_idle(context, idle, f"with {'--from-modelopt' if to is None else '--to'}")
        _hand_over(run, output, to, from_modelopt, target_skip, length, quantile, json)
        return
    if any(value is not None for value in (data, image_root, length)) and not searching:
        raise UsageError("--data, --image-root and --length belong to --largest-skip-with; other points need no texts")
    if not searching:
        refuse_idle(context, OF_SEARCH, "without --largest-skip-with")
    if by_modality and (top_k or from_official is not None):
        what = "--top-k" if top_k else "--from-official"
        raise UsageError(f"{what} has thresholds by position alone; --by-modality goes with the other recipes")
    if keep_dense is not None and (searching or not any(asked)):
        raise UsageError("--keep-dense belongs to --target-skip and other points of a run that take no search")
    dense = frozenset() if keep_dense is None else _kept_dense(keep_dense)
    if from_official is not None and (any(asked) or searching):
        raise UsageError("the authors' file has its own operating points; drop --top-k, --target-skip and the like")

    from ..console import note, print_json
    from ..files import THRESHOLDS, check_writable, write_whole

    check_writable(output, THRESHOLDS)
    reports, left_out = [], {}
    if from_official is not None:
        artifact = _official(from_official, model)
    else:
        with importing():
            from ..calibration import points
            from ..calibration.store import Run
            from ..data.texts import stand_in
            from ..presentation import points_table

        requests = points.make_requests(*asked, gate, dense) if any(asked) or not searching else []
        begun = Run.open(run)
        if max_int8_error is not None and (scores or begun.plan.scores) != "int8":
            raise UsageError("--max-int8-error belongs to int8 scores; give --scores int8")
        searched: dict[str, dict] = {}
        if searching:
            from . import largest_skip

            limits = largest_skip.parse_limits(largest_skip_with)
            spec = joined(data, image_root, frames, repeat_data)
            place = largest_skip.Place(model, spec, samples, length, device, dtype, by_modality)
            found, searched, left_out = largest_skip.find(begun, limits, gate, quantile, place, scores, max_int8_error)
            requests += found
        if not requests:
            raise GateFailed("; ".join(left_out.values()))
        artifact, reports, missing = points.export(
            begun, requests, quantile, searched, aim, scores, max_int8_error, by_modality
        )
        left_out |= missing
        points_table.show(reports)
        for report in reports:
            for remark in points.remarks(report, begun.lengths("fit")):
                note(remark)
        for remark in points.score_remarks(begun, artifact):
            note(remark)
        calibrated, layers = len(begun.manifest["modules"]), begun.manifest["model"].get("layers")
        if isinstance(layers, int) and calibrated < layers:
            note(
                f"skip rates are of the {calibrated} calibrated modules of {layers}; the others keep every tile, so "
                f"about {calibrated / layers:.1%} of these shares are skipped of all tiles"
            )
        generated = stand_in(begun.manifest["data"]["spec"])
        if generated:
            note(f"calibrated without real text: {generated}; run bsfa verify --data on your own")
    content = artifact.to_bytes()
    write_whole(output, content)
    names = ", ".join(point.name for point in artifact.points)
    note(f"written: {output} ({len(content):,} bytes; points: {names})")
    note(f"next: bsfa verify MODEL --thresholds {output}")
    if json:
        print_json(_result(output, content, artifact, reports, left_out))
    if left_out:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise GateFailed(f"{output} lacks {reasons}")


def _hand_over(run, output, to, config, target_skip, length, quantile: float, json: bool) -> None:
    from ..files import THRESHOLDS, check_writable
    from . import handover

    if to is not None and config is not None:
        raise UsageError("give either --to or --from-modelopt")
    if to is None:
        rate = handover.one_rate(target_skip, "--from-modelopt")
        check_writable(output, THRESHOLDS)
        handover.from_modelopt(run, config, output, rate, length, quantile, json)
        return
    if to not in handover.ENGINES:
        raise UsageError(f"--to must be one of {', '.join(handover.ENGINES)}, got {to!r}")
    rate = handover.one_rate(target_skip, "--to")
    if rate is None:
        raise UsageError("which skip rate should be the engine's default? give --target-skip")
    check_writable(output)
    handover.to_engine(run, to, output, rate, json)


def _kept_dense(text: str) -> frozenset[int] | int:
    """The layers of "0-1,29", or N of "auto:N". Raises UsageError."""
    automatic, _, count = text.partition(":")
    if automatic.strip() != "auto":
        return frozenset(parse_layers(text, "--keep-dense"))
    if not (count.isdecimal() and 0 < int(count) < 1 << 20):
        raise UsageError(f"--keep-dense must be like 0-1,29 or auto:2; got {text!r}")
    return int(count)


def _official(path: Path, model: str | None):
    from ..calibration.official import read_official

    artifact = read_official(path)  # refused, where it must be, before the model is looked for
    if model is None:
        return artifact
    from bsfa_kernels.integrations.transformers import attention_modules, model_identity
    from bsfa_kernels.thresholds import MODEL_KEYS

    from ..models.load import load_empty

    empty, name, revision = load_empty(model)
    identity = {"id": name, "revision": revision} | model_identity(empty)
    modules = {
        module.layer: (path, module.query_heads)
        for path, module in attention_modules(empty).items()
        if module.layer is not None
    }
    return read_official(path, {key: identity.get(key) for key in MODEL_KEYS}, modules)


def _result(output: Path, content: bytes, artifact, reports, left_out: dict[str, str]) -> dict:
    import hashlib
    from dataclasses import asdict

    return {
        "file": str(output),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tile": str(artifact.tile),
        "points": [asdict(point) for point in artifact.points],
        "left_out": left_out,
        "searched": artifact.provenance.get("searched"),
        "modalities": artifact.provenance.get("modalities"),
        "modules": {report.point.name: [asdict(module) for module in report.modules] for report in reports},
    }
