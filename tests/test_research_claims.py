"""docs/research-question.md: its sentences held to the stored results, its tables and plots to one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bsfa_cli.comparison import matching
from bsfa_cli.errors import InputError
from bsfa_cli.metrics.statistics import wilson
from bsfa_cli.presentation import research, research_global, research_modality
from bsfa_cli.presentation.compare_table import matched_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "profiles" / "results"
EXACT = ("bsfa", "bsfa_top_k", "blasst")


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def said() -> str:
    """The page's own words, on one line, without what is generated."""
    page = (ROOT / "docs" / research.PAGE).read_text(encoding="utf-8")
    page = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    return " ".join(page.replace("*", "").split())


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    """32k, 64k."""
    return [stored(name)["cells"][0] for name in research.COMPARISONS]


def rows_of(cell: dict, scores: str) -> list[dict]:
    """Rows of the methods that take scores from there."""
    named = {method for method, (_, kind) in research.METHODS.items() if kind == scores}
    return [row for row in cell["rows"] if row["method"] in named]


def row_of(cell: dict, method: str, setting: float) -> dict:
    return next(row for row in cell["rows"] if (row["method"], row["setting"]) == (method, setting))


def mean(row: dict) -> float:
    return row["accuracy"]["mean"]


def ttft(cell: dict, row: dict) -> str:
    return f"{cell['fastest_ttft_ms'] / row['ttft_ms']:.2f}x"


def percents(shares) -> str:
    *first, last = (f"{100 * share:.1f}" for share in shares)
    return f"{', '.join(first)} and {last} %"


def test_the_page_is_filled_where_its_results_are_and_needs_its_marks(tmp_path):
    assert research.rendered(tmp_path) == {}
    (tmp_path / "docs").mkdir()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "results").symlink_to(RESULTS)
    page = tmp_path / "docs" / research.PAGE
    page.write_text("no marks")
    with pytest.raises(InputError, match=f"{research.PAGE} needs one line '<!-- setup: begin -->'"):
        research.rendered(tmp_path)


def test_every_method_measured_is_on_the_page(cells):
    for cell in cells:
        assert {row["method"] for row in cell["rows"]} - {"dense"} <= research.METHODS.keys()


def test_the_short_answer_is_so(said, cells):
    near, far = cells
    assert [cell["length"] for cell in cells] == [32768, 65536] and near["fastest_dense"] == "FlashAttention-3"
    gate = [row_of(cell, "bsfa", 0.9) for cell in cells]
    assert {mean(row) for row in near["rows"] if row["method"] == "bsfa"} == {near["dense_accuracy"]["mean"]}
    assert mean(gate[1]) == pytest.approx(far["dense_accuracy"]["mean"])
    assert f"bsfa answers {mean(gate[0]):.3f} of 400 questions" in said
    assert f"{gate[0]['speedup']:.2f}x as fast as dense and the first token comes {ttft(near, gate[0])} as fast" in said
    gains = f"{gate[1]['speedup']:.2f}x and {ttft(far, gate[1])}"
    assert f"it answers {mean(gate[1]):.3f} of 200, as dense, at {gains}" in said
    for cell in cells:  # none of the gates is told from bsfa
        best = matching.best(
            {row["method"]: [mean(row)] for row in rows_of(cell, "exact")}, 0, True,
            matching.questions(cell, matching.ACCURACY),
        )  # fmt: skip
        assert set(best) == set(EXACT)
    (eight,) = rows_of(near, "8-bit")
    assert f"8-bit scores: {mean(eight):.3f} at {eight['speedup']:.2f}x" in said
    top = [max(rows_of(cell, "estimated"), key=mean) for cell in cells]
    assert [row["method"] for row in top] == ["xattention", "pooled_top_p"] and top[0]["speedup"] < 1
    for cell, row in zip(cells, top, strict=True):
        assert row["accuracy"]["high"] < cell["dense_accuracy"]["mean"]
    assert f"XAttention at 32k ({mean(top[0]):.3f}" in said
    assert f"at 64k ({mean(top[1]):.3f} at {top[1]['speedup']:.2f}x)" in said
    fixed = [max(mean(row) for row in rows_of(cell, "none")) for cell in cells]
    assert f"at most {fixed[0]:.3f} at 32k, and {fixed[1]:.3f} at 64k" in said
    beyond = [[row for row in cell["rows"] if row["speedup"] > 2] for cell in cells]
    assert beyond[0] and all(mean(row) < near["dense_accuracy"]["mean"] / 2 for row in beyond[0])
    left = max(beyond[1], key=mean)
    assert left["method"] == "pooled_top_p" and f"with {mean(left):.3f} at {left['speedup']:.2f}x" in said
    gates = [row for cell in cells for row in rows_of(cell, "exact")]
    assert all(row["speedup"] < 1.01 * 2 / (1 + row["density"]) for row in gates)  # FlashAttention-3 is not our kernel
    assert f"the fastest gate here reaches {max(row['speedup'] for row in gates):.2f}x" in said


def test_the_setup_is_so(said, cells):
    for cell, questions in zip(cells, (80, 40), strict=True):
        assert {task["questions"] for task in cell["dense_accuracy"]["tasks"].values()} == {questions}
        assert set(cell["dense_accuracy"]["tasks"]) == set(research.TASKS)
    floor = cells[0]["rows"][0]
    assert floor["method"] == "dense" and floor["density"] == 1
    assert floor["accuracy"]["against_dense"]["lost"] == floor["accuracy"]["against_dense"]["gained"] == 0
    agreed = floor["agreement"]
    assert f"text tokens at {agreed['top1']:.3f} of {agreed['positions']:,} positions" in said
    assert f"badly even densely (perplexity {agreed['perplexity_dense']:,.0f})" in said
    runs = [run["samples"] for run in stored(research.MODALITY)["runs"]]
    words = [f"{run['fit']} fitted to, {run['heldout']} held out" for run in runs]
    assert f"calibrated on {sum(runs[0].values())} other prompts of 32,768 tokens ({words[0]})" in said
    assert f"at 64k on {sum(runs[1].values())} ({runs[1]['fit']} and {runs[1]['heldout']})" in said
    model = cells[0]["source"]["model"]
    heads = f"{model['query_heads']} query and {model['key_value_heads']} key-value heads of {model['head_dim']}"
    assert f"a LLaVA with {model['layers']} attention layers of {heads}" in said
    assert f"One small model of {model['layers']} layers" in said
    assert "80 questions a task at 32k, 40 at 64k" in said and "our kernel with every tile kept answers all 400" in said
    assert {round(cell["asked_at"], 2) for cell in cells} == {0.7} and "stands behind 70 % of the text" in said
    counts = [matching.questions(cell, matching.ACCURACY) for cell in cells]
    least = [wilson(round(right * asked), asked)[0] for right, asked in zip((0.99, 0.995), counts, strict=True)]
    assert least[0] < 0.98 and least[1] < 0.975
    assert f"{counts[0]} questions cannot tell 0.990 from 0.980, {counts[1]} not 0.995 from 0.975" in said
    text = next(cell for cell in stored("methods-tasks.nvidia-h100.json")["cells"] if cell["length"] == 32768)
    kept = next(row["density"] for row in text["rows"] if row["method"] == "vertical_slash" and row["published"])
    assert f"published one kept {kept:.3f} of the tiles" in said
    for cell in cells:
        for method, own in matching.by_method(cell["rows"]).items():
            assert method == "dense" or len(own) <= (4 if method in EXACT else 2)
    attention = [cell["fastest_dense_ms"] / cell["fastest_ttft_ms"] for cell in cells]
    assert f"attention is {attention[0] * 100:.0f} % at 32k and {attention[1] * 100:.0f} % at 64k" in said
    least = min(row["flop_density"] for cell in cells for row in rows_of(cell, "exact"))
    assert f"the gates start at {least:.2f}" in said


def test_what_is_said_of_tasks_is_so(said, cells):
    near = cells[0]
    assert all(row["accuracy"]["against_dense"]["lost"] == 0 for cell in cells for row in cell["rows"]
               if row["method"] == "bsfa")  # fmt: skip
    low, high = row_of(near, "bsfa", 0.9)["accuracy"]["against_dense"]["difference_interval"]
    assert f"for the change is {100 * low:.1f} to {100 * high:+.1f} points" in said
    most, half = (row_of(near, "bsfa", skip)["agreement"]["top1"] for skip in (0.9, 0.5))
    assert f"bsfa at 90 % predicts {most:.3f} as dense does, at 50 % {half:.3f}" in said
    published = row_of(near, "xattention", 0.9)
    task = {name: f"{found['accuracy']:.3f}" for name, found in published["accuracy"]["tasks"].items()}
    assert published["published"]
    assert f"(video needle {task['video-needle']}, retrieval {task['retrieval']})" in said
    assert f"(VQA {task['vqa']}, subtitles {task['subtitles']}, captioning {task['captioning']})" in said
    parts = []
    for method, setting in (("pooled_top_p", 0.98), ("pbs", 0.9), ("xattention", 0.98)):
        found = row_of(near, method, setting)["accuracy"]
        parts.append(f"{research.from_images(found):.3f} and {found['tasks']['subtitles']['accuracy']:.3f}")
    assert f"pooled top-p (0.98) keeps {parts[0]}, PBS-Attn {parts[1]}, XAttention (0.98) {parts[2]}" in said
    free = [(mean(row), near["fastest_dense_ms"] / row["attention_ms"])
            for row in (row_of(near, "xattention", 0.98), published)]  # fmt: skip
    words = [f"{share:.3f} at {gain:.2f}x" for share, gain in free]
    assert f"XAttention would answer {words[0]}, and {words[1]}, which no gate reaches" in said
    assert free[1][1] > max(row["speedup"] for row in near["rows"] if row["selection_ms"] == 0)


def test_what_is_said_of_modality_is_so(said):
    result = stored(research.MODALITY)
    points = {(run["length"], point["target"]): point for run in result["runs"] for point in run["points"]}
    assert len(points) == 10 and result["gpu"] == "NVIDIA H200"
    for point in points.values():
        tiles = point["shared"]["held_out"]["tiles"]
        assert tiles.keys() == {"image", "mixed"} and all(keys.keys() == {"image", "mixed"} for keys in tiles.values())
        assert all(tiles["image"][key]["skip"] > tiles["mixed"][key]["skip"] for key in ("image", "mixed"))
    ends = [
        [100 * points[32768, target]["shared"]["held_out"]["tiles"][kind][kind]["skip"] for kind in ("image", "mixed")]
        for target in (0.5, 0.9)
    ]
    assert f"image tiles seen by image tiles skip {ends[0][0]:.1f} %, mixed by mixed {ends[0][1]:.1f} %" in said
    assert f"at 90 % they skip {ends[1][0]:.1f} % and {ends[1][1]:.1f} %" in said
    savings = [research_modality.saving(point) for point in points.values()]
    assert f"between {100 * min(savings):+.1f} % and {100 * max(savings):+.1f} % of the dropped mass" in said


def test_what_is_said_of_global_attention_is_so(said):
    cell = max(stored(research.TENSORS)["cells"], key=lambda each: each["length"])
    assert cell["length"] == 32 * research_global.FRAME
    average, worst = (matched_tables(cell, f"recall.{which}")[0][2] for which in ("mean", "worst"))
    rule, gate, pooled = (average[name] for name in ("global_attention", "bsfa", "pooled_top_p"))
    assert matching.best(average, 0, True) == ["global_attention"] and rule[2] is None
    assert f"({rule[0]:.3f} of the mass against bsfa's {gate[0]:.3f})" in said
    assert f"behind bsfa at 75 % ({rule[1]:.3f} against {gate[1]:.3f})" in said
    own = next(row for row in cell["rows"] if row["method"] == "global_attention" and row["published"])
    words = f"{own['total_ms']:.2f} ms for {own['density']:.3f} of the tiles, {own['speedup']:.2f}x"
    assert f"it takes {words}" in said
    assert f"worst row it keeps {worst['global_attention'][1]:.3f}, bsfa {worst['bsfa'][1]:.3f} at 75 %" in said
    alone = {name: row for name, row in average.items() if "+" not in name}
    assert [matching.best(alone, column, True) for column in (2, 3)] == [["pooled_top_p"]] * 2
    assert pooled[2] > gate[2] and f"{worst['pooled_top_p'][2]:.3f} of the worst row" in said


def test_what_is_said_of_reasoning_is_so(said):
    prefill = stored("llama-3.1-8b-random-weights-prefill.nvidia-h200.json")
    entry = next(each for each in prefill["prefill"] if each["length"] == 32768)
    rows = {row["name"]: row for row in entry["contenders"]}
    assert not any("FlashAttention-3" in name for name in rows) and prefill["environment"]["gpu"] == "NVIDIA H200"
    words = "the fastest dense one timed (FlashAttention-3 was not; our kernel was an older one) with"
    own = rows["bsfa"]
    assert f"{own['speedup']:.2f}x {words} {100 * own['skip']:.0f} % of the model's tiles skipped" in said
    real = stored("real/smollm2-32k-by-kl.nvidia-h200.json")
    points = real["calibrations"]["mixed"]["shared by KL, gap"]["points"]
    (point,) = (point for point in points if point["name"] == "kl-skip-90")
    assert real["model"]["rope"]["factor"] == 4 and real["length"] == 32768
    loss = f"{100 * point['perplexity_increase']:.2f} % of perplexity"
    assert f"loses {loss} at {100 * point['skip']:.0f} % skipped" in said


def test_what_is_said_of_needles_is_so(said, cells):
    far = cells[1]
    recipe, gate = row_of(far, "bsfa_top_k", 16), row_of(far, "bsfa", 0.9)
    assert f"the paper's recipe at k = {recipe['setting']} finds" in said
    needle = recipe["accuracy"]["tasks"]["video-needle"]
    assert (needle["accuracy"], needle["questions"]) == (1, 40)
    words = f"the first token comes {ttft(far, recipe)} as fast as with FlashAttention-3, with bsfa at 90 %"
    assert f"finds all of 40, and {words} {ttft(far, gate)}" in said
    larger = stored("llama-3.1-8b.nvidia-h200.json"), stored("llama-3.1-8b-random-weights-prefill.nvidia-h200.json")
    one, whole = (
        next(row["ms_median"] for row in cell["contenders"] if row["name"] == "cuDNN")
        for cell in (next(cell for cell in larger[0]["cells"] if cell["length"] == 32768),
                     next(entry for entry in larger[1]["prefill"] if entry["length"] == 32768))
    )  # fmt: skip
    own = cells[0]["fastest_dense_ms"] / cells[0]["fastest_ttft_ms"]
    assert f"at 32k attention is {100 * own:.0f} % of this one's time" in said
    assert f"shape about {100 * 32 * one / whole:.0f} % (cuDNN, 32 layers)" in said
    text = next(cell for cell in stored("methods-tasks.nvidia-h100.json")["cells"] if cell["length"] == 65536)
    assert matching.questions(text, matching.ACCURACY) == 32
    shares = mean(row_of(text, "bsfa_top_k", 32)), text["dense_accuracy"]["mean"], mean(row_of(text, "bsfa", 0.9))
    assert f"k = 32 answers {shares[0]:.3f} of 32 questions, the dense model {shares[1]:.3f}" in said
    assert f"bsfa at 90 % skipped {shares[2]:.3f}" in said


def test_what_is_said_of_approximating_methods_is_so(said, cells):
    assert "equal time up to 60 % of dense and at equal density" in said
    kinds = {method: kind for method, (_, kind) in research.METHODS.items()}
    for cell in cells:
        asked = matching.questions(cell, matching.ACCURACY)
        found = {title.rpartition(", at ")[2]: table for title, _, table in matched_tables(cell, matching.ACCURACY)}
        for title, columns in ((research.MATCHED["time"], range(3)), (research.MATCHED["density"], range(4))):
            table = found[title]
            for column in columns:
                best = matching.best(table, column, True, asked)
                assert "bsfa" in best and all(kinds[method] in ("exact", "8-bit") for method in best)
                assert {m for m, row in table.items() if row[column] and kinds.get(m) == "estimated"}.isdisjoint(best)
        assert all(row["speedup"] < 1.86 for row in rows_of(cell, "exact"))
    text = next(cell for cell in stored("methods-tasks.nvidia-h100.json")["cells"] if cell["length"] == 32768)
    agreed, answers = (matched_tables(text, metric)[0][2] for metric in ("agreement.top1", matching.ACCURACY))
    assert f"in more tokens ({agreed['pooled_top_p'][3]:.3f} against {agreed['bsfa'][3]:.3f})" in said
    assert agreed["pooled_top_p"][3] > agreed["bsfa"][3] and answers["pooled_top_p"][3] < answers["bsfa"][3]


def test_what_is_said_of_exact_scores_and_skipping_is_so(said, cells):
    near = cells[0]
    whole = near["rows"][0]["attention_ms"]
    assert f"takes {whole:.2f} ms where FlashAttention-3 takes {near['fastest_dense_ms']:.2f}" in said
    profile = {cell["length"]: cell for cell in stored("llama-3.1-8b.nvidia-h200.json")["cells"]}
    gains = {
        (length, row["skip_target"]): f"{row['speedup']:.2f}x" for length, cell in profile.items()
        for row in cell["contenders"] if row["kind"] == "bsfa" and row["skip_target"] is not None
    }  # fmt: skip
    assert all(cell["fastest_dense"] == "FlashAttention-3" for cell in profile.values())
    assert f"shape {gains[32768, 0]} FlashAttention-3's speed at 32k and {gains[131072, 0]} at 128k" in said
    assert f"90 % skipped is {gains[32768, 0.9]} FlashAttention-3 at 32k and {gains[131072, 0.9]} at 128k" in said
    run = stored(research.MODALITY)["runs"][0]
    targets = (0.5, 0.7, 0.8, 0.9)
    reached = [point["shared"]["held_out"]["skip"] for point in run["points"] if point["target"] in targets]
    assert f"asked for 50, 70, 80 and 90 %, skip {percents(reached)} of 4 held-out ones" in said
    taken = [f"{row_of(near, 'bsfa', target)['attention_ms']:.2f}" for target in targets]
    assert f"takes {', '.join(taken[:3])} and {taken[3]} ms instead of {whole:.2f}" in said
    assert near["source"]["model"]["weights"] == stored(research.MODALITY)["model"]["weights"]


def test_what_other_pages_say_of_it_is_so(cells):
    lost = [row["accuracy"]["against_dense"]["lost"] for cell in cells for row in rows_of(cell, "exact")]
    others = [row["accuracy"]["against_dense"]["lost"] for cell in cells for row in rows_of(cell, "estimated")]
    assert sorted(lost)[-2:] == [0, 2] and min(others) > 0
    page = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    assert "the gates keep every answer or lose 2 of 400, and every selection loses some" in page
    gate = [row_of(cell, "bsfa", 0.9)["accuracy"]["against_dense"]["lost"] for cell in cells]
    page = " ".join((ROOT / "docs" / "research.md").read_text(encoding="utf-8").split())
    assert gate == [0, 0] and "keeps its answers with up to 90 % of the tiles skipped at 32k and 64k tokens" in page


def test_what_was_not_run_is_said(said, cells):
    near, far = ({row["method"] for row in cell["rows"]} - {"dense"} for cell in cells)
    absent = near - far - {"pooled_top_p+bsfa"}
    names = [research.METHODS[method][0] for method in research.METHODS if method in absent]
    listed = said.partition("At 64k: ")[2].partition(" At 32k:")[0]
    assert len(names) == 6 and all(name.partition(", ")[2] in listed or name in listed for name in names)
    assert not near & {"dilated", "spargeattention", "flashprefill"}
