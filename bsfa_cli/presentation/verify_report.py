"""A stored result of `bsfa verify` as the parts of a page: (kind, content...) for the report to draw.

Kinds: "heading" text; "aside" sentence; "list" sentences; "table" headings, rows; "details" title, headings, rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from .verify_table import number, percent, scores, summary, unskipped_words

POINTS = ("point", "verdict", "skipped", "top-1", "KL", "perplexity dense", "sparse", "increase", "lost mass", "p99")
ANSWERS = ("exact answers", "asked", "dense", "sparse", "95 %", "change", "95 %", "skipped")
MODALITIES = ("query tile", "candidates", "skipped", "lost mass")
MODULES = ("module", "skipped", "output error", "lost mass", "p99", "worst", "worst head", "its error")


def parts(result: dict) -> Iterator[tuple]:
    """Everything of one result. Raises KeyError or TypeError for one that lacks what its format promises."""
    model, gates = result["model"], {name: limit for name, limit in result["gates"].items() if limit is not None}
    label = f" ({result['label']})" if result["label"] else ""
    yield (
        "aside",
        f"{model['id']}{label}, {result['dtype']}, thresholds {result['thresholds']}, tiles {result['tile']}.",
    )
    limits = ", ".join(f"{name.replace('_', '-')} {limit:g}" for name, limit in gates.items()) or "none"
    yield "aside", f"{'Passed' if result['passed'] else 'Failed'}. Limits asked for: {limits}."
    yield from _answers(result) if "tasks" in result else _predictions(result)
    failures = [f"{point['name']}: {failure}" for point in result["points"] for failure in point["failures"]]
    if failures:
        yield "list", [f"Failed: {failure}" for failure in failures]
    control = result["negative_control"]
    if control is not None:
        words = "; ".join(control["failures"]) or "passed, so these limits cannot tell a broken model from a good one"
        yield "aside", f"Negative control, every tile dropped that may be: {words}."
    dense: dict[str, int] = {}
    for entry in result["dense"]:
        dense[entry["reason"]] = dense.get(entry["reason"], 0) + 1
    if dense:
        yield "list", [f"{count} modules ran dense: {reason}" for reason, count in dense.items()]


def _predictions(result: dict) -> Iterator[tuple]:
    data = result["data"]
    tokens = sum(sample["tokens"] for sample in data["samples"])
    yield (
        "aside",
        f"Dense against sparse predictions on {len(data['samples'])} texts of {data['spec']}, {tokens:,} tokens.",
    )
    yield "table", POINTS, [_point(point) for point in result["points"]]
    for point in result["points"]:
        title = f"{point['name']}: {len(point['modules'])} modules, mass lost by row {summary(point['dropped_mass'])}"
        yield "details", title, MODULES, [_module(module) for module in point["modules"]]
        if point.get("unskipped"):
            yield "aside", unskipped_words(point) + "."
        if point.get("modalities"):
            yield "table", MODALITIES, [_modality(name, told) for name, told in point["modalities"].items()]
        yield "list", [_kernel(check) for check in point["kernel"]]


def _kernel(check: dict) -> str:
    return (
        f"kernel {check['backend']} against the float64 reference, {check['path']}: error {number(check['error'])}, "
        f"allowed {number(check['allowed'])}"
    )


def _point(point: dict) -> tuple[str, ...]:
    logits, lost = point["logits"], point["dropped_mass"]
    return (
        point["name"] + scores(point), _verdict(point), percent(point["skip"]), percent(logits["top1"]),
        number(logits["kl"]), number(logits["perplexity_dense"]), number(logits["perplexity_sparse"]),
        percent(logits["perplexity_increase"], "+"), percent(lost["mean"]), percent(lost["p99"]),
    )  # fmt: skip


def _module(module: dict) -> tuple[str, ...]:
    index, head = max(enumerate(module["heads"]), key=lambda item: item[1]["error"] or 0.0)
    masses = (percent(module["dropped_mass"][key]) for key in ("mean", "p99", "worst"))
    return module["path"], percent(module["skip"]), number(module["error"]), *masses, str(index), number(head["error"])


def _modality(name: str, told: dict) -> tuple[str, ...]:
    return name, f"{told['candidates']:,}", percent(told["skip"]), percent(told["dropped_mass"])


def _answers(result: dict) -> Iterator[tuple]:
    asked = result["tasks"]
    yield (
        "aside",
        f"Dense against sparse answers to {len(asked['questions'])} questions of {asked['spec']}, {asked['mode']}.",
    )
    for point in result["points"]:
        yield "heading", f"{point['name']}{scores(point)}: {_verdict(point)}"
        if point["retention"] is not None:
            yield "aside", f"{percent(point['retention'])} of dense accuracy kept at {_skip(point)} skipped."
        lengths = point["by_length"] if len(point["by_length"]) > 1 else {}
        groups = point["by_task"] | {f"{int(name):,} tokens": part for name, part in lengths.items()} | {"all": point}
        yield "table", ANSWERS, [_group(name, part) for name, part in groups.items()]


def _group(name: str, part: dict) -> tuple[str, ...]:
    return (
        name, str(part["questions"]), percent(part["dense"]), percent(part["exact"]), _interval(part["exact_interval"]),
        percent(part["difference"], "+"), _interval(part["difference_interval"], "+"), _skip(part),
    )  # fmt: skip


def _verdict(point: dict) -> str:
    return "failed" if point["failures"] else "passed"


def _skip(part: dict) -> str:
    return "-" if part["skip"] is None else percent(part["skip"])


def _interval(ends: list[float] | None, sign: str = "") -> str:
    return "-" if ends is None else " .. ".join(percent(end, sign) for end in ends)
