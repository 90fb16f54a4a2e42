"""What a stored result says, in a few sentences: what was asked, who wins, by how much, on what hardware."""

from __future__ import annotations

from ..comparison import matching
from . import compare_readme
from .compare_table import METRICS, matched_tables, number, present
from .profile_table import head_shape
from .verify_table import percent, scores

TELLING = ("agreement.top1", matching.ACCURACY)  # what decides between methods, where it was measured
OWN, FEW = "bsfa", 3


def machine(result: dict) -> str:
    return result["environment"].get("gpu") or "a CPU, whose times say nothing about a GPU"


def comparison(result: dict) -> list[str]:
    """The winners at equal time, or where no dense kernel ran at equal density, in the cell with most questions."""
    if not result["cells"]:
        return ["Nothing was measured."]
    cell = compare_readme.surest(result)
    sentences = [f"Asked: which of {len(matching.by_method(cell['rows']))} methods keeps most, on {machine(result)}."]
    found = present(cell)
    for metric in [metric for metric in TELLING if metric in found] or found[:1]:
        for title, headings, table in matched_tables(cell, metric)[:1]:
            asked, largest = matching.questions(cell, metric), METRICS[metric][1]
            told = "; ".join(_verdict(table, i, heading, largest, asked) for i, heading in enumerate(headings))
            sentences.append(f"{cell['length']:,} tokens, {title}: {told}.")
    return sentences


def _verdict(table: dict, column: int, heading: str, largest: bool, asked: int | None) -> str:
    """Who is best in a column, and by how much: the next one, and bsfa where it is neither."""
    values = matching.ranked(table, column, largest)
    winners = matching.best(table, column, largest, asked)
    if not winners:
        return f"{heading}: none gets there"
    own = OWN in winners
    if len(winners) > FEW:
        return f"{heading}: {len(winners)} not told apart by {asked} questions, {OWN} {'' if own else 'not '}among them"
    said = f"{heading}: {' and '.join(winners)} {number(values[winners[0]])}"
    next_ = next((name for name in values if name not in winners), None)
    said += f", then {next_} {number(values[next_])}" if next_ else ""
    if own or next_ == OWN:
        return said
    return said + (f", {OWN} {number(values[OWN])}" if OWN in values else f", {OWN} does not get there")


def profile(result: dict) -> list[str]:
    """The speedup of every head shape, at its longest, by skip rate."""
    sentences = [f"Asked: how much faster than the fastest dense attention, on {machine(result)}."]
    longest: dict[str, dict] = {}
    for cell in result["cells"]:
        shape = head_shape(cell)
        if shape not in longest or longest[shape]["length"] < cell["length"]:
            longest[shape] = cell
    for shape, cell in longest.items():
        said = []
        for kind, word in (("bsfa", ""), ("bsfa, int8 scores", "int8 scores ")):
            rows = [row for row in cell["contenders"] if row["kind"] == kind and row["skip_target"] is not None]
            said += [
                f"{word}{row['speedup']:.2f}x at {row['skip_target']:.0%} skipped"
                for row in rows
                if row["speedup"] is not None
            ]
        sentences.append(
            f"{shape}, {cell['length']:,} tokens: {', '.join(said)}, over {cell['fastest_dense']}."
            if said
            else f"{shape}, {cell['length']:,} tokens: no dense baseline ran."
        )
    for entry in result.get("prefill", []):
        best = [row for row in entry["contenders"] if row["skip"] is not None and row["speedup"] is not None]
        if best:
            row = max(best, key=lambda each: each["speedup"])
            sentences.append(
                f"Whole prefill of {entry['model']}, {entry['length']:,} tokens: {row['speedup']:.2f}x ({row['name']})."
            )
    return sentences


def verification(result: dict) -> list[str]:
    """The verdict, and what every point skips and keeps."""
    limits = [f"{name.replace('_', '-')} {limit:g}" for name, limit in result["gates"].items() if limit is not None]
    sentences = [
        f"Asked: is {result['model']['id']} with {result['thresholds']} still the model, on {machine(result)}. "
        f"{'Passed' if result['passed'] else 'Failed'}; limits: {', '.join(limits) or 'none'}."
    ]
    for point in result["points"]:
        if "logits" in point:
            kept = f"{percent(point['logits']['top1'])} of tokens predicted the same"
        else:
            kept = f"{percent(point['retention'])} of dense accuracy kept"
        skipped = "-" if point["skip"] is None else percent(point["skip"])
        verdict = f"failed: {'; '.join(point['failures'])}" if point["failures"] else "passed"
        sentences.append(f"{point['name']}{scores(point)}: {skipped} skipped, {kept}; {verdict}.")
    return sentences
