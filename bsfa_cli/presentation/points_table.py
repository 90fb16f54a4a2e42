"""The table that `bsfa export` shows: operating points by attention module."""

from __future__ import annotations

from .console import console


def show(reports) -> None:
    """One table per point: threshold range, skip rate and dropped mass, fitted and held out."""
    from rich.table import Table

    for report in reports:
        point = report.point
        table = Table(
            title=f"{point.name}: {point.gate} gate, {point.recipe} {point.argument:g}",
            caption=f"skip: share of the tiles a gate may drop. mass: softmax mass dropped, mean over rows. p"
            f"{100 * point.quantile:g}: no more is dropped by that share of rows (upper bound)."
            + (" Estimated from curves by octave." if point.recipe == "top-k" else ""),
        )
        table.add_column("module", overflow="fold")
        columns = ("threshold", "keep all", "skip fit", "skip held", "mass held", f"p{100 * point.quantile:g} held")
        for column in columns:
            table.add_column(column, justify="right")
        for module in report.modules:
            range_ = "-" if module.least is None else f"{module.least:.2f} .. {module.most:.2f}"
            table.add_row(
                module.path, range_, f"{100 * module.kept_whole:.0f}%", *_cells(module.fitted, module.held_out)
            )
        table.add_section()
        table.add_row("all", "", "", *_cells(point.fitted, point.held_out))
        console().print(table)


def _cells(fitted, held_out) -> tuple[str, str, str, str]:
    skip = "-" if fitted is None else f"{fitted.skip:.3f}"
    if held_out is None:
        return skip, "-", "-", "-"
    return skip, f"{held_out.skip:.3f}", f"{held_out.dropped_mass:.2e}", f"{held_out.dropped_mass_bound:.1e}"
