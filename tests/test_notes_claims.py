"""Tables and sentences of kernels/NOTES.md and docs/, held to profiles/results/checks."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / "profiles" / "results" / "checks"


def stored(name: str) -> dict:
    return json.loads((CHECKS / f"{name}.nvidia-h200.json").read_text())


def on_one_line(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def ms(cell: dict) -> dict[str, float]:
    return {row["name"]: row["ms_median"] for row in cell["contenders"]}


def row_of(*values: str) -> str:
    return f"| {' | '.join(values)} |".replace("|  |", "| |")


def test_what_is_said_of_flash_attention_4s_lists_is_so():
    notes, digits = on_one_line("kernels/NOTES.md"), {32768: 2, 131072: 1}
    table, ratios, dense = {}, {}, []
    for cell in stored("block-lists-fa4")["cells"]:
        times, places = {}, digits[cell["length"]]
        for row in cell["contenders"]:
            if row["kind"] == "dense":
                dense.append(f"{row['ms_median']:.{places}f}")
            else:
                assert row["largest_row_error"] < 0.004
                assert row["kind"] == "bsfa" or row["library"] == "flash-attn-4 4.0.0b36+compiled.ahead"
                times[row["left_out"], row["sharing"], row.get("form")] = row["ms_median"]
        for entry in cell["ratios"]:
            key = entry["left_out"], entry["sharing"]
            forms = [times[*key, form] for form in (None, "causal", "mask_mod")]
            assert entry["ratio"] == min(forms[1:]) / forms[0]
            ratios.setdefault(entry["sharing"], []).append(entry["ratio"])
            values = [f"{each:.{places}f}" for each in forms]
            table.setdefault(key, []).extend([*values, f"{entry['ratio']:.2f}"])
    for (left_out, sharing), values in table.items():
        assert row_of(f"{left_out * 100:.0f} %", str(sharing), *values) in notes
    pairs = [f"{near} and {far}" for near, far in zip(dense[:3], dense[3:], strict=True)]
    assert f"FA3 {pairs[0]}, FA4 {pairs[1]}, bsfa without lists {pairs[2]}" in notes
    level, *behind = sorted(ratios[128], reverse=True)
    less = [100 * (1 - each) for each in behind]
    assert round(level, 2) == 1 and f"else FA4 takes {min(less):.0f} to {max(less):.0f} % less time" in notes
    assert f"x is {min(ratios[384]):.2f} to {max(ratios[384]):.2f}" in notes


def test_what_is_said_of_architectures_is_so():
    notes = on_one_line("kernels/NOTES.md")
    found = {cell["name"].partition("-like")[0]: cell
             for name in ("architectures-scoring", "architectures") for cell in stored(name)["cells"]}  # fmt: skip
    assert len(found) == 7
    for cell in found.values():
        times, (skip,) = ms(cell), [row["skip"] for row in cell["contenders"] if row["name"] == "bsfa"]
        names = ("sdpa", "flex_attention", "FlashAttention-3", "bsfa, no thresholds", "bsfa")
        values = [f"{times[name]:.1f}" if name in times else "" for name in names]
        assert row_of(cell["name"], *values[:-1], f"{values[-1]}, {skip * 100:.0f} %") in notes
        assert {route for route, _ in cell["notes"]} == {"kept"}  # of the call without thresholds
    open_ = {name: ms(cell)["bsfa, no thresholds"] for name, cell in found.items()}
    for name in ("Llama", "DeepSeek"):
        assert abs(open_[name] / ms(found[name])["FlashAttention-3"] - 1) < 0.03
    slower = open_["Qwen3.5"] / ms(found["Qwen3.5"])["sdpa"]
    assert (
        f"that took {100 * (slower - 1):.0f} % more than sdpa (the {open_['Qwen3.5']:.1f} of Qwen3.5's shape)" in notes
    )


def test_what_is_said_of_the_power_limit_is_so():
    notes, found = on_one_line("kernels/NOTES.md"), {}
    for row in stored("ncu-hopper")["rows"]:
        key = row["head_dim"], row["scores"], row["kernel"], row["threshold"]
        found[key] = row["tensor_pipe_pct"], row["megacycles"] / row["ms"]
    programs = {
        "32/8 heads of 128": (128, "exact"), "32/8 heads of 64": (64, "exact"), "16/4 heads of 256": (256, "exact"),
        "32/8 heads of 128, int8 scores": (128, "int8"),
    }  # fmt: skip
    for name, (head_dim, scores) in programs.items():
        first = found.get((head_dim, scores, "FlashAttention-3 (fa3-fwd 0.0.3)", "no gate"))
        ours = [found[head_dim, scores, "bsfa", gate] for gate in ("no gate", "0", "0.5", "0.75", "0.9")]
        theirs = "" if first is None else f"{first[0]:.0f} %, {first[1]:.2f} GHz"
        assert row_of(name, theirs, *(f"{pipe:.0f} %, {clock:.2f}" for pipe, clock in ours)) in notes
    product = {key: pipe * clock / 100 for key, (pipe, clock) in found.items()}
    assert f"FA3's {max(product.values()):.2f} at d=256 is the most seen" in notes
    for scores, head_dim, words in (("int8", 128, "int8 scores"), ("exact", 256, "wide heads")):
        own = [each for key, each in product.items() if key[:3] == (head_dim, scores, "bsfa")]
        assert f"{words} ({min(own):.2f} to {max(own):.2f})" in notes
    have = [f"{product[128, 'exact', 'bsfa', gate]:.2f}" for gate in ("0.5", "0.75", "0.9")]
    assert f"{have[0]} (50 %), {have[1]} (75 %) and {have[2]} (90 %) are reached" in notes
    rows = stored("power")["rows"]
    assert all(row["throttle_reasons"].endswith("4") and 1450 <= row["sm_mhz"] <= 1730 for row in rows)


def test_what_is_said_of_short_calls_is_so():
    notes, page = on_one_line("kernels/NOTES.md"), on_one_line("docs/serving.md")
    cells = {(cell["batch"], cell["rows"], cell["keys"]): cell for cell in stored("short-calls")["cells"]}
    times = {place: ms(cell) for place, cell in cells.items()}
    none, gate, other, library, hopper = (
        "bsfa, no gate", "bsfa, gate", "FlashAttention-3", "PyTorch", "bsfa, no gate, hopper"
    )  # fmt: skip

    def words(place: tuple[int, int, int], *names: str) -> list[str]:
        return [f"{times[place][name]:.3f}" if name in times[place] else "" for name in names]

    for rows in {rows for batch, rows, _ in cells if batch == 1}:
        found = [words((1, rows, keys), none, gate, other, library) for keys in (8192, 32768, 131072)]
        assert row_of(str(rows), *(each for columns in found for each in columns)) in notes
    for place in (place for place in cells if place[0] > 1):
        name = f"{place[0]} x {place[1]} of {place[2] // 1024}k"
        assert row_of(name, *words(place, hopper, none, gate, other, library)) in notes
    gated = [cell for cell in cells.values() if cell["skip"] is not None]
    skips = [cell["skip"] for cell in gated]
    assert f"skips {100 * min(skips):.0f} to {100 * max(skips):.0f} %" in notes
    alone = {(rows, keys): each for (batch, rows, keys), each in times.items() if batch == 1}
    assert all(abs(each[none] - each[other]) < 0.002 for (rows, _), each in alone.items() if rows <= 16)
    slower = {rows: [alone[rows, keys][none] / alone[rows, keys][other] for keys in (8192, 32768, 131072)]
              for rows in (64, 256)}  # fmt: skip
    assert {round(each, 1) for each in slower[64]} <= {1.4, 1.5}
    assert f"at 256 {min(slower[256]):.1f} to {max(slower[256]):.1f} times" in notes
    flops = 4 * 32 * 128 * 64 * (131072 - 31.5)
    speeds = [round(flops / alone[64, 131072][name] / 1e9) for name in (none, other)]
    assert f"({speeds[0]} TFLOP/s at 128k, FA3 {speeds[1]})" in notes
    cost = {rows: [alone[rows, keys][gate] / alone[rows, keys][none] for keys in (8192, 32768, 131072)]
            for rows in (64, 128, 192, 256, 512)}  # fmt: skip
    ranges = [f"{min(cost[rows]):.1f} to {max(cost[rows]):.1f}" for rows in (64, 128)]
    assert f"{ranges[0]} times split_kv's time for 64 queries, {ranges[1]} times for 128" in notes
    less = {rows: [f"{100 * (1 - 1 / each):.0f}" for each in cost[rows]] for rows in (192, 256)}
    assert abs(cost[192][0] - 1) < 0.01 and f"takes {less[192][1]} and {less[192][2]} % less at 32k and 128k" in notes
    assert cost[256][0] < 1 and f"split_kv by {less[256][1]} and {less[256][2]} % at 32k and 128k" in notes
    assert max(cost[512]) < 1
    saved = [100 * (1 - alone[512, keys][gate] / alone[512, keys][other]) for keys in (8192, 32768, 131072)]
    assert f"from 512 queries of one sequence ({min(saved):.0f} to {max(saved):.0f} % less time)" in notes
    eight, sixteen = times[8, 128, 8192], times[16, 64, 8192]
    assert f"eight sequences of 128 ({100 * (1 - eight[gate] / eight[other]):.0f} %)" in notes
    assert f"take {sixteen[gate] / sixteen[other]:.1f} times FA3's time" in notes
    gains = [100 * (1 - alone[256, keys][none] / alone[256, keys][hopper]) for keys in (8192, 32768, 131072)]
    assert f"it takes {min(gains):.0f} to {max(gains):.0f} % less than the Hopper kernel without a gate" in notes
    assert {f"{alone[rows, 131072][none]:.2f}" for rows in (1, 8, 16)} == {"0.14"}
    assert {f"{alone[rows, 131072][hopper]:.1f}" for rows in (1, 8, 16)} == {"1.6"}
    longest = alone[64, 131072]
    assert "0.14 ms for up to 16 queries of 131,072 keys" in page and "within 2 us of it, where it took 1.6" in page
    assert f"{longest[none]:.2f} for 64 (FlashAttention-3: {longest[other]:.2f})" in page


def test_what_is_said_of_int8s_errors_is_so():
    page = on_one_line("docs/int8.md")
    data = {
        "normal": "unit-normal",
        "structured": "structured data",
        "offset in K": "K far from zero in two channels",
        "scaled channels in Q and K": "K far from zero in one channel, one of Q 12 times and another of K 10 times "
        "as large",
        "shared outlier channels": "every 16th channel of both 8 times as large",
    }
    found: dict[str, list[str]] = {name: [] for name in data}
    gated: dict[str, list[str]] = {"exact": [], "int8": []}
    cells = stored("int8-errors")["cells"]
    for cell in cells:
        assert cell["length"] == 8192 and set(cell["backends"].values()) == {"hopper"}
        errors = {row["scores"]: row["error"] for row in cell["rows"] if row["skip_target"] == 0}
        found[cell["data"]] += [f"{each:.4f}" for each in (*errors.values(), cell["FlashAttention-3 FP8"]["error"])]
        if cell["data"] == "structured":
            for scores, each in gated.items():
                rows = [row for row in cell["rows"] if row["scores"] == scores and row["skip_target"]]
                assert all(abs(row["skip"] - row["skip_target"]) < 0.01 for row in rows)
                each.append(" ".join(f"{row['error']:.3f}" for row in rows))
    assert [cell["shape"]["head_dim"] for cell in cells] == [128] * 5 + [64] * 5
    for name, words in data.items():
        assert row_of(words, *found[name]) in page
    wide, narrow = zip(*gated.values(), strict=True)
    assert f"errors are {wide[0]} with exact scores and {wide[1]} with int8 ones" in page
    assert f"(d=128; {narrow[0]} and {narrow[1]} at d=64)" in page


def test_what_is_said_of_int8s_preparation_is_so():
    page, notes = on_one_line("docs/int8.md"), on_one_line("kernels/NOTES.md")
    times: dict[int, list[dict[str, float]]] = {128: [], 64: []}
    for cell in json.loads((CHECKS.parent / "int8.nvidia-h200.json").read_text())["cells"]:
        times[cell["shape"]["head_dim"]].append(ms(cell))
    wide, narrow = ([f"{each['int8 preparation']:.3f}" for each in times[head_dim]] for head_dim in (128, 64))
    assert f"takes {wide[0]}, {wide[1]} and {wide[2]} ms of that at d=128" in page
    assert f"(d=64: {narrow[0]}, {narrow[1]} and {narrow[2]})" in page
    assert f"{wide[0]}, {wide[1]} and {wide[2]} ms at 8k, 32k and 128k (d=64: {', '.join(narrow)})" in notes
    shares = {}
    for head_dim, (_, each, _) in times.items():
        names = ["skipping compiled out", *(f"{rate} % skipped" for rate in (0, 50, 75, 90))]
        shares[head_dim] = [f"{100 * each['int8 preparation'] / each[f'bsfa int8, {name}']:.1f}" for name in names]
    open_, none, half, most, nearly = shares[128]
    assert f"{open_} % of the whole without a gate, and with one {none}, {half}, {most} and {nearly} %" in page
    said = f"{open_} % of the attention without a gate, {none} % with one that drops nothing, {most} % at 75 % skipped"
    open_, none, _, most, _ = shares[64]
    assert f"{said}; d=64 {open_}, {none} and {most} %" in notes


def test_what_is_said_of_the_gpu_tests_is_so():
    notes, found = on_one_line("kernels/NOTES.md"), stored("gpu-tests")

    def counts(outcomes: dict) -> dict[str, int]:
        total: dict[str, int] = {}
        for each in outcomes.values():
            for outcome, number in each.items():
                total[outcome] = total.get(outcome, 0) + number
        return total

    passed = counts(found["outcomes"])["passed"]
    assert counts(found["outcomes"]) == {"passed": passed, "failed": 1} and passed + 1 == found["collected"]
    assert ["test_nothing_is_compiled_for_calls_that_come_after_it" in name for name in found["failed"]] == [True]
    words = f"all {found['collected']:,} GPU tests came to their end within {found['seconds']} s: {passed:,} passed"
    assert words in notes
    later = found["later"]
    assert counts(later["outcomes"]) == {"passed": later["collected"]} and not later["failed"]
    words = f"the two tests of warming up and the {later['collected']} of int8 scores and latent attention"
    assert words in notes and "test_warmup.py: 2 passed" in later["command"]


def test_what_the_readme_says_of_few_queries_is_so():
    readme = on_one_line("README.md")
    alone = {(cell["rows"], cell["keys"]): ms(cell) for cell in stored("short-calls")["cells"] if cell["batch"] == 1}
    assert {keys for _, keys in alone} == {8192, 32768, 131072}
    over = {place: each["bsfa, no gate"] / each["FlashAttention-3"] for place, each in alone.items()}
    most = max(abs(share - 1) for (rows, _), share in over.items() if rows <= 16)
    slower = [share for (rows, _), share in over.items() if 64 <= rows <= 256]
    assert f"1 to 16 take FlashAttention-3's time within {100 * most:.0f} %" in readme
    assert f"64 to 256 take {min(slower):.1f} to {max(slower):.1f} times it" in readme
    ahead = [each["bsfa, gate"] < each["FlashAttention-3"] for (rows, _), each in alone.items() if rows == 512]
    assert ahead == [True] * 3 and "at 512 a gate that skips 75 % is ahead of it" in readme


def test_what_is_said_of_start_up_is_so():
    page, found = on_one_line("docs/developing.md"), stored("start-up")
    assert found["length"] == 4096 and all(len(commit) == 40 for commit in found["trees"].values())
    runs = {(run["tree"], run["command"], run["cache"]): run for run in found["runs"]}
    less, packages = {}, {}
    for command in ("calibrate", "verify", "export"):
        before, now = runs["before", command, "warm"], runs["now", command, "warm"]
        packages[command] = sum(took for name, took in now["packages"].items() if not name.startswith("bsfa"))
        values = before["wall_s"], now["wall_s"], packages[command], now["phases"]["the work itself"]
        assert row_of(f"`{command}`", *(f"{value:.1f}" for value in values)) in page
        less[command] = f"{100 * (1 - now['wall_s'] / before['wall_s']):.0f} %"
        assert packages[command] > before["wall_s"] / 2  # so halving was out of reach
    words = f"`calibrate` takes {less['calibrate']} less, `verify` {less['verify']}, `export` {less['export']}"
    assert f"Halving was asked for and not reached there: {words}." in page
    before, now = runs["before", "calibrate", "warm"], runs["now", "calibrate", "warm"]
    took, phases = now["packages"], now["phases"]
    more = took["torch, more of it"]
    assert f"Of `calibrate`'s {packages['calibrate']:.1f} s torch has {took['torch'] + more:.1f}, of which" in page
    assert f"{more:.1f} for parts that transformers imports" in page
    assert f"transformers {took['transformers']:.1f}, and sympy {took['sympy']:.1f}, which" in page
    reading = sum(seconds for phase, seconds in phases.items() if phase.startswith(("weights", "tokenizer", "config")))
    end = phases["interpreter: end"]
    assert (
        f"take {phases['import: ours']:.1f} s, reading the model with its checks and fingerprint {reading:.1f}, "
        in page
    )
    assert f"the end of the process {end:.1f}." in page
    assert f"with {before['phases']['interpreter: end'] - end:.1f} s less at the end alone" in page
    assert {"scipy", "pandas"} <= set(before["packages"]) and not {"sklearn", "scipy", "pandas"} & set(took)
    before, now = runs["before", "calibrate", "cold"], runs["now", "calibrate", "cold"]
    work = now["phases"]["the work itself"]
    assert (
        f"`calibrate` takes {now['wall_s']:.1f} s, where it took {before['wall_s']:.1f}: the work is {work:.1f} s"
        in page
    )
    assert not now["kernels"]
