"""A profile's result as tables on the terminal."""

from __future__ import annotations

from ..timing.plan import OURS
from .dense_kernels import fastest, named

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
                speedup + (" *" if row["suspect"] else ""),
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
    return (
        f"{shape['name']}: {structured}{shape['heads']}/{shape['kv_heads']} heads of {shape['head_dim']}, "
        f"{'causal' if shape['causal'] else 'not causal'}, {cell['dtype']}, {cell['gate']} gate"
    )


def show_cell(cell: dict) -> None:
    """Print one cell to stderr."""
    from ..console import note

    note(f"\n{cell['length']:,} tokens, {head_shape(cell)}, {cell['tile']} tiles, backend {cell['backend']}")
    note(f"  data {cell['data']}")
    for name, reason in cell["passed_over"].items():
        note(f"  backend {name} not used: {reason}")
    for line in aligned([HEADINGS, *cell_rows(cell)]):
        note(f"  {line}")
    for absent in cell["unavailable"]:
        note(f"  not timed: {absent['name']} ({absent['reason']})")
    note(f"  {verdict(cell)}")


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines: first column to the left, the others to the right. Never cut, so that a log keeps every digit."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            field.ljust(width) if i == 0 else field.rjust(width)
            for i, (field, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def verdict(cell: dict) -> str:
    """Overhead, break-even and correctness of one cell in one line."""
    if cell["fastest_dense"] is None:
        return "no dense baseline ran here"
    parts = [f"fastest dense: {fastest(cell)}"]
    if cell["overhead_at_zero"] is not None:
        parts.append(f"at 0 % skipped bsfa takes {cell['overhead_at_zero']:+.1%} time")
        even = cell["break_even_skip"]
        if even is None:
            parts.append("no measured skip rate breaks even")
        else:
            parts.append("never slower" if even == 0 else f"breaks even at {even:.0%} skipped")
    if cell["error_at_zero"] is not None:
        parts.append(f"distance to dense {cell['error_at_zero']:.1e}")
    if any(row["suspect"] for row in cell["contenders"]):
        parts.append("* exceeds the tensor-pipe bound 2/(1+kept), of int8 scores 2/(0.5+kept): baseline inefficiency")
    return "; ".join(parts)


def show_prefill(entry: dict) -> None:
    """Print one end-to-end comparison to stderr."""
    from ..console import note

    note("")
    note(
        f"prefill of {entry['model']}, {entry['length']:,} tokens of {entry['data']}, {entry['dtype']}, "
        f"point {entry['point']}"
    )
    if entry["label"]:
        note(f"  {entry['label']}")
    for row in entry["contenders"]:
        skip = "" if row["skip"] is None else f", {row['skip']:.1%} of candidate tiles skipped"
        speedup = "" if row["speedup"] is None else f", {row['speedup']:.2f}x"
        note(f"  {row['name']}: {row['ms_median']:.2f} ms ({row['ms_p20']:.2f}-{row['ms_p80']:.2f}){speedup}{skip}")
    for reason, modules in entry["dense_modules"].items():
        note(f"  {modules} modules ran dense: {reason}")
    for absent in entry["unavailable"]:
        note(f"  not timed: {absent['name']} ({absent['reason']})")
