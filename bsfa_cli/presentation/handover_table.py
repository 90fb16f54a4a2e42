"""The table of `bsfa export --to`: one lambda for the whole model against thresholds for every head."""

from __future__ import annotations

from collections.abc import Mapping

from ..console import console, note
from ..order import shortened

WORST = 5


def rows(modules: Mapping[str, slice], one, ours) -> list[dict]:
    """JSON by head: what both skip, and the mass that both drop (mean over rows)."""
    return [
        {
            "module": path,
            "head": head - heads.start,
            "one_number": {"skip": float(one.skip[head]), "dropped_mass": float(one.mass[head])},
            "by_head": {"skip": float(ours.skip[head]), "dropped_mass": float(ours.mass[head])},
        }
        for path, heads in modules.items()
        for head in range(heads.start, heads.stop)
    ]


def show(modules: Mapping[str, slice], one, ours, samples: str) -> None:
    """Skip rate and dropped mass of both by module, with the range over its heads, then the heads that lose most."""
    from rich import box
    from rich.table import Table

    pattern, names = shortened(modules)
    title = f"one lambda against thresholds for every head ({samples} samples)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for column in ("skip", "heads", "mass", "by head: skip", "mass"):
        table.add_column(column, justify="right", no_wrap=True)
    for path, heads in modules.items():
        skip = one.skip[heads]
        table.add_row(
            names[path], f"{float(skip.mean()):.3f}", f"{float(skip.min()):.2f} .. {float(skip.max()):.2f}",
            f"{float(one.mass[heads].mean()):.2e}", f"{float(ours.skip[heads].mean()):.3f}",
            f"{float(ours.mass[heads].mean()):.2e}",
        )  # fmt: skip
    table.add_section()
    table.add_row("all", f"{one.total_skip:.3f}", "", f"{one.total_mass:.2e}", f"{ours.total_skip:.3f}",
                  f"{ours.total_mass:.2e}")  # fmt: skip
    console().print(table)
    if pattern:
        note(f"modules: {pattern}")
    note("skip: share of the tiles that may be dropped, with the least and the most over heads; mass: softmax mass "
         "dropped, mean over rows and heads")  # fmt: skip
    extra = one.mass - ours.mass
    more = [head for head in extra.argsort(descending=True)[:WORST].tolist() if extra[head] > 0]
    for path, heads in modules.items():
        for head in sorted(h for h in more if heads.start <= h < heads.stop):
            note(
                f"{path} head {head - heads.start}: one lambda drops {one.mass[head]:.2e} of its mass with "
                f"{one.skip[head]:.1%} skipped, its own threshold {ours.mass[head]:.2e} with {ours.skip[head]:.1%}"
            )
    if ours.total_mass:
        note(f"at the same skip rate on the fitted samples one lambda drops {one.total_mass / ours.total_mass:.2f} "
             "times the mass")  # fmt: skip
