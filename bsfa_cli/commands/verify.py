"""bsfa verify: is it still the model?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import GateFailed, UsageError
from ..options import Config, Device, Dtype, Json

DEFAULT_LENGTH = {"cpu": 2048, "cuda": 32768}


def verify(
    model: Annotated[
        str | None, Argument(help="Checkpoint directory or Hub id; the embedded random model by default.")
    ] = None,
    thresholds: Annotated[Path, Option(help="Thresholds artifact made by bsfa export.")] = ...,
    point: Annotated[str | None, Option(help="Operating point in the artifact; all of them by default.")] = None,
    data: Annotated[
        str, Option(help="Texts to verify on: .txt, .jsonl or builtin:NAME, as for calibrate.")
    ] = "builtin:mixed",
    samples: Annotated[int, Option(min=1, help="Number of texts.")] = 2,
    length: Annotated[
        int | None, Option(min=2, help="Tokens a text, at most; 32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of the texts; by default another one than calibration used.")] = None,
    min_top1: Annotated[
        float | None, Option(help="Fail below this share of positions where sparse and dense predict the same token.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, Option(help="Fail above this relative increase of perplexity (0.01 is one percent).")
    ] = None,
    max_dropped_mass: Annotated[
        float | None, Option(help="Fail above this 99th percentile, over rows and heads, of dropped softmax mass.")
    ] = None,
    min_skip: Annotated[float | None, Option(help="Fail below this share of skipped tiles.")] = None,
    negative_control: Annotated[
        bool,
        Option("--negative-control", help="Also drop every tile that may be dropped: the accuracy gates must fail."),
    ] = False,
    backend: Annotated[str, Option(help="Demand this backend; the fastest that can serve by default.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Compare the model at an operating point with its dense self: kernel, layers, predictions."""
    from ..verification.gates import Gates

    gates = Gates(min_top1, max_perplexity_increase, max_dropped_mass, min_skip)
    if negative_control and not gates.judge_accuracy:
        raise UsageError(
            "--negative-control needs an accuracy gate that it can fail: --min-top1, --max-perplexity-increase or "
            "--max-dropped-mass"
        )

    from bsfa_kernels.backends import NAMES
    from bsfa_kernels.thresholds import Thresholds

    if backend not in ("auto", *NAMES):
        raise UsageError(f"--backend must be auto or one of {', '.join(NAMES)}; got {backend!r}")
    artifact = Thresholds.read(thresholds)
    points = [each.name for each in artifact.points] if point is None else [point]
    artifact.index(points[0])

    from ..calibration.data import data_hash, load_texts
    from ..environment import describe
    from ..models.load import check_positions, explain_memory, load_model, resolve_device
    from ..presentation import verify_table
    from ..presentation.console import note, print_json, progress
    from ..verification import run

    device = resolve_device(device)
    length = length or DEFAULT_LENGTH[device.type]
    loaded = load_model(model, device=device, dtype=dtype)
    if loaded.label:
        note(f"{loaded.identity['id']}: {loaded.label}")
    artifact.check_model(loaded.identity)
    check_positions(loaded.model.config, length, "--length")
    seed = _held_out_seed(artifact.provenance) if seed is None else seed
    shortest = 2 * max(artifact.tile.rows, artifact.tile.keys)
    texts = load_texts(data, samples=samples, length=length, tokenizer=loaded.tokenizer, seed=seed, shortest=shortest)
    note(f"data: {len(texts)} texts of {data}, seed {seed}, {sum(len(text.tokens) for text in texts):,} tokens")
    overlap = _overlap(artifact.provenance, data, data_hash(texts))
    if overlap:
        note(overlap)

    memory = explain_memory("--length, or choose a 16-bit --dtype")
    with memory, progress() as display:
        task = display.add_task("dense and sparse passes", total=len(texts) * (1 + len(points)))
        results = run.verify_points(
            loaded.model, artifact, points, texts, backend, lambda: display.advance(task)
        )  # fmt: skip
        control = None
        if negative_control:
            control = run.negative_control(loaded.model, artifact, points[0], texts, backend)

    failures = []
    for result in results:
        result["failures"] = gates.failures(result)
        failures += [f"{result['name']}: {failure}" for failure in result["failures"]]
        verify_table.show(result, result["failures"])
    if control:
        control["failures"] = gates.accuracy_failures(control)
        if control["failures"]:
            note(f"negative control fails, as it must: {'; '.join(control['failures'])}")
        else:
            failures.append("the negative control passed: these gates cannot tell a broken model from a good one")
    dense = run.dense_notes(loaded.model)
    for reason in sorted({entry["reason"] for entry in dense}):
        count = sum(entry["reason"] == reason for entry in dense)
        note(f"{count} module(s) ran dense: {reason}")
    if json:
        print_json({
            "model": loaded.identity, "label": loaded.label, "thresholds": str(thresholds),
            "tile": str(artifact.tile), "environment": describe(device), "device": str(device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."), "backend": backend,
            "data": {
                "spec": data, "seed": seed, "hash": data_hash(texts),
                "samples": [{"id": t.id, "source": t.source, "tokens": len(t.tokens)} for t in texts],
            },
            "gates": vars(gates), "points": results, "negative_control": control, "dense": dense,
            "passed": not failures,
        })  # fmt: skip
    if failures:
        raise GateFailed("; ".join(failures))
    if gates.judge_accuracy:
        note("passed")
    else:
        note("passed, with no accuracy limit asked for: --min-top1, --max-perplexity-increase or --max-dropped-mass")


def _held_out_seed(provenance) -> int:
    """A seed that calibration did not use; its own is in the artifact's provenance."""
    used = provenance.get("seed")
    return used + 1 if isinstance(used, int) and not isinstance(used, bool) else 1


def _overlap(provenance, data: str, texts_hash: str) -> str | None:
    """A warning where the texts are, or may be, those that the thresholds were calibrated on."""
    from ..calibration.data import is_generated

    calibrated = provenance.get("data")
    calibrated = calibrated if isinstance(calibrated, dict) else {}
    if calibrated.get("hash") == texts_hash:
        return "these are the texts that the thresholds were calibrated on, so nothing here is held out"
    if not is_generated(data) and calibrated.get("spec") == Path(data).name:
        return f"the thresholds were calibrated on a file named {Path(data).name} too: these texts may not be held out"
    return None
