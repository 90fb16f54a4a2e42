"""Sentences of README.md and docs/ about stored results, held to the files."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from bsfa_cli.comparison import matching
from bsfa_cli.presentation import headline
from bsfa_cli.presentation.compare_table import matched_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "profiles" / "results"


def cells_of(name: str) -> dict[int, dict]:
    """{length: cell} of a stored comparison."""
    return {cell["length"]: cell for cell in json.loads((RESULTS / name).read_text())["cells"]}


def matched(cell: dict, metric: str, words: str = "equal time (selection and attention)") -> dict:
    return next(table for title, _, table in matched_tables(cell, metric) if words in title)


def percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def on_one_line(*path: str) -> str:
    return " ".join(ROOT.joinpath(*path).read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def said() -> str:
    """What docs/methods.md says of the stored comparisons."""
    return on_one_line("docs", "methods.md").partition(" ## What the stored comparisons say ")[2]


def test_what_is_said_of_the_comparison_inside_a_model_is_so(said):
    cells = cells_of("methods-tasks.nvidia-h100.json")
    agreement = {length: matched(cell, "agreement.top1") for length, cell in cells.items()}
    assert agreement.keys() == {8192, 16384, 32768, 65536}
    for table in agreement.values():
        for column in range(3):
            assert matching.best(table, column, True) == ["bsfa"]
    short, middle = agreement.pop(8192), agreement.pop(16384)
    assert [name for name, kept in short.items() if kept[3] is not None] == ["blasst"]
    assert f"only BLASST gets to 50 % ({short['blasst'][3]:.3f})" in said
    layers = cells[8192]["source"]["model"]["layers"]
    assert f"one attention takes {cells[8192]['fastest_dense_ms'] / layers:.1f} ms" in said
    assert middle["blasst"][3] == pytest.approx(middle["bsfa"][3], abs=1e-3)
    for table in agreement.values():
        assert matching.best(table, 3, True) == ["pooled_top_p+bsfa"]
        assert table["pooled_top_p"][3] > table["pooled_top_p+bsfa"][3] - 0.005
    assert agreement[65536]["pooled_top_p+bsfa"][3] == pytest.approx(agreement[65536]["pooled_top_p"][3], abs=1e-3)
    near, far = ([f"{table[name][3]:.3f}" for name in ("pooled_top_p+bsfa", "bsfa")] for table in agreement.values())
    assert f"{near[0]} against bsfa's {near[1]} at 32k and {far[0]} against {far[1]} at 64k" in said
    answers = matched(cells[32768], matching.ACCURACY)
    assert f"answers {answers['pooled_top_p'][3]:.3f} of the questions, bsfa {answers['bsfa'][3]:.3f}" in said
    rows = {length: {(row["method"], row["setting"]): row for row in cell["rows"]} for length, cell in cells.items()}
    for length, setting in ((32768, 0.9), (65536, 0.8)):
        pair = rows[length]["blasst", 16000.0], rows[length]["bsfa", setting]
        words = [f"{row['agreement']['top1']:.3f} at {row['density']:.3f}" for row in pair]
        assert f"{words[0]} against {words[1]}" in said
    flops = matched(cells[32768], matching.ACCURACY, "equal FLOP density")
    at = matching.DENSITIES.index(0.25)
    assert f"answers {flops['xattention+bsfa'][at]:.3f}, without it {flops['xattention'][at]:.3f}" in said
    agreed = matched(cells[32768], "agreement.top1", "equal FLOP density")
    assert agreed["pbs+bsfa"][matching.DENSITIES.index(0.5)] > agreed["pbs"][matching.DENSITIES.index(0.5)]
    own = matching.by_method(cells[32768]["rows"])
    tri = [row["agreement"]["top1"] for row in own["tri_shape"]]
    assert f"in {min(tri) * 100:.0f} to {percent(max(tri))} of tokens" in said
    assert all(row["accuracy"]["mean"] == cells[32768]["dense_accuracy"]["mean"] for row in own["tri_shape"])
    assert max(row["accuracy"]["mean"] for row in own["sliding_window"]) == 0.5
    static = [row["accuracy"]["mean"] for name in ("strided", "dilated") for row in own[name]]
    assert f"at most {percent(max(static))}" in said


def test_what_is_said_of_free_selections_is_so(said):
    cells = cells_of("methods-tasks.nvidia-h100.json")
    near, far = (matched(cells[length], "agreement.top1", "were selection free") for length in (32768, 65536))
    for column in range(3):
        assert matching.best(near, column, True) == ["bsfa"]
    assert far["vertical_slash"][0] == pytest.approx(far["bsfa"][0], abs=1e-3)
    for column in (2, 3):
        assert min(far["vertical_slash"][column], far["pbs"][column]) > far["bsfa"][column]
    ahead = {
        "pbs": "PBS-Attn",
        "pooled_top_p": "pooled top-p",
        "xattention": "XAttention",
        "flashprefill": "FlashPrefill",
    }
    alone = [name for name in near if name != "dense" and "+" not in name]
    both = {name for name in alone if all((table[name][3] or 0) > table["bsfa"][3] for table in (near, far))}
    assert both == set(ahead) and all(name in said for name in ahead.values())


def test_what_is_said_of_combinations_is_so(said):
    better = {}
    for length, cell in cells_of("methods-tasks.nvidia-h100.json").items():
        table = matched(cell, "agreement.top1")
        for name in (name for name in table if "+bsfa" in name):
            parts = [table[part] for part in name.split("+")]
            for share, both, *alone in zip(matching.TIMES, table[name], *parts, strict=True):
                gain = (both or 0) - max((kept or 0) for kept in alone)
                if gain > 1e-3:
                    better[name, length, share] = f"{gain:.3f}"
    assert better == {("pooled_top_p+bsfa", 32768, 0.5): "0.004"} and "at 50 % and 32k, by 0.004" in said


def test_what_is_said_of_questions_asked_earlier_is_so(said):
    (cell,) = cells_of("methods-asked-earlier.nvidia-h100.json").values()
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
    half = {method: kept[3] for method, kept in matched(cell, matching.ACCURACY).items()}
    assert half["bsfa"] == half["blasst"] == 1
    stated = [f"{half[method]:.3f}" for method in ("pooled_top_p", "pooled_top_p+bsfa", "tri_shape")]
    assert f"pooled top-p alone answers {stated[0]}, with the gate {stated[1]} and Tri-shape {stated[2]}" in said


def test_what_is_said_of_frames_is_so(said):
    cell = cells_of("methods-frames.nvidia-h200.json")[43968]
    mean, worst = matched(cell, "recall.mean"), matched(cell, "recall.worst")
    alone = {name: row for name, row in mean.items() if "+" not in name}
    gate, eight, pooled, rule = (mean[name] for name in ("bsfa", "bsfa_int8", "pooled_top_p", "global_attention"))
    assert cell["fastest_dense"] == "FlashAttention-3" and matching.best(mean, 0, True) == ["bsfa_int8"]
    assert f"at 90 % of FlashAttention-3's time ({eight[0]:.3f})" in said
    assert gate[0] < pooled[0] and f"exact scores ({gate[0]:.3f}) is behind pooled top-p ({pooled[0]:.3f})" in said
    assert [matching.best(alone, column, True) for column in (1, 2, 3)] == [["pooled_top_p"]] * 3
    words = [", ".join(f"{kept:.3f}" for kept in row[1:3]) for row in (pooled, gate, eight)]
    shares = f"{words[0]} and {pooled[3]:.3f} at 75, 60 and 50 %, bsfa {words[1]} and none"
    assert gate[3] is None and f"{shares}, with int8 scores {words[2]} and {eight[3]:.3f}" in said
    assert matching.best(mean, 1, True) == ["pooled_top_p+bsfa"]
    assert f"with bsfa's gate on top is first ({mean['pooled_top_p+bsfa'][1]:.3f})" in said
    assert rule[1] is None and f"keeps {rule[0]:.3f} at 90 % and does not get to 75 %" in said
    spent = [row["selection_ms"] for row in cell["rows"] if row["method"] == "pooled_top_p"]
    assert f"whose selection takes {statistics.median(spent):.2f} ms" in said
    beforehand = [
        row for row in cell["rows"] if row["method"] not in ("dense", "bsfa", "bsfa_int8", "bsfa_top_k", "blasst")
    ]
    sparse = [row for row in beforehand if row["density"] < 0.999]
    tri = max(row["recall"]["worst"] for row in sparse if row["method"] == "tri_shape")
    assert f"({tri:.3f} Tri-shape, 0.000 all others)" in said
    assert max(row["recall"]["worst"] for row in sparse if row["method"] != "tri_shape") < 5e-4
    kept = [f"{worst[name][1]:.3f}" for name in ("bsfa", "bsfa_int8", "blasst")]
    assert f"At 75 % bsfa keeps {kept[0]}, with int8 scores {kept[1]}, and BLASST {kept[2]}" in said


def test_what_is_said_of_faster_lists_is_so(said):
    text = (RESULTS / "checks" / "lists-entries.nvidia-h200.txt").read_text()
    heads_of_128 = text.partition("# Second run")[2].partition("d=64")[0]
    found = re.findall(r"^  (.+?) +\| new .* over base ([\d.]+)$", heads_of_128, re.MULTILINE)
    gains = {lists: float(ratio) - 1 for lists, ratio in found}
    changing = [gain for lists, gain in gains.items() if re.search(r"by (64|128) rows|verticals", lists)]
    assert len(changing) == 9
    assert f"by up to {percent(max(changing))} where lists change" in said
    assert f"by {percent(gains['full'])} where they hold everything" in said


def test_what_is_said_of_the_gap_gates_cost_is_so():
    result = json.loads((RESULTS / "checks" / "gap-against-absolute.nvidia-h200.json").read_text())
    assert {cell["length"] for cell in result["cells"]} == {8192, 32768, 131072}
    worst = max(cost for cell in result["cells"] for cost in cell["cost"].values())
    assert f"took at most {percent(worst, 1)} more time than the absolute one" in on_one_line("docs", "results.md")


def test_what_is_said_of_sharing_by_kl_is_so():
    page, reach = on_one_line("docs", "recipes.md"), {}
    for length in ("8k", "32k"):
        stored = json.loads((RESULTS / "real" / f"smollm2-{length}-by-kl.nvidia-h200.json").read_text())
        for recipe, entry in stored["calibrations"]["mixed"].items():
            for metric, skip in entry["furthest"].items():
                reach[length, recipe, metric] = skip
    kl, loss = "kl_over_floor", "perplexity_increase"

    def at(metric: str, recipe: str) -> list[str]:
        return [percent(reach[length, recipe, metric]) for length in ("8k", "32k")]

    assert at(kl, "shared by KL, gap") == ["83 %", "83 %"] and "up to 83 % of the tiles at 8,192" in page
    assert f"shared out by mass up to {' and '.join(at(kl, 'shared skip, gap'))}" in page
    words = [" and ".join(at(loss, recipe)) for recipe in ("shared by KL, gap", "shared skip, gap")]
    assert f"within 1 % of perplexity it skips {' against '.join(words)}" in page
    for recipe in ("shared by KL, gap", "shared skip, gap"):
        for metric in (kl, loss):
            assert reach["8k", f"{recipe}, 2 layers dense", metric] < reach["8k", recipe, metric]


def test_what_is_said_of_frames_in_the_readme_is_so():
    page, (cell,) = on_one_line("README.md"), cells_of("methods-vision-32k.nvidia-h200.json").values()
    rows = {(row["method"], row["setting"]): row for row in cell["rows"]}
    assert cell["fastest_dense"] == "FlashAttention-3" and matching.questions(cell, matching.ACCURACY) == 400

    def found(method: str, setting: float, digits: int = 0) -> str:
        row = rows[method, setting]
        return f"{percent(row['accuracy']['mean'], digits)} at {row['speedup']:.2f}x"

    assert percent(cell["dense_accuracy"]["mean"]) == percent(rows["bsfa", 0.9]["accuracy"]["mean"]) == "99 %"
    assert f"bsfa answers 99 % of them at {rows['bsfa', 0.9]['speedup']:.2f}x" in page
    assert found("bsfa_int8", 0.8) == "99 % at 1.92x" and "at 1.92x with int8 scores" in page
    assert f"pooled top-p {found('pooled_top_p', 0.98)}" in page
    assert f"XAttention {found('xattention', 0.98, 1)}" in page
    chosen = [row["accuracy"]["mean"] for row in cell["rows"] if row["method"] not in (
        "dense", "bsfa", "bsfa_int8", "bsfa_top_k", "blasst", "xattention")]  # fmt: skip
    assert max(chosen) == rows["pooled_top_p", 0.98]["accuracy"]["mean"]


def test_what_is_said_of_int8_scores_is_so():
    page = (ROOT / "docs" / "int8.md").read_text(encoding="utf-8")
    stored = json.loads((RESULTS / "int8.nvidia-h200.json").read_text())
    for cell in stored["cells"]:
        assert cell["fastest_dense"] == "FlashAttention-3"
        columns = []
        for kind in ("bsfa, int8 scores", "bsfa"):
            rows = [row for row in cell["contenders"] if row["kind"] == kind and row["skip_target"] is not None]
            columns.append(" ".join(f"{row['speedup']:.2f}" for row in sorted(rows, key=lambda r: r["skip_target"])))
        assert f"| {cell['length'] // 1024}k, d={cell['shape']['head_dim']} | {' | '.join(columns)} |" in page
    wide = [cell for cell in stored["cells"] if cell["shape"]["head_dim"] == 128]
    times = [{row["name"]: row["ms_median"] for row in cell["contenders"]} for cell in wide]
    first, second, third = (f"{each['int8 preparation']:.3f}" for each in times)
    assert f"takes {first}, {second} and {third} ms of that" in page
    table: dict[str, list[str]] = {}
    for length in ("8k", "32k"):
        real = json.loads((RESULTS / "real" / f"smollm2-{length}-by-kl.nvidia-h200.json").read_text())
        recipes, beside = real["calibrations"]["mixed"], real["unskipped"]
        found = {"nothing skipped": (real["floor"], beside["int8 scores"])}
        for asked in (50, 80):
            by_name = [
                next(p for p in recipes[f"shared by KL, gap{scores}"]["points"] if p["name"] == f"kl-skip-{asked}")
                for scores in ("", ", int8 scores")
            ]
            found[f"{asked} % asked for"] = by_name
        found["FlashAttention-3 in FP8, dense"] = (None, beside["FlashAttention-3 FP8"])
        for row, pair in found.items():
            table.setdefault(row, []).extend(
                "" if each is None else f"{each['kl']:.4f}, {each['perplexity_increase'] * 100:+.2f} %" for each in pair
            )
    for row, values in table.items():
        assert f"| {row} | {' | '.join(values)} |".replace("|  |", "| |") in page, (row, values)


def test_what_is_said_of_pages_and_packed_prefills_is_so():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    slower, saved = [], []
    for cell in json.loads((RESULTS / "checks" / "paged.nvidia-h200.json").read_text())["cells"]:
        ms = {row["name"]: row["ms_median"] for row in cell["contenders"]}
        library = ms["fa3-fwd 0.0.3, paged"]
        if "sequences" in cell:
            names, digits, start = ("one by one, no gate", "one by one", "packed, no gate", "packed"), 3, ""
        else:
            names, digits = ("layer, no gate", "layer", "paged, no gate", "paged"), 2
            start = f"| {cell['rows']:,} of {cell['keys']:,} | {ms['gather']:.3f} "
        values = " | ".join(f"{ms[name]:.{digits}f}" for name in names)
        assert f"{start}| {values} ({cell['skip']:.0%} skipped) | {library:.{digits}f} |" in page
        slower.append(100 * (ms[names[2]] / library - 1))
        saved.append(100 * (1 - ms[names[3]] / library))
    assert f"the faster one by {min(slower):.0f} to {max(slower):.0f} %" in page
    assert f"bsfa is, by {min(saved):.0f} to {max(saved):.0f} %" in page


def test_what_is_said_of_several_gpus_is_so():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    two, four = (
        json.loads((RESULTS / "checks" / f"tensor-parallel-{n}.nvidia-h200.json").read_text())["rows"] for n in (2, 4)
    )
    names = {"sdpa, cudnn": "sdpa, cuDNN"}
    ms = {}
    for one, other in zip(two, four, strict=True):
        ms[one["name"]] = [one[kind]["ms_median"] for kind in ("one_gpu", "tensor_parallel")]
        ms[one["name"]].append(other["tensor_parallel"]["ms_median"])
        skip = "-" if one["skip"] is None else f"{one['skip']:.1%}"
        values = " | ".join(f"{value:.1f}" for value in ms[one["name"]])
        assert f"| {names.get(one['name'], one['name'])} | {skip} | {values} |" in page
        for row in (one, other):
            assert row["skip"] is None or abs(row["skip"] - row["skip_one_gpu"]) < 1e-4
            assert 0.013 <= row["error"] < 0.0175 if not row["skip"] else 0.06 <= row["error"] < 0.18
    gains = [a / b for a, b in zip(ms["sdpa, cudnn"][1:], ms["bsfa, 75%"][1:], strict=True)]
    assert [round(100 * (1 - 1 / gain)) for gain in gains] == [10, 9]
    rows = json.loads((RESULTS / "checks" / "calibrate-processes.nvidia-h200.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2, 4] and all(row["same_bytes"] for row in rows)
    later = [seconds for row in rows for seconds in list(row["seconds"].values())[1:]]
    assert {round(seconds, 2) for seconds in later} <= {0.22, 0.23} and "takes 0.23 s in each" in page


def test_what_is_said_of_the_host_and_of_gradients_is_so():
    readme, notes, recipes = (
        " ".join((ROOT / name).read_text(encoding="utf-8").split())
        for name in ("README.md", "kernels/NOTES.md", "docs/recipes.md")
    )
    found = json.loads((RESULTS / "checks" / "host-time.nvidia-h200.json").read_text())["contenders"]
    us = {row["name"]: row["cpu_us_median"] for row in found}
    words = [f"{us[name] / 1e3:.3f}" for name in ("bsfa, gap gate", "bsfa, block lists", "FlashAttention-3", "cuDNN")]
    assert (
        f"{words[0]} ms with a gate and {words[1]} with lists, FlashAttention-3 {words[2]}, cuDNN {words[3]}" in notes
    )
    assert us["bsfa, gap gate"] < 60 and us["bsfa, block lists"] < 150  # asked for
    gate, lists, int8, fa3, cudnn = (
        f"{us[name] / 1e3:.2f}"
        for name in ("bsfa, gap gate", "bsfa, block lists", "bsfa, gap gate, int8 scores", "FlashAttention-3", "cuDNN")
    )
    assert f"A call costs the host {gate} ms of CPU time, with block lists {lists}, with int8 scores {int8}" in readme
    assert f"(FlashAttention-3 {fa3}, cuDNN {cudnn})" in readme
    assert f"Without a gate it was {us['bsfa, no gate'] / 1e3:.2f}" in readme
    took = [
        json.loads((RESULTS / "checks" / f"gradients-{n}.nvidia-h200.json").read_text())["median_seconds"]
        for n in ("8k", "32k")
    ]
    (near, far) = ({name: f"{seconds:.2f}" for name, seconds in each.items()} for each in took)
    assert f"adds {near['backward']} s to the {near['forward']} s of a sample of 8,192 tokens" in recipes
    assert f"{far['backward']} s to {far['forward']} s at 32,768" in recipes
    assert f"{near['torch']} s with the specification's own sums" in recipes


def test_what_is_said_of_mla_is_so():
    notes = " ".join((ROOT / "kernels" / "NOTES.md").read_text(encoding="utf-8").split())
    for cell in json.loads((RESULTS / "mla.nvidia-h200.json").read_text())["cells"]:
        assert cell["fastest_dense"] == "FlashAttention-3"
        ours = [row for row in cell["contenders"] if row["kind"] == "bsfa"]
        ours.sort(key=lambda row: (row["skip_target"] is not None, row["skip_target"] or 0))
        first, *gains = (f"{row['speedup']:.2f}" for row in ours)
        assert f"{cell['shape']['heads']}/{cell['shape']['kv_heads']} heads" in notes
        assert f"{cell['length'] // 1024}k {first}, {' '.join(gains)}" in notes


def test_what_is_said_of_where_the_loss_comes_from_is_so():
    page = on_one_line("docs", "recipes.md")
    shares, first, second, saved, ends, kinds = [], [], [], [], [], []
    for length in ("8k", "32k"):
        result = json.loads((RESULTS / "real" / f"smollm2-{length}-loss.nvidia-h200.json").read_text())
        assert result["recipe"] == "shared by KL, gap" and result["evaluation"]["texts"] >= 4
        total, parts = result["whole"]["kl_over_floor"]["value"], result["sum_of_layers"]
        layers = sorted(result["layers"], key=lambda each: -each["only"]["kl_over_floor"]["value"])
        assert layers[0]["layer"] == 0 and len(layers) == 30
        shares.append(f"{result['whole']['skip']:.0%} {parts / total:.0%}")
        first.append(f"{layers[0]['only']['kl_over_floor']['value'] / parts:.0%}")
        second.append(f"{layers[1]['only']['kl_over_floor']['value'] / parts:.0%}")
        saved.append(f"{max(total - each['without']['kl_over_floor']['value'] for each in layers) / total:.0%}")
        octaves = result["whole"]["by_position"]
        assert octaves[0]["to"] == 512 and 2 * octaves[-1]["from"] == octaves[-1]["to"] == result["length"]
        ends.append([f"{octaves[i]['kl']:.4f}" for i in (0, -1)])
        assert octaves[0]["kl"] < result["floor"]["kl"] + 0.0005
        kinds.append(sorted(result["by_kind"]["history"], key=lambda each: -each["kl_over_floor"]))
    said = [share.replace("%", " %") for share in " ".join(shares).split()]
    assert f"at {said[0]} of the tiles at 8,192 tokens and {said[2]} at 32,768" in page
    assert f"comes to {said[1]} (8k) and {said[3]} (32k)" in page
    first, saved = (" and ".join(each).replace("%", " %") for each in (first, saved))
    assert set(second) == {"5%"} and f"{first} of that sum, the next one 5 %" in page
    assert f"would save most saves {saved}" in page
    assert (
        f"512 tokens ({ends[0][0]} and {ends[1][0]}) and {ends[0][1]} in the last half of 8k, {ends[1][1]} in" in page
    )
    near, far = kinds
    change = [each["loss_sparse"] - each["loss_dense"] for each in (near[0], near[-1], far[0])]
    assert (near[0]["kind"], near[-1]["kind"]) == ("pair seen farther back", "pair seen in the last 512")
    assert f"dearest (KL {near[0]['kl_over_floor']:.4f} above the floor, loss {change[0]:+.3f})" in page
    assert f"cheapest ({near[-1]['kl_over_floor']:.4f}, loss {change[1]:+.3f})" in page
    assert far[0]["kind"] == "token not seen"
    assert f"has not had are ({far[0]['kl_over_floor']:.4f}), at a loss that does not change ({change[2]:+.3f})" in page


def test_what_is_said_of_methods_at_8k_is_so():
    page = on_one_line("docs", "methods.md")
    (cell,) = cells_of("methods-smollm2-8k.nvidia-h200.json").values()
    assert cell["fastest_dense"] == "FlashAttention-3" and len(cell["source"]["texts"]) == 4
    assert f"nothing skipped agrees in {cell['rows'][0]['agreement']['top1']:.3f}) one forward" in page
    assert f"takes {cell['fastest_dense_ms']:.1f} ms there" in page
    assert not any(row["speedup"] >= 1 for row in cell["rows"] if row["selection_ms"])
    time, free = (table for _, _, table in matched_tables(cell, "agreement.top1")[:2])
    gates = ("bsfa", "bsfa_int8", "bsfa_top_k", "blasst")
    shown = {name: ["none" if x is None else f"{x:.3f}" for x in time[name][:3]] for name in gates}
    assert all(matching.best(time, column, True) == ["bsfa"] for column in range(3))
    for name, words in (("bsfa", "time, {}, {} and {};"), ("blasst", "BLASST has {}, {} and {}"),
                        ("bsfa_top_k", "top-k {}, {} and {}")):  # fmt: skip
        assert words.format(*shown[name]) in page
    best = [max((row[i], name) for name, row in free.items() if row[i] is not None and name not in gates)
            for i in range(3)]  # fmt: skip
    assert [name for _, name in best] == ["vertical_slash", "xattention", "xattention"]
    assert "would have {:.3f}, {:.3f} and {:.3f} (vertical-slash".format(*(share for share, _ in best)) in page


def test_the_table_says_dash_of_who_was_not_there():
    files = {name: RESULTS / name for name in headline.NEEDED}
    stored = {name: json.loads((p if p.exists() else RESULTS / "real" / name).read_text()) for name, p in files.items()}
    whole = headline.block(stored)
    assert whole in (ROOT / "README.md").read_text()
    cells = stored[headline.SPEED]["cells"]
    for cell in cells:
        kept = [row for row in cell["contenders"] if headline.NVIDIAS not in row["name"]]
        cell["contenders"] = [row for row in kept if row["name"] != headline.OTHER_DENSE]
    lines = headline.block(stored).splitlines()
    assert [line.split(" | ")[5:7] for line in lines if re.match(r"\| \d", line)] == [["-", "-"]] * 4
    assert headline.OTHER_DENSE not in lines[-1] and len(lines) == len(whole.splitlines())
    cells[:] = [cell for cell in cells if cell["length"] != headline.LENGTHS[0]]
    lines = headline.block(stored).splitlines()
    assert [line.split(" | ")[1] for line in lines if re.match(r"\| \d", line)] == ["-"] * 4
    cells.clear()
    assert headline.block(stored) is None
