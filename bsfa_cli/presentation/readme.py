"""README.md's figures, tables of docs (results, vision-model, research-question and int8) and the plots
beside the stored results, made from profiles/results.

python -m bsfa_cli.presentation.readme            # from the repository root; rewrites them all
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..comparison import matching
from ..errors import BsfaError
from ..files import read_result, write_whole
from ..timing.compare import FORMATS
from . import compare_readme, eight_bits_table, figures, headline, research, training_table
from .dense_kernels import named, without_flash_attention_3
from .loss_table import loss_table
from .marked import filled, marks
from .plot import speedup_plot
from .profile_table import head_shape
from .real_plot import real_plot
from .real_table import real_table
from .recipes_plot import recipes_plot
from .versions import versions

BEGIN, END = marks("results")
FRAMES_LOG = "frames-llava.nvidia-h200.jsonl"  # of the bundled vision-language model's last training run
NOTABLE = 0.02  # distance between skip rates asked for and reached from which the table says so
NONE = "No stored results yet: `make gpu-bench` on a GPU machine writes them to `profiles/results/`."


def rendered(root: Path) -> dict[Path, str]:
    """{file: its content} for README.md, the pages of docs and each plot, as they should be.

    Raises InputError for a bad file, MachineError where plots cannot be drawn.
    """
    formats, results = FORMATS | {matching.KIND: matching.FORMAT}, root / "profiles" / "results"
    files, stored, blocks = {}, {}, []
    for path in sorted(results.glob("*.json")):
        result = stored[path.name] = read_result(path, formats)
        profile, link = result["kind"] != matching.KIND, f"../profiles/results/{path.name}"
        describe = block if profile else compare_readme.block
        blocks.append(describe(result, link, link.removesuffix("json") + "svg"))
        if result["cells"]:
            figure = speedup_plot(result) if profile else compare_readme.plot_of(result)
            files[path.with_suffix(".svg")] = figures.svg(figure)
    for path in sorted(results.glob("recipes/*.json")):
        files[path.with_suffix(".svg")] = figures.svg(recipes_plot(json.loads(path.read_text(encoding="utf-8"))))
    for path in sorted(results.glob("real/*.json")):
        stored[path.name] = real = json.loads(path.read_text(encoding="utf-8"))
        if "layers" in real:
            blocks.append(loss_table(real, f"../profiles/results/real/{path.name}"))
            continue
        files[path.with_suffix(".svg")] = figures.svg(real_plot(real))
        blocks.append(real_table(real, f"../profiles/results/real/{path.name}"))
    log = results / "training" / FRAMES_LOG
    if log.exists():
        page = root / "docs" / "vision-model.md"
        files[page] = _filled(page, training_table.block(log, f"../profiles/results/training/{log.name}"))
    files |= research.rendered(root) | eight_bits_table.rendered(root)
    files[root / "docs" / "results.md"] = _filled(root / "docs" / "results.md", "\n\n".join(blocks) or NONE)
    files[root / "README.md"] = _filled(root / "README.md", headline.block(stored) or NONE)
    return files


def _filled(path: Path, content: str) -> str:
    """A page with `content` as its results."""
    return filled(path.read_text(encoding="utf-8"), {"results": content}, path.name)


def block(result: dict, source: str, plot: str) -> str:
    """Markdown for one stored profile: what it was measured on, a table per head shape, the plot. `source` and `plot`
    are links.
    """
    facts = result["environment"]
    ceiling = result.get("ceiling")
    subject = result["profile"] if result["cells"] else "Prefill"
    data = " Synthetic data, thresholds fitted to it." if result["cells"] else ""
    lines = [f"### {subject} on {facts.get('gpu') or 'a CPU'}", ""]
    lines.append(f"{versions(facts)}.{data} Raw samples: [`{Path(source).name}`]({source}).")
    if ceiling:
        lines[-1] += f" A {ceiling['size']}^3 {ceiling['dtype']} matmul reached {ceiling['tflops']:.0f} TFLOP/s."
    if not result.get("complete"):
        lines[-1] += " **This run was cut short.**"
    lacking = without_flash_attention_3(result)
    if lacking:
        lines[-1] += f" {lacking}"
    for title, cells in _by_shape(result["cells"]).items():
        lines += ["", f"**{title}**", "", *_table(cells), *_beside(cells)]
    for entry in result.get("prefill", []):
        lines += ["", *_prefill(entry)]
    if result["cells"]:
        lines += ["", f"![Speedup against length]({plot})"]
    return "\n".join(lines)


def _by_shape(cells: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for cell in cells:
        found.setdefault(f"{head_shape(cell)}, {cell['tile']} tiles, `{cell['backend']}` backend", []).append(cell)
    return found


def _table(cells: list[dict]) -> list[str]:
    targets = sorted({target for cell in cells for target in _ours(cell)})
    lines = [
        "| tokens | fastest dense | " + " | ".join(f"{target:.0%} skipped" for target in targets) + " |",
        "| ---: | --- |" + " ---: |" * len(targets),
    ]
    for cell in cells:
        rows = _ours(cell)
        dense = next((row for row in cell["contenders"] if row["name"] == cell["fastest_dense"]), None)
        first = f"{named(dense)}, {dense['ms_median']:.3f} ms" if dense else "none ran"
        if dense:
            first += f", {dense['tflops_dense_equivalent']:.3g} TFLOP/s"
        speedups = [_speedup(rows.get(target)) for target in targets]
        lines.append(f"| {cell['length']:,} | {first} | " + " | ".join(speedups) + " |")
    return lines


def _ours(cell: dict) -> dict[float, dict]:
    """{skip rate asked for: row} of our kernel."""
    rows = (row for row in cell["contenders"] if row["kind"] == "bsfa")
    return {row["skip_target"]: row for row in rows if row["skip_target"] is not None}


def _beside(cells: list[dict]) -> list[str]:
    """A list of what else was timed, neither dense and exact nor ours: time, skip rate and output error."""
    lines = []
    for cell in cells:
        for row in cell["contenders"]:
            if row["kind"] not in ("dense", "bsfa"):
                facts = [f"{row['ms_median']:.3f} ms"]
                if row.get("skip") is not None:
                    facts.append(f"{row['skip']:.0%} skipped ({row['skip_from']})")
                if row.get("error") is not None:
                    facts.append(f"output error {row['error']:.1%}")
                lines.append(f"- {cell['length']:,} tokens, {named(row)}: {', '.join(facts)}")
    return ["", "Beside them, in the same run:", "", *lines] if lines else []


def _speedup(row: dict | None) -> str:
    if row is None or row["speedup"] is None:
        return "-"
    star = " \\*" if row["suspect"] else ""
    reached = ""
    if abs(row["skip"] - row["skip_target"]) > NOTABLE:
        reached = f" at {row['skip']:.0%}"
    return f"{row['speedup']:.2f}x{star}{reached} (bound {row['bound']:.2f}x)"


def _prefill(entry: dict) -> list[str]:
    lines = [
        f"**Prefill of {entry['model']}, {entry['length']:,} tokens, {entry['dtype']}, point {entry['point']}**",
        "",
        *([f"{entry['label'].capitalize()}.", ""] if entry["label"] else []),
        "| | ms | speedup | skipped |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in entry["contenders"]:
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        skip = "-" if row["skip"] is None else f"{row['skip']:.1%}"
        lines.append(f"| {row['name']} | {row['ms_median']:.1f} | {speedup} | {skip} |")
    return lines


def main() -> int:
    try:
        for path, content in rendered(Path.cwd()).items():
            write_whole(path, content.encode())
            print(f"written: {path}", file=sys.stderr)
    except (BsfaError, OSError) as error:
        print(f"readme: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
