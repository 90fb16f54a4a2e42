"""A profile's result as tables on the terminal."""

from __future__ import annotations

import textwrap

from ..timing.plan import OURS
from .columns import aligned, chosen
from .dense_kernels import fastest, named

BRIEF = ("", "ms", "TFLOP/s", "skipped", "speedup", "bound")  # what a terminal of 80 characters has room for
HEADINGS = ("", "ms", "p20-p80", "TFLOP/s", "executed", "skipped", "speedup", "bound", "error")


def cell_rows(cell: dict) -> list[tuple[str, ...]]:
    """One row per contender: name, ms, p20-p80, TFLOP/s dense-equivalent and executed, skip, speedup, bound, and the
    output error of those that are not exact.
    """
    rows = []
    for row in cell["contenders"]:
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        rows.append(
            (
                named(row),
                f"{row['ms_median']:.3f}",
                f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}",
                rate(row["tflops_dense_equivalent"]),
                rate(row["tflops_executed"]),
                skipped(row),
                speedup + ("*" if row["suspect"] else ""),
                f"{row['bound']:.2f}x" if row["kind"] in OURS.values() else "-",
                f"{row['error']:.1e}" if row.get("error") is not None else "-",
            )
        )
    return rows


def rate(tflops: float | None) -> str:
    return "-" if tflops is None else f"{tflops:.4g}"


def skipped(row: dict) -> str:
    """A contender's skip rate, marked where it was computed because the kernel does not count."""
    if row.get("skip") is None:
        return "-"
    return f"{row['skip']:.1%}" + (" computed" if "computed" in row.get("skip_from", "") else "")


def head_shape(cell: dict) -> str:
    """One cell's heads, direction, dtype, gate and, where it is not unit-normal, data."""
    shape = cell["shape"]
    structured = "structured data, " if "structured" in cell["data"] else ""
    values = f" (V: {shape['v_head_dim']})" if "v_head_dim" in shape else ""
    return (
        f"{shape['name']}: {structured}{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}{values}, "
        f"{'causal' if shape['causal'] else 'not causal'}, {cell['dtype']}, {cell['gate']} gate"
    )


def show_cell(cell: dict, details: bool = False) -> None:
    """Print one cell to stderr: the columns of BRIEF, and with `details` all of them."""
    from ..console import note, note_wrapped, width

    note("")
    note_wrapped(f"{cell['length']:,} tokens, {head_shape(cell)}")
    note(f"  {cell['tile']} tiles, backend {cell['backend']}")
    note_wrapped(f"data {cell['data']}", 2)
    for name, reason in cell["passed_over"].items():
        note_wrapped(f"backend {name} not used: {reason}", 2)
    table = [HEADINGS, *cell_rows(cell)]
    for line in aligned(table) if details else aligned(chosen(table, BRIEF), width() - 2):
        note(f"  {line}")
    for absent in cell["unavailable"]:
        reason = textwrap.shorten(absent["reason"], 200, placeholder=" ... (-o FILE.json keeps all of it)")
        note_wrapped(f"not timed: {absent['name']} ({reason})", 2)
    for part in findings(cell):
        note_wrapped(part, 2)


def verdict(cell: dict) -> str:
    """`findings` in one line."""
    return "; ".join(findings(cell))


def findings(cell: dict) -> list[str]:
    """Overhead, break-even and correctness of one cell, one idea each."""
    if cell["fastest_dense"] is None:
        return ["no dense baseline ran here"]
    parts = [f"fastest dense: {fastest(cell)}"]
    if cell["overhead_at_zero"] is not None:
        even = cell["break_even_skip"]
        if even is None:
            words = "no measured skip rate breaks even"
        else:
            words = "never slower" if even == 0 else f"breaks even at {even:.0%} skipped"
        parts.append(f"at 0 % skipped bsfa takes {cell['overhead_at_zero']:+.1%} time; {words}")
    if cell["error_at_zero"] is not None:
        parts.append(f"distance to dense {cell['error_at_zero']:.1e}")
    if any(row["suspect"] for row in cell["contenders"]):
        parts.append("* exceeds the tensor-pipe bound 2/(1+kept), of int8 scores 2/(0.5+kept): baseline inefficiency")
    return parts


def show_prefill(entry: dict) -> None:
    """Print one end-to-end comparison to stderr."""
    from ..console import note, note_wrapped, width

    note(f"\nprefill of {entry['model']}, {entry['length']:,} tokens of {entry['data']}")
    note(f"  {entry['dtype']}, point {entry['point']}")
    if entry["label"]:
        note(f"  {entry['label']}")
    if entry.get("visual_tokens"):
        tower = {"timed": "the vision tower's time included", "left out": "the vision tower's time left out"}
        note(f"  {entry['visual_tokens']:,} tokens stand for images; {tower[entry['vision']]}")
    rows = [("", "ms", "p20-p80", "speedup", "skipped")]
    for row in entry["contenders"]:
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        skip = "-" if row["skip"] is None else f"{row['skip']:.1%}"
        rows.append((named(row), f"{row['ms_median']:.2f}", f"{row['ms_p20']:.2f}-{row['ms_p80']:.2f}", speedup, skip))
    for line in aligned(rows, width() - 2):
        note(f"  {line}")
    for reason, modules in entry["dense_modules"].items():
        note_wrapped(f"{modules} modules ran dense: {reason}", 2)
    for absent in entry["unavailable"]:
        reason = textwrap.shorten(absent["reason"], 200, placeholder=" ... (-o FILE.json keeps all of it)")
        note_wrapped(f"not timed: {absent['name']} ({reason})", 2)
