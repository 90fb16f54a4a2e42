"""The table that `bsfa export` shows: operating points by attention module."""

from __future__ import annotations

from ..console import console, note
from ..order import shortened

VAGUE = 0.5  # a bound above half of a row's mass says nothing


def show(reports) -> None:
    """One table per point: threshold range, skip rate and dropped mass, fitted and held out."""
    from rich import box
    from rich.table import Table

    pattern, names = shortened(module.path for report in reports[:1] for module in report.modules)
    for report in reports:
        point = report.point
        bound = f"p{100 * point.quantile:g}"
        title = f"{point.name}: {point.gate} gate" + (f", {point.scores} scores" if point.scores != "exact" else "")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("module", overflow="fold")
        for column in ("threshold", "fit", "skip", "mass", bound):
            table.add_column(column, justify="right", no_wrap=True)
        for module in report.modules:
            range_ = "all kept" if module.least is None else f"{module.least:.2f} .. {module.most:.2f}"
            table.add_row(names[module.path], range_, *_cells(module.fitted, module.held_out))
        table.add_section()
        table.add_row("all", "", *_cells(point.fitted, point.held_out))
        console().print(table)
        for line in modality_lines(report.modalities.get("held_out") or report.modalities.get("fitted") or {}):
            note(line)
    if not reports:
        return
    if pattern:
        note(f"modules: {pattern}")
    note("fit, skip: share of candidate tiles dropped, on the samples fitted to and on held-out ones")
    note(f"mass: softmax mass dropped on those, mean over rows; {bound}: bound on what that share of rows drops")
    if any(report.point.recipe == "top-k" for report in reports):
        note("top-k points are estimated from curves by octave of the position")


def modality_lines(told) -> list[str]:
    """What is skipped by modality of the query tile and, behind it, of the key tile; see fit.skip_by_modality."""
    lines = []
    for query, keys in told.items():
        share = sum(pair["share"] for pair in keys.values())
        skip = sum(pair["share"] * pair["skip"] for pair in keys.values()) / share
        words = ", ".join(f"{key} {pair['skip']:.3f}" for key, pair in keys.items())
        lines.append(f"query tiles of {query}: {share:.1%} of the candidates, {skip:.3f} skipped; by key tile: {words}")
    return lines


def _cells(fitted, held_out) -> tuple[str, str, str, str]:
    skip = "-" if fitted is None else f"{fitted.skip:.3f}"
    if held_out is None:
        return skip, "-", "-", "-"
    bound = bound_words(held_out.dropped_mass_bound)
    return skip, f"{held_out.skip:.3f}", f"{held_out.dropped_mass:.2e}", bound


def bound_words(bound: float) -> str:
    """An upper bound on what a row drops, where it says anything."""
    return "-" if bound > VAGUE else f"{bound:.1e}"
