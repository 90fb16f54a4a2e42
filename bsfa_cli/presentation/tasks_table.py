"""The tables of `bsfa verify --tasks`, on stderr."""

from __future__ import annotations

from ..console import console, note
from ..suites.summary import telling
from .verify_table import percent, scores


def show(result: dict, failures: list[str]) -> None:
    """One operating point: exact answers by task and length, worst task and mean. `result` as from `summarise`."""
    from rich import box
    from rich.table import Table

    note(f"\noperating point {result['name']}{scores(result)}: {percent(result['skip'])} of the model's tiles skipped")
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("exact answers", overflow="fold")
    for heading in ("asked", "dense %", "sparse % (95 %)", "change (95 %)", "skip %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, part in result["by_task"].items():
        table.add_row(name, *_cells(part))
    if len(result["by_length"]) > 1:
        table.add_section()
        for length, part in result["by_length"].items():
            table.add_row(f"{int(length):,} tokens", *_cells(part))
    if len(result["by_modality"]) > 1:
        table.add_section()
        for modality, part in result["by_modality"].items():
            table.add_row(f"from {modality}", *_cells(part))
    table.add_section()
    table.add_row("all", *_cells(result))
    console().print(table)
    worst = result["worst_retention"]
    if telling(result):
        low, high = result["retention_interval"]
        note(
            f"{percent(result['retention'])} of dense accuracy kept ({percent(low)} to {percent(high)}) at "
            f"{percent(result['skip'])} skipped"
            + (f"; least on {worst}: {percent(result['by_task'][worst]['retention'])}" if worst else "")
        )
    if result["unanswered"]:
        words = ", ".join(f"{name} {percent(result['by_task'][name]['dense'])}" for name in result["unanswered"])
        note(f"the dense model answers too little of these to show what skipping keeps: {words}")
    for failure in failures:
        note(f"FAILED {result['name']}: {failure}")


def _cells(part: dict) -> list[str]:
    return [
        str(part["questions"]), _share(part["dense"]),
        f"{_share(part['exact'])} ({_interval(part['exact_interval'])})",
        f"{_share(part['difference'], '+')} ({_interval(part['difference_interval'], '+')})",
        "-" if part["skip"] is None else _share(part["skip"]),
    ]  # fmt: skip


def _share(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}"


def _interval(ends: list[float], sign: str = "") -> str:
    return " .. ".join(f"{100 * end:{sign}.0f}" for end in ends)
