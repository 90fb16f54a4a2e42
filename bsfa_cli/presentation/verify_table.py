"""The tables of `bsfa verify`, on stderr."""

from __future__ import annotations

from .console import console, note


def show(point: dict, failures: list[str]) -> None:
    """One operating point: predictions, layers, kernel, verdict. `point` as in verification/run.py."""
    logits, floor, dropped = point["logits"], point["floor"], point["dropped_mass"]
    spread = logits["intervals"]
    note(f"\noperating point {point['name']}: {percent(point['skip'])} of {point['candidates']:,} tiles skipped")
    if point["uncalibrated"]:
        ran = len(point["modules"])
        note(
            f"  {percent(point['calibrated']['skip'])} in the {ran} of {ran + len(point['uncalibrated'])} attention "
            "modules that have thresholds; the others keep every tile"
        )
    note(
        f"  top-1 agreement {percent(logits['top1'])}{between(spread['top1'])}, KL {number(logits['kl'])}"
        f"{between(spread['kl'], number)}, perplexity {number(logits['perplexity_dense'])} dense, "
        f"{number(logits['perplexity_sparse'])} sparse ({percent(logits['perplexity_increase'], '+')}"
        f"{between(spread['perplexity_increase'])})"
    )
    note(
        f"  with nothing skipped: top-1 {percent(floor['top1'])}, KL {number(floor['kl'])}, perplexity "
        f"{percent(floor['perplexity_increase'], '+')}; KL above that {number(logits['kl_over_floor']['value'])}"
        f"{between(logits['kl_over_floor']['interval'], number)}"
    )
    if point["drift"]:
        note(f"  {point['drift']}")
    note(f"  dropped softmax mass by row: {summary(dropped)}")
    layers = _table("module", "skip", "error", "dropped", "p99", "worst")
    heads = _table("worst head of a module", "skip", "error", "dropped", "p99", "worst")
    for module in point["modules"]:
        layers.add_row(module["path"], *_cells(module))
        index, head = max(enumerate(module["heads"]), key=lambda item: item[1]["error"] or 0.0)
        heads.add_row(f"{module['path']} head {index}", *_cells(head))
    console().print(layers)
    console().print(heads)
    for check in point["kernel"]:
        note(
            f"kernel {check['backend']} against the float64 reference, {check['path']}: "
            f"error {number(check['error'])}, allowed {number(check['allowed'])} "
            f"(plain attention {number(check['plain_error'])}); "
            f"{check['decided_differently']} of {check['candidates']} tiles decided differently"
        )
    for failure in failures:
        note(f"FAILED {point['name']}: {failure}")


def _table(first: str, *rest: str):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in rest:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _cells(entry: dict) -> list[str]:
    masses = (percent(entry["dropped_mass"][key]) for key in ("mean", "p99", "worst"))
    return [percent(entry["skip"]), number(entry["error"]), *masses]


def summary(dropped: dict) -> str:
    return ", ".join(f"{key} {percent(dropped[key])}" for key in ("mean", "p99", "worst"))


def between(ends: list | None, show=None) -> str:
    """A 95 % interval behind a number; nothing where there is none."""
    return "" if ends is None else " [" + " .. ".join((show or percent)(end) for end in ends) + "]"


def percent(share: float | None, sign: str = "") -> str:
    return "not finite" if share is None else f"{100 * share:{sign}.3g} %"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
