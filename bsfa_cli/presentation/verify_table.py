"""The tables of `bsfa verify`, on stderr."""

from __future__ import annotations

from ..console import console, note
from ..order import shortened

WORST = 5  # modules that are shown without being asked for


def show(point: dict, failures: list[str], details: bool = False) -> None:
    """One operating point: predictions, worst modules, kernel, verdict. `point` as in verification/run.py; `details`:
    every module, its worst head and every check of the kernel.
    """
    logits, floor = point["logits"], point["floor"]
    spread = logits["intervals"]
    skipped = f"{percent(point['skip'])} of {point['candidates']:,} tiles skipped"
    note(f"\noperating point {point['name']}{scores(point)}: {skipped}")
    if point["uncalibrated"]:
        ran = len(point["modules"])
        note(
            f"  {percent(point['calibrated']['skip'])} in the {ran} of {ran + len(point['uncalibrated'])} attention "
            "modules that have thresholds; the others keep all"
        )
    lines = (
        ("top-1 agreement", percent(logits["top1"]) + between(spread["top1"]), percent(floor["top1"])),
        ("KL divergence", number(logits["kl"]) + between(spread["kl"], number), number(floor["kl"])),
        ("perplexity", percent(logits["perplexity_increase"], "+") + between(spread["perplexity_increase"]),
         percent(floor["perplexity_increase"], "+")),
    )  # fmt: skip
    for name, found, unskipped in lines:
        note(f"  {name:<16} {found}; with nothing skipped {unskipped}")
    if point.get("unskipped"):
        note(f"  {unskipped_words(point)}; the others are of exact scores")
    over = logits["kl_over_floor"]
    note(f"  {'KL above that':<16} {number(over['value'])}{between(over['interval'], number)}")
    note(f"  {'dropped mass':<16} {summary(point['dropped_mass'])} of a row")
    if point["drift"]:
        note(f"  {point['drift']}")
    for name, told in (point["modalities"] or {}).items():
        of = {"image": "tiles of images", "mixed": "tiles of both", "text": "tiles of text"}[name]
        note(
            f"  {of:<16} {percent(told['skip'])} of {told['candidates']:,} skipped, dropped mass mean "
            f"{percent(told['dropped_mass'])}"
        )
    _modules(point["modules"], details)
    _kernel(point["kernel"], details)
    for failure in failures:
        note(f"FAILED {point['name']}: {failure}")


def _modules(modules: list[dict], details: bool) -> None:
    from rich import box
    from rich.table import Table

    pattern, names = shortened(module["path"] for module in modules)
    shown = modules
    if not details:
        worst = sorted(modules, key=lambda module: -_error(module))[:WORST]
        shown = [module for module in modules if any(module is each for each in worst)]
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("module", overflow="fold")
    for heading in ("skip", "error", "dropped", "p99", "worst", "head", "its error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in shown:
        index, head = max(enumerate(module["heads"]), key=lambda item: _error(item[1]))
        table.add_row(names[module["path"]], *_cells(module), str(index), number(head["error"]))
    console().print(table)
    if pattern:
        note(f"modules: {pattern}; head: the worst of each")
    if len(shown) < len(modules):
        note(f"the {len(shown)} worst of {len(modules)} modules; --details shows all, -o FILE.json keeps all")


def _kernel(checks: list[dict], details: bool) -> None:
    if details:
        for check in checks:
            note(f"kernel {check['backend']} against the float64 reference, {check['path']}:")
            note(
                f"  error {number(check['error'])}, allowed {number(check['allowed'])} (plain attention "
                f"{number(check['plain_error'])});"
            )
            note(f"  {check['decided_differently']} of {check['candidates']} tiles decided differently")
    elif checks:
        worst = max(checks, key=lambda check: _error(check) / (check["allowed"] or 1.0))
        different = sum(check["decided_differently"] for check in checks)
        note(f"kernel {worst['backend']} against the float64 reference, in {len(checks)} modules:")
        note(
            f"  worst error {number(worst['error'])}, allowed {number(worst['allowed'])}; {different} tiles decided "
            "differently"
        )


def _error(entry: dict) -> float:
    return float("inf") if entry["error"] is None else entry["error"]


def _cells(entry: dict) -> list[str]:
    masses = (percent(entry["dropped_mass"][key]) for key in ("mean", "p99", "worst"))
    return [percent(entry["skip"]), number(entry["error"]), *masses]


def unskipped_words(point: dict) -> str:
    """What scores that are not exact cost by themselves."""
    found = point["unskipped"]
    return (
        f"{point['scores']} scores with nothing skipped: top-1 {percent(found['top1'])}, KL {number(found['kl'])}, "
        f"perplexity {percent(found['perplexity_increase'], '+')}"
    )


def scores(point: dict) -> str:
    """Of a point whose scores are not exact: " (int8 scores, ...)"."""
    used = point.get("scores", "exact")
    if used == "exact":
        return "" if point.get("made_for", "exact") == "exact" else " (exact scores; thresholds made for int8 ones)"
    words = [f"{used} scores"]
    if point.get("made_for", used) != used:
        words.append(f"thresholds made for {point['made_for']} ones")
    if point.get("exact_heads"):
        words.append(f"{point['exact_heads']} heads exact")
    return f" ({'; '.join(words)})"


def summary(dropped: dict) -> str:
    return ", ".join(f"{key} {percent(dropped[key])}" for key in ("mean", "p99", "worst"))


def between(ends: list | None, show=None) -> str:
    """A 95 % interval behind a number; nothing where there is none."""
    return "" if ends is None else " [" + " .. ".join((show or percent)(end) for end in ends) + "]"


def percent(share: float | None, sign: str = "") -> str:
    return "not finite" if share is None else f"{100 * share:{sign}.3g} %"


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
