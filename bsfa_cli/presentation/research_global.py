"""Tables of global attention in the shape of VGGT and pi3: every token sees every frame."""

from __future__ import annotations

from ..comparison import matching
from .compare_table import METRICS, matched_tables
from .dense_kernels import without_flash_attention_3

FRAME = 1374  # tokens: 37 x 37 patches and 5 special ones
NAMES = {
    "bsfa": "bsfa", "bsfa_int8": "bsfa, int8 scores", "bsfa_top_k": "BSFA paper's top-k", "blasst": "BLASST",
    "global_attention": "arXiv 2509.07120's rule", "pooled_top_p": "pooled top-p", "pooled_top_k": "pooled top-k",
    "xattention": "XAttention", "sliding_window": "sliding window", "tri_shape": "Tri-shape", "strided": "strided",
}  # fmt: skip


def block(speed: dict, speed_source: str, compared: dict, source: str) -> str:
    """Speed by skip rate, from a profile, then softmax mass kept at equal time. Sources are links."""
    shape = speed["cells"][0]["shape"]
    lines = [
        f"Speed of skipping, {speed['environment']['gpu']}, {shape['heads']} heads of {shape['head_dim']}, not causal, "
        f"skip rates imposed on synthetic data ([file]({speed_source})). {without_flash_attention_3(speed)}".rstrip(),
        "",
        "| tokens | frames | fastest dense timed | " + " | ".join(f"{t:.0%} skipped" for t in targets(speed)) + " |",
        "| ---: | ---: | --- |" + " ---: |" * len(targets(speed)),
    ]
    for cell in structured(speed):
        dense = next(row for row in cell["contenders"] if row["name"] == cell["fastest_dense"])
        gains = [f"{row['speedup']:.2f}x" for row in ours(cell)]
        lines.append(
            f"| {cell['length']:,} | {cell['length'] // FRAME} | {dense['name']}, {dense['ms_median']:.2f} ms | "
            + " | ".join(gains) + " |"
        )  # fmt: skip
    cell = max(compared["cells"], key=lambda cell: cell["length"])
    lines += [
        "",
        f"Softmax mass kept at shares of the {cell['fastest_dense_ms']:.2f} ms that {cell['fastest_dense']} takes, "
        f"{cell['length']:,} tokens ({cell['length'] // FRAME} frames), {compared['environment']['gpu']}, "
        f"{cell['label']} ([file]({source})). {without_flash_attention_3(compared)}".rstrip(),
        "",
    ]
    columns = []
    for metric, words in (("recall.mean", "mean"), ("recall.worst", "worst row")):
        _, headings, table = matched_tables(cell, metric)[0]
        alone = {name: row for name, row in table.items() if name in NAMES}
        for i, heading in enumerate(headings):
            best = matching.best(alone, i, METRICS[metric][1])
            share = heading.removesuffix(" of dense")  # the line above names what of
            columns.append((f"{words}: {share}", {name: row[i] for name, row in alone.items()}, best))
    lines += [
        "| method | " + " | ".join(heading for heading, *_ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for method, name in NAMES.items():
        fields = []
        for _, values, best in columns:
            text = "-" if values[method] is None else f"{values[method]:.3f}"
            fields.append(f"**{text}**" if method in best else text)
        lines.append(f"| {name} | " + " | ".join(fields) + " |")
    return "\n".join(lines)


def structured(speed: dict) -> list[dict]:
    """The cells of planted patterns."""
    return [cell for cell in speed["cells"] if cell["shape"]["name"].endswith("structured")]


def ours(cell: dict) -> list[dict]:
    """Rows of our kernel with a skip rate asked for, in its order."""
    rows = (row for row in cell["contenders"] if row["kind"] == "bsfa" and row["skip_target"] is not None)
    return sorted(rows, key=lambda row: row["skip_target"])


def targets(speed: dict) -> list[float]:
    return [row["skip_target"] for row in ours(structured(speed)[0])]
