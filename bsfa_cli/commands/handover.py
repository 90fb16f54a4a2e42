"""bsfa export --to and --from-modelopt: thresholds as other engines' one number, and the way back."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    from ..calibration.handover import Curve
    from ..calibration.store import Run

ENGINES = ("modelopt", "trtllm", "vllm-omni")
KEY = "sparse_attention_config"
CAVEATS = {
    "modelopt": "its vLLM plug-in takes the longest prompt of a batch for the length, so that shorter ones skip less",
    "trtllm": f"TensorRT-LLM reads it where its own {KEY} says algorithm: skip_softmax",
    "vllm-omni": "vLLM-Omni takes a and b alone, for diffusion transformers: give target_sparsity in "
    "--diffusion-attention-config",
}
UNEVEN = 0.9  # of the longest sample, below which the shortest makes lengths uneven


def to_engine(run: Path, engine: str, output: Path, rate: float, print_result: bool) -> None:
    """Write one lambda for the whole model, and say what it loses against thresholds for every head.

    Raises UsageError for a rate that it cannot give, InputError for a run or a config.json that cannot be used.
    """
    from ..calibration import fit, handover
    from ..calibration.store import Run
    from ..console import note, print_json
    from ..files import write_whole
    from ..presentation import handover_table

    begun = Run.open(run)
    begun.check_exact()
    curves = {role: begun.complete(role) for role in ("fit", "heldout")}
    fitted = fit.Table.of(curves["fit"], "gap")
    judged = fit.Table.of(curves["heldout"], "gap") if curves["heldout"] else fitted
    curve = _with_uncalibrated(handover.fit_curve(fitted, rate, _lengths(begun)), begun)
    reached = handover.one_number(fitted, curve, rate).total_skip
    one = handover.one_number(judged, curve, rate)
    ours = handover.by_head(judged, fitted, reached)
    config = handover.sparse_attention_config(engine, curve, version("bsfa"))
    content, merged = _merged(output, config, begun)
    write_whole(output, content)

    role = "held-out" if curves["heldout"] else "fitted"
    handover_table.show(judged.modules, one, ours, role)
    for remark in _remarks(begun, engine, curve):
        note(remark)
    where = f"{KEY} in it is set, the rest is as it was" if merged else "merge it into the checkpoint's config.json"
    note(f"written: {output} ({where})")
    if print_result:
        print_json({
            "file": str(output), "engine": engine, KEY: config, "length": curve.length, "gap": curve.gap(rate),
            "rates": [{"target": target, "reached": found} for target, found in curve.rates], "samples": role,
            "one_number": {"skip": one.total_skip, "dropped_mass": one.total_mass},
            "by_head": {"skip": ours.total_skip, "dropped_mass": ours.total_mass},
            "heads": handover_table.rows(judged.modules, one, ours),
        })  # fmt: skip


def from_modelopt(
    run: Path, config: Path, output: Path, rate: float | None, length: int | None, quantile: float, print_result: bool
) -> None:
    """Write the thresholds that a configuration of another engine means for prompts of one length. Errors as `read` and
    `convert` of calibration/from_modelopt.py.
    """
    import hashlib
    from dataclasses import asdict

    from ..calibration import from_modelopt
    from ..calibration.store import Run
    from ..console import note, print_json
    from ..files import write_whole
    from ..presentation import points_table

    given, begun = from_modelopt.read(config), Run.open(run)
    begun.check_exact()
    artifact, reports = from_modelopt.convert(begun, given, rate, length, quantile)
    content = artifact.to_bytes()
    write_whole(output, content)
    points_table.show(reports)
    used = artifact.provenance["modelopt"]["length"]
    note(f"lambda is that of prompts of {used:,} tokens; give --length for others")
    if given.decode:
        note("its coefficients for decoding are left out: bsfa decodes densely")
    note(f"written: {output} ({len(content):,} bytes; point: {artifact.points[0].name})")
    if print_result:
        print_json({
            "file": str(output), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "length": used,
            "points": [asdict(point) for point in artifact.points],
        })  # fmt: skip


def _lengths(run: Run) -> list[int]:
    return [sample["tokens"] for sample in run.manifest["samples"] if sample["role"] == "fit"]


def _with_uncalibrated(curve: Curve, run: Run) -> Curve:
    """Layers that were not calibrated stay dense, as they do with thresholds for every head."""
    from dataclasses import replace

    from ..calibration.handover import uncalibrated
    from ..order import natural

    layers = run.manifest["model"].get("layers")
    others = uncalibrated(run.manifest["modules"], layers if isinstance(layers, int) else 0)
    return replace(curve, ignore=tuple(sorted({*curve.ignore, *others}, key=natural)))


def _merged(output: Path, config: dict, run: Run) -> tuple[bytes, bool]:
    """(the file to write, whether it is a checkpoint's config.json with the key set). Raises InputError for a file that
    is there and no such thing, which would be lost, or that of another model.
    """
    from ..calibration.from_modelopt import check_model

    whole, merged = {KEY: config}, False
    if output.is_symlink():
        raise InputError(f"{output} is a link, as in Hugging Face's cache, whose file others share; copy it first")
    if output.exists():
        try:
            found = json.loads(output.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{output} is there and is not JSON ({error}); it is left alone") from None
        if not isinstance(found, dict) or not (set(found) == {KEY} or {"architectures", "model_type"} & set(found)):
            raise InputError(f"{output} is there and is no checkpoint's config.json; it is left alone")
        check_model(run, output, found)
        merged = set(found) != {KEY}
        whole = {**found, KEY: config}
    return (json.dumps(whole, indent=2) + "\n").encode(), merged


def _remarks(run: Run, engine: str, curve: Curve) -> list[str]:
    lengths, found = _lengths(run), []
    if min(lengths) < UNEVEN * max(lengths):
        found.append(
            f"samples have {min(lengths):,} to {max(lengths):,} tokens, and lambda was taken for {curve.length:,}: "
            "calibrate on samples of one length"
        )
    target, reached = max(curve.rates, key=lambda pair: abs(pair[0] - pair[1]))
    found.append(
        f"lambda = {curve.a:.6g} * exp({curve.b:.6g} * target_sparsity) / length, exact at {curve.target:g}; of the "
        f"other targets {target:g} is farthest off, with {reached:.3f} reached"
    )
    if curve.ignore:
        found.append(f"kept dense: {', '.join(curve.ignore)}")
    found.append(
        "their kernels judge tiles from left to right, and with tiles of their own: at the same lambda they skip fewer "
        "than these curves say, so measure there"
    )
    return [*found, CAVEATS[engine]]


def one_rate(rates: list[float] | None, option: str) -> float | None:
    """The single value of --target-skip, None without one. Raises UsageError for several, or one that is no rate."""
    if not rates:
        return None
    if len(rates) > 1:
        raise UsageError(f"{option} takes one --target-skip, got {len(rates)}")
    if not 0 < rates[0] < 1:
        raise UsageError(f"--target-skip must lie between 0 and 1, both excluded; got {rates[0]:g}")
    return rates[0]
