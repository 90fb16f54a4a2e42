"""What a file of bsfa's holds: thresholds, a run directory, a stored result, or captured layers.

found = inspect(Path("thresholds.safetensors"))
found.data                      # JSON
found.facts, found.table        # the same for a person
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import verification
from .comparison import matching
from .errors import InputError, unlike_its_format
from .files import read_result
from .presentation.points_table import bound_words, modality_lines
from .timing import compare

MANIFEST = "run.json"
SAFETENSORS_HEADER = 8  # bytes that say how long the JSON behind them is


@dataclass(frozen=True)
class Inspected:
    """`data`: JSON, with `kind`; `facts`: (name, words); `table`: headings and rows, or empty."""

    data: dict
    facts: list[tuple[str, str]]
    table: list[tuple[str, ...]]


BROKEN = (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, IndexError)


def inspect(path: Path) -> Inspected:
    """Raises InputError, or ThresholdsError, for what is none of these, or is damaged."""
    try:
        return _read(path)
    except BROKEN as error:
        from bsfa_kernels.container import Malformed  # not at the top: results are read without torch

        if isinstance(error, Malformed):  # says what is wrong
            raise
        raise unlike_its_format(path, error) from error


def _read(path: Path) -> Inspected:
    if path.is_dir():
        return _run(path)
    try:
        with open(path, "rb") as file:
            head = file.read(SAFETENSORS_HEADER + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if path.name == MANIFEST:
        raise _part_of_a_run(path)
    if head[:1] == b"{":
        return _result(path)
    if head[SAFETENSORS_HEADER:] == b"{":
        return _metadata(path)(path)
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise InputError(f"{path} is a PyTorch file; `bsfa export --from-official` reads the BSFA authors' thresholds")
    raise InputError(
        f"{path} is no file of bsfa's: it is neither thresholds, a run directory, a stored result nor captured layers"
    )


def _part_of_a_run(path: Path) -> InputError:
    return InputError(f"{path} is part of a run; give its directory, {path.absolute().parent}")


def _metadata(path: Path) -> Callable[[Path], Inspected]:
    """What reads this safetensors file, by the key of its metadata."""
    from safetensors import SafetensorError, safe_open

    from .comparison.tensors import METADATA

    try:
        with safe_open(path, "pt") as file:
            keys = set(file.metadata() or {})
    except (OSError, SafetensorError):
        return _thresholds  # which says what is wrong with it
    if "bsfa_run" in keys:
        raise _part_of_a_run(path)
    if not keys & {"bsfa", METADATA}:
        raise InputError(f"{path} is a safetensors file, but neither thresholds nor captured layers")
    return _thresholds if "bsfa" in keys else _capture


def _thresholds(path: Path) -> Inspected:
    from bsfa_kernels.modality import MODALITIES
    from bsfa_kernels.thresholds import Thresholds

    artifact = Thresholds.read(path)
    content = path.read_bytes()
    heads = {name: tensor.shape[1] for name, tensor in artifact.tensors.items()}
    rows = [("point", "scores", "gate", "recipe", "threshold", "keep all", "skip", "mass", "bound")]
    points = []
    for index, point in enumerate(artifact.points):
        values = [tensor[index].flatten() for tensor in artifact.tensors.values()]
        finite = [x for value in values for x in value[value.isfinite()].tolist()]
        kept_whole = 1 - len(finite) / sum(map(len, values))
        least, most = (min(finite), max(finite)) if finite else (None, None)
        points.append(asdict(point) | {"least": least, "most": most, "kept_whole": kept_whole})
        reached = point.held_out or point.fitted
        rows.append((
            point.name, point.scores, point.gate, f"{point.recipe} {point.argument:g}",
            f"{least:.2f} .. {most:.2f}" if finite else "none", f"{kept_whole:.0%}",
            *(("-",) * 3 if reached is None else
              (f"{reached.skip:.3f}", f"{reached.dropped_mass:.1e}", bound_words(reached.dropped_mass_bound))),
        ))  # fmt: skip
    provenance = dict(artifact.provenance)
    spec = provenance["data"].get("spec") if isinstance(provenance.get("data"), dict) else None
    data = {
        "kind": "thresholds", "file": str(path), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        "model": dict(artifact.model), "tile": str(artifact.tile), "keep_sink": artifact.keep_sink,
        "knots": list(artifact.knots), "modalities": list(MODALITIES) if artifact.modal else None, "modules": heads,
        "points": points, "provenance": provenance,
    }  # fmt: skip
    facts = [
        ("thresholds for", f"{artifact.model['id']} ({artifact.model['architecture'] or 'architecture unknown'})"),
        ("modules", f"{len(heads)}, {sum(heads.values())} heads"),
        ("tile", f"{artifact.tile}, the first key tile {'always kept' if artifact.keep_sink else 'like any other'}"),
        ("knots", f"{len(artifact.knots)}, positions {artifact.knots[0]:,} to {artifact.knots[-1]:,}"),
        (
            "thresholds by",
            f"modality of the query tile: {', '.join(MODALITIES)}" if artifact.modal else "head and position",
        ),
        ("calibrated on", f"{spec or 'unknown data'}, samples of up to {provenance.get('longest', '?')} tokens"),
        ("sha256", data["sha256"]),
        ("table", "skip, mass (mean over rows) and bound (of a row, at the quantile) on held-out samples, if any"),
    ]
    for point, by_role in (provenance.get("modalities") or {}).items():
        told = by_role.get("held_out") or by_role.get("fitted") or {}
        facts += [(point, line) for line in modality_lines(told)]
    return Inspected(data, facts, rows)


def _run(path: Path) -> Inspected:
    from .calibration.store import ROLES, Run

    run = Run.open(path)
    manifest, done = run.manifest, {role: run.load(role)[0] for role in ROLES}
    finished = {*done["fit"], *done["heldout"], *run.loose()}
    samples = [sample | {"done": sample["id"] in finished} for sample in manifest["samples"]]
    files = {name: (path / name).stat().st_size for name in (MANIFEST, *(f"{role}.safetensors" for role in ROLES))
             if (path / name).exists()}  # fmt: skip
    count = sum(sample["done"] for sample in samples)
    data = dict(manifest) | {
        "kind": "run", "run": str(path), "bytes": files, "samples": samples, "finished": count == len(samples),
    }  # fmt: skip
    options = manifest["options"]
    facts = [
        ("run of", f"{manifest['model']['id']} ({manifest['model']['architecture']})"),
        ("data", f"{manifest['data']['spec']}, seed {options['seed']}"),
        ("samples", f"{count} of {len(samples)} done" + ("" if data["finished"] else "; the same command resumes")),
        ("modules", f"{len(manifest['modules'])}, {sum(manifest['modules'].values())} heads"),
        ("tile", "x".join(map(str, options["tile"]))),
        ("by modality", ", ".join(manifest["data"].get("modalities") or ()) or "no, text alone"),
        ("top-k", ", ".join(map(str, options["top_k"])) or "none"),
        ("gradients", "yes, for --kl-skip" if options.get("gradients") else "no"),
        *_scores(run),
        ("computed on", f"{options['device']}, {options['dtype']}"),
        ("bytes", f"{sum(files.values()):,}"),
    ]
    rows = [("sample", "tokens", "role", "done")]
    rows += [
        (f"{s['id']}: {s['source']}", f"{s['tokens']:,}", s["role"], "yes" if s["done"] else "no") for s in samples
    ]
    return Inspected(data, facts, rows)


def _scores(run) -> list[tuple[str, str]]:
    """Of a run with int8 scores: that it is one, and what they do."""
    from .calibration.curves import int8_errors, int8_words

    if run.plan.scores == "exact":
        return []
    errors = int8_errors(run.load("fit")[1])
    return [("scores", int8_words(errors) if errors else "int8")]


def _capture(path: Path) -> Inspected:
    from .comparison.tensors import read_metadata

    metadata = read_metadata(path)
    facts = [
        ("captured from", metadata["model"] + (f" ({metadata['label']})" if metadata["label"] else "")),
        ("data", f"{metadata['data']}, seed {metadata['seed']}"),
        ("tokens", f"{metadata['length']:,}"),
        ("dtype", metadata["dtype"]),
    ]
    rows = [("layer", "scale", "causal")]
    rows += [(each["name"], f"{each['scale']:.4g}", str(each["causal"]).lower()) for each in metadata["layers"]]
    data = metadata | {"kind": "capture", "file": str(path), "bytes": path.stat().st_size}
    return Inspected(data, facts, rows)


def _result(path: Path) -> Inspected:
    stored = read_result(
        path, compare.FORMATS | {matching.KIND: matching.FORMAT, verification.KIND: verification.FORMAT}
    )  # fmt: skip
    environment = stored["environment"]
    versions = [f"{key} {environment[key]}" for key in ("bsfa", "torch", "triton") if environment.get(key)]
    facts = [
        ("result of", stored["kind"] + ("" if stored.get("complete") else ", cut short")),
        ("measured on", environment.get("gpu") or f"a CPU ({environment.get('platform')})"),
        ("versions", ", ".join(versions)),
        ("commit", environment.get("commit") or "unknown"),
    ]
    more, rows = {matching.KIND: _compared, verification.KIND: _verified}.get(stored["kind"], _profiled)(stored)
    for cell in (each for line in (*more, *rows) for each in line):
        if not isinstance(cell, str):
            raise ValueError(f"{cell!r} is no text")
    data = {key: stored.get(key) for key in ("kind", "format", "complete", "device", "seed", "environment")}
    data |= {"file": str(path), "rows": [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]}
    return Inspected(data | dict(more), facts + more, rows)


def _compared(stored: dict) -> tuple[list, list]:
    rows = [("tokens", "on", "methods", "rows", "fastest dense", "ms")]
    for cell in stored["cells"]:
        rows.append((
            f"{cell['length']:,}", cell["label"], str(len({row["method"] for row in cell["rows"]})),
            str(len(cell["rows"])), cell["fastest_dense"] or "-",
            "-" if cell["fastest_dense_ms"] is None else f"{cell['fastest_dense_ms']:.3f}",
        ))  # fmt: skip
    settings = ", ".join(stored.get("settings") or ())
    return [("tile", stored["tile"])] + ([("settings", settings)] if settings else []), rows


def _profiled(stored: dict) -> tuple[list, list]:
    rows = [("tokens", "shape", "fastest dense", "best speedup", "break-even skip")]
    for cell in stored["cells"]:
        even = cell["break_even_skip"]
        rows.append((
            f"{cell['length']:,}", cell["shape"]["name"], cell["fastest_dense"] or "-", _best(cell),
            "none measured" if even is None else f"{even:.0%}",
        ))  # fmt: skip
    for entry in stored.get("prefill") or ():
        rows.append((f"{entry['length']:,}", f"prefill of {entry['model']}", "-", _best(entry), "-"))
    return [("profile", str(stored["profile"]))], rows


def _best(measured: dict) -> str:
    found = [row["speedup"] for row in measured["contenders"] if row["kind"] == "bsfa" and row["speedup"] is not None]
    return f"{max(found):.2f}x" if found else "-"


def _verified(stored: dict) -> tuple[list, list]:
    facts = [
        ("model", stored["model"]["id"]),
        ("thresholds", stored["thresholds"]),
        ("verdict", "passed" if stored["passed"] else "failed"),
    ]
    rows = [("point", "skip", "top-1", "KL", "exact answers", "retention", "failures")]
    for point in stored["points"]:
        logits = point.get("logits", {})
        found = (point["skip"], logits.get("top1"), logits.get("kl"), point.get("exact"), point.get("retention"))
        texts = ("-" if value is None else f"{value:.4g}" for value in found)
        rows.append((point["name"], *texts, "; ".join(point["failures"]) or "none"))
    return facts, rows
