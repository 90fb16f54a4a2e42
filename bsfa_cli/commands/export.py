"""bsfa export: choose operating points from a run, and write them as one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import UsageError
from ..options import Config, Json


def export(
    run: Annotated[Path | None, Argument(help="Run directory of bsfa calibrate.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE", help="The artifact to write.")] = None,
    top_k: Annotated[
        list[int] | None, Option(help="The BSFA recipe: about K tiles a row; absolute gate. Repeatable.")
    ] = None,
    target_skip: Annotated[
        list[float] | None, Option(help="Skip this share of tiles, where the least mass is lost. Repeatable.")
    ] = None,
    max_dropped_mass: Annotated[
        list[float] | None, Option(help="Drop at most this softmax mass per row, at --quantile. Repeatable.")
    ] = None,
    gate: Annotated[str, Option(help="gap or absolute, for the last two.")] = "gap",
    quantile: Annotated[float, Option(help="Of rows, for the bound on dropped mass.")] = 0.99,
    from_official: Annotated[
        Path | None, Option(metavar="FILE.pt", help="Convert the BSFA authors' file instead; nothing in it is run.")
    ] = None,
    model: Annotated[
        str | None, Option(help="With --from-official: the model it is for, whose configuration is then checked.")
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Turn a calibration run into thresholds.safetensors, checked on held-out samples."""
    if output is None:
        raise UsageError("where should the thresholds go? give -o thresholds.safetensors")
    if (run is None) == (from_official is None):
        raise UsageError("give either a run directory or --from-official FILE.pt")
    if gate not in ("gap", "absolute"):
        raise UsageError(f"--gate must be gap or absolute, got {gate!r}")
    if not 0 < quantile <= 1:
        raise UsageError(f"--quantile must lie in (0, 1], got {quantile:g}")
    if model is not None and from_official is None:
        raise UsageError("--model belongs to --from-official; a run knows its model")
    asked = (top_k or [], target_skip or [], max_dropped_mass or [])
    if from_official is not None and any(asked):
        raise UsageError("the authors' file has its own operating points; drop --top-k, --target-skip and the like")

    from ..files import write_whole
    from ..presentation.console import note, print_json

    if from_official is not None:
        artifact, reports = _official(from_official, model), []
    else:
        from ..calibration import points
        from ..calibration.store import Run
        from ..presentation import points_table

        requests = points.make_requests(*asked, gate)
        artifact, reports = points.export(Run.open(run), requests, quantile)
        points_table.show(reports)
        for report in reports:
            for remark in points.remarks(report):
                note(remark)
    content = artifact.to_bytes()
    write_whole(output, content)
    names = ", ".join(point.name for point in artifact.points)
    note(f"written: {output} ({len(content):,} bytes; points: {names})")
    if json:
        print_json(_result(output, content, artifact, reports))


def _official(path: Path, model: str | None):
    from ..calibration.official import read_official

    if model is None:
        return read_official(path)
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


def _result(output: Path, content: bytes, artifact, reports) -> dict:
    import hashlib
    from dataclasses import asdict

    return {
        "file": str(output),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tile": str(artifact.tile),
        "points": [asdict(point) for point in artifact.points],
        "modules": {report.point.name: [asdict(module) for module in report.modules] for report in reports},
    }
