"""README.md's sentences about the stored comparisons, held to the files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bsfa_cli.comparison import matching
from bsfa_cli.presentation.compare_table import matched_tables

RESULTS = Path(__file__).parents[1] / "profiles" / "results"


def cells_of(name: str) -> dict[int, dict]:
    """{length: cell} of a stored comparison."""
    return {cell["length"]: cell for cell in json.loads((RESULTS / name).read_text())["cells"]}


def at_equal_time(cell: dict, metric: str) -> dict:
    tables = matched_tables(cell, metric)
    return next(table for title, _, table in tables if "selection and attention" in title)


@pytest.fixture(scope="module")
def said() -> str:
    """What README.md says of the stored comparisons, on one line."""
    text = (RESULTS.parents[1] / "README.md").read_text()
    return " ".join(text.partition("## How to read the comparison")[2].partition("\n## ")[0].split())


def test_what_the_readme_says_of_the_comparison_inside_a_model_is_so(said):
    cells = cells_of("methods-tasks.nvidia-h100.json")
    agreement = {length: at_equal_time(cell, "agreement.top1") for length, cell in cells.items()}
    assert agreement.keys() == {32768, 65536}
    for table in agreement.values():
        for column in range(3):
            assert matching.best(table, column, True) == ["bsfa"]
        assert matching.best(table, 3, True) == ["pooled_top_p+bsfa"]
        assert table["pooled_top_p"][3] > table["pooled_top_p+bsfa"][3] - 0.005
    near, far = ([f"{table[name][3]:.3f}" for name in ("pooled_top_p+bsfa", "bsfa")] for table in agreement.values())
    assert f"{near[0]} against bsfa's {near[1]} at 32k and {far[0]} against {far[1]} at 64k" in said
    answers = at_equal_time(cells[32768], matching.ACCURACY)
    assert f"answers {answers['pooled_top_p'][3]:.3f} of the questions, bsfa {answers['bsfa'][3]:.3f}" in said
    rows = {length: {(row["method"], row["setting"]): row for row in cell["rows"]} for length, cell in cells.items()}
    for length, setting in ((32768, 0.9), (65536, 0.8)):
        pair = rows[length]["blasst", 16000.0], rows[length]["bsfa", setting]
        words = [f"{row['agreement']['top1']:.3f} at {row['density']:.3f}" for row in pair]
        assert f"{words[0]} against {words[1]}" in said
    flops = next(t for title, _, t in matched_tables(cells[32768], matching.ACCURACY) if "equal FLOP density" in title)
    at = matching.DENSITIES.index(0.25)
    assert f"answers {flops['xattention+bsfa'][at]:.3f}, without it {flops['xattention'][at]:.3f}" in said
    own = matching.by_method(cells[32768]["rows"])
    tri = [row["agreement"]["top1"] for row in own["tri_shape"]]
    assert f"{min(tri):.0%}"[:-1] + f" to {max(tri):.0%}".replace("%", " %") in said
    assert all(row["accuracy"]["mean"] == cells[32768]["dense_accuracy"]["mean"] for row in own["tri_shape"])
    assert max(row["accuracy"]["mean"] for row in own["sliding_window"]) == 0.5
    static = [row["accuracy"]["mean"] for name in ("strided", "dilated") for row in own[name]]
    assert f"{max(static):.0%}".replace("%", " %") in said


def test_what_the_readme_says_of_questions_asked_earlier_is_so(said):
    (cell,) = cells_of("checks/methods-asked-earlier-32k.nvidia-h100.json").values()
    assert (cell["length"], cell["asked_at"], cell["dense_accuracy"]["mean"]) == (32768, 0.75, 1.0)
    own = matching.by_method(cell["rows"])
    gated = own["bsfa"] + own["blasst"]
    assert all(row["accuracy"]["mean"] == 1 for row in gated)
    assert f"down to a density of {min(row['density'] for row in gated):.3f}" in said
    published = {row["method"]: row for row in cell["rows"] if row["published"]}
    for method in ("vertical_slash", "spargeattention"):
        assert published[method]["accuracy"]["mean"] == 1 and f" at {published[method]['density']:.3f}" in said
    for method, name in (("xattention", "XAttention"), ("pbs", "PBS-Attn"), ("pooled_top_p", "pooled top-p"),
                         ("flexprefill", "FlexPrefill"), ("flashprefill", "FlashPrefill"),
                         ("pooled_top_k", "mean-pooled top-k")):  # fmt: skip
        row = published[method]
        assert re.search(rf"{name} (answers )?{row['accuracy']['mean']:.3f} at {row['density']:.3f}", said), method
    widest = max(own["tri_shape"], key=lambda row: row["density"])
    answers = published["tri_shape"]["accuracy"]["mean"], widest["accuracy"]["mean"]
    assert f"answers {answers[0]:.3f} at its published window and {answers[1]:.3f} at density" in said


def test_what_the_readme_says_of_frames_is_so(said):
    cell = cells_of("methods-frames.nvidia-h100.json")[43968]
    mean, worst = at_equal_time(cell, "recall.mean"), at_equal_time(cell, "recall.worst")
    assert matching.best(mean, 1, True) == ["bsfa"] and matching.best(mean, 0, True) == ["global_attention"]
    assert sorted(kept[0] for kept in mean.values() if kept[0] is not None and kept[0] < 1)[-2] == mean["bsfa"][0]
    ahead = [f"{mean[name][2]:.3f} and {mean[name][3]:.3f}" for name in ("pooled_top_p", "bsfa")]
    assert f"({ahead[0]} against {ahead[1]})" in said
    own = matching.by_method(cell["rows"])
    assert {f"{row['selection_ms']:.2f}" for row in own["pooled_top_p"]} & {"0.45"}
    beforehand = [row for row in cell["rows"] if row["method"] not in ("dense", "bsfa", "bsfa_top_k", "blasst")]
    sparse = [row for row in beforehand if row["density"] < 0.999]
    tri = max(row["recall"]["worst"] for row in sparse if row["method"] == "tri_shape")
    assert f"({tri:.3f} Tri-shape, 0.000 all others)" in said
    assert max(row["recall"]["worst"] for row in sparse if row["method"] != "tri_shape") < 5e-4
    assert worst["bsfa"][1] == worst["blasst"][1] and f"gates keep {worst['bsfa'][1]:.3f} at 75 %" in said
    assert f"at 60 % bsfa keeps {worst['bsfa'][2]:.3f} and BLASST {worst['blasst'][2]:.3f}" in said
