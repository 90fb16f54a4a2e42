"""bsfa compare: what every method computes and loses, how methods are matched, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from bsfa_kernels import TileShape, block_sparse_attention, split_kv
from bsfa_kernels.selection import METHODS, density, select
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds
from one_round import one_round

from bsfa_cli.comparison import calibration, matching, measure, methods, quality, run, tensors
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.timing.plan import Shape

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_round")]

CPU, TILE = torch.device("cpu"), TileShape()
SHAPE = Shape("structured", 2, 1, 64)


@pytest.fixture(scope="module")
def source():
    return tensors.StructuredSource(SHAPE, 896, 2, 0, CPU, torch.float32)


@pytest.fixture(scope="module")
def cell(source):
    with one_round():
        return run.cell(source, source, "all", TILE, CPU, 0.001, 0)


def rows_of(cell, method):
    return [row for row in cell["rows"] if row["method"] == method]


def test_every_method_is_there_or_says_why_not(cell):
    asked = {
        *METHODS,
        "pbs",
        "blasst",
        "bsfa",
        "bsfa_top_k",
        methods.INT8,
        *(name + methods.GATE for name in methods.ON_TOP),
        "dense",
    }
    assert set(matching.by_method(cell["rows"])) == asked - {"global_attention"}
    assert cell["left_out"] == {"global_attention": "not defined for causal attention"}
    for name, own in matching.by_method(cell["rows"]).items():
        absent = [entry for entry in cell["unavailable"] if entry["name"].startswith(f"{name} at ")]
        assert name == "dense" or len(own) + len(absent) >= 5
    assert {entry["reason"] for entry in cell["unavailable"]} <= {"not asked for"}
    json.dumps(cell, allow_nan=False)


def test_density_is_what_the_mask_says(cell, source):
    settings = dict(causal=True, tile=TILE)
    # The kernel keeps key tile 0 whether a method lists it or not.
    expected = []
    for layer in source.layers("measured"):
        mask = select("pooled_top_p", layer.q, layer.k, scale=layer.scale, coverage=0.7, **settings).clone()
        mask[..., 0] = True
        expected.append(density(mask, **settings).mean())
    (row,) = [row for row in rows_of(cell, "pooled_top_p") if row["setting"] == 0.7]
    assert row["density"] == pytest.approx(float(sum(expected) / 2), abs=1e-6)
    assert row["visited"] == row["density"] == row["flop_density"]
    (gated,) = [row for row in rows_of(cell, "bsfa") if row["setting"] == 0.3]
    assert gated["visited"] == 1 and gated["flop_density"] == pytest.approx((1 + gated["density"]) / 2)


def test_errors_and_masses_are_those_of_the_outputs(source):
    layer = next(source.layers("measured"))
    method = methods.available(None)["sliding_window"]
    options = dict(scale=layer.scale, causal=True, tile=TILE)
    choice = method.choose("", layer.q, layer.k, layer.v, setting=512, **options)
    found = quality.Quality()
    exact = block_sparse_attention(layer.q, layer.k, layer.v, return_lse=True, **options)
    result = methods.attend(layer.q, choice, return_lse=True, **options)
    found.add(layer, result, exact, TILE, True)
    s = layer.q.double() @ layer.k.double().repeat_interleave(2, 1).mT * layer.scale
    s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    keep = choice.options["blocks"]
    mask = torch.zeros(s.shape[-2] // 64, s.shape[-1] // 128, dtype=torch.bool)
    for t in range(len(mask)):
        listed = keep.indices[0, 0, t, : keep.counts[0, 0, t]].long()
        mask[t, listed[listed >= 0]] = True
    mask[:, 0] = True
    recall = (s.softmax(-1) * mask.repeat_interleave(64, 0).repeat_interleave(128, 1)).sum(-1)
    summary = found.summary()
    assert summary["recall"]["mean"] == pytest.approx(float(recall.mean()), abs=1e-4)
    assert summary["recall"]["worst"] == pytest.approx(float(recall.min()), abs=1e-4)
    assert summary["needle"]["mean"] == pytest.approx(float(recall[..., layer.planted.question :].mean()), abs=1e-4)
    expected = float((result.out - exact.out).norm() / exact.out.norm())
    assert summary["error"] == pytest.approx(expected, rel=1e-3)


def test_a_static_window_loses_the_needle_and_what_reads_scores_does_not(cell):
    """The failure a comparison must be able to show."""
    sparse = rows_of(cell, "sliding_window")[0]
    assert sparse["density"] < 1 and sparse["needle"]["mean"] < 0.01 and sparse["recall"]["worst"] < 0.01
    assert rows_of(cell, "bsfa")[0]["needle"]["worst"] > 0.9
    assert rows_of(cell, "dense")[0]["needle"]["worst"] > 0.999


def test_settings_that_select_everything_or_nothing_are_named(source):
    everything = rows_of(run.cell(source, None, "sliding_window", TILE, CPU, 0.001, 0), "sliding_window")[-1]
    assert everything["note"] == "selects everything" and everything["density"] == 1
    nothing = quality.Quality(everything=10, least=3, visited=10, kept=3, masses=[_masses()])
    assert nothing.summary()["note"] == "selects nothing beyond what is forced"


def _masses():
    from bsfa_cli.verification.layers import DroppedMass

    mass = DroppedMass(1, CPU)
    mass.add(torch.zeros(1, 4))
    return mass


def test_thresholds_come_from_another_text_with_the_same_heads(source):
    first, second = (next(source.layers(purpose)) for purpose in ("measured", "calibrated"))
    assert first.planted.needle != second.planted.needle and not torch.equal(first.q, second.q)
    fitted = calibration.Calibration.on_tensors(source.layers("calibrated"), TILE, (8,), "another sample")
    gate = fitted.gate("layer 1", "target-skip", 0.3, 16, "cpu")
    assert gate is fitted.gate("layer 1", "target-skip", 0.3, 16, "cpu")
    kept = candidates = 0
    for layer in source.layers("measured"):
        gate = fitted.gate(layer.name, "target-skip", 0.3, 16, "cpu")
        result = block_sparse_attention(layer.q, layer.k, layer.v, gate, return_counts=True)
        kept, candidates = kept + int(result.kept.sum()), candidates + int(result.candidates.sum())
    assert 0.15 < 1 - kept / candidates < 0.45
    with pytest.raises(InputError, match="no thresholds for elsewhere"):
        fitted.gate("elsewhere", "target-skip", 0.3, 16, "cpu")


def test_an_artifacts_points_for_a_skip_rate_are_bsfas_whatever_shared_them_out():
    recipes = (("kl-skip", 0.2), ("mass-skip", 0.2), ("mass-skip", 0.5), ("target-skip", 0.7), ("kl-skip", 0.7))
    points = tuple(Point(f"{recipe}-{rate:g}", "gap", recipe, rate) for recipe, rate in recipes)
    values = -torch.arange(1.0, 6)[:, None, None].expand(5, 2, 1)
    identity = dict.fromkeys(MODEL_KEYS, "a")
    stored = calibration.Exported(Thresholds(identity, TILE, True, (0,), points, {"layer": values}), "a file")
    assert stored.skips == (0.7, 0.5, 0.2) and not stored.top_k
    taken = [float(stored.gate("layer", "target-skip", rate, 1, CPU).gap[0, 0]) for rate in (0.2, 0.5, 0.7)]
    assert taken == [-1, -3, -4]  # by KL before by mass, and what was asked for as "target-skip" before both


def test_settings_replace_a_sweep_and_other_fields_are_in_the_name(source):
    asked = methods.Settings.parse(["xattention=0.9,0.8", "xattention.stride=16", "bsfa=0.25,0.35", "bsfa_top_k=3"])
    names = "xattention,xattention+bsfa,bsfa,bsfa_top_k,blasst"
    found = run.cell(source, source, names, TILE, CPU, 0.001, 0, settings=asked)
    swept = {}
    for row in found["rows"]:
        swept.setdefault(row["method"], []).append(row["setting"])
        assert not (row["published"] and "stride" in row["method"])
    assert swept["xattention(stride 16)"] == [0.8, 0.9] and swept["bsfa"] == [0.35, 0.25] and swept["bsfa_top_k"] == [3]
    assert swept["blasst"] == list(methods.FACTORS) and len(swept["xattention(stride 16)+bsfa"]) >= 2
    layer, options = next(source.layers("measured")), dict(causal=True, tile=TILE)
    (row,) = [row for row in found["rows"] if row["method"] == "xattention(stride 16)" and row["setting"] == 0.9]
    mask = select("xattention", layer.q, layer.k, scale=layer.scale, coverage=0.9, stride=16, **options)
    assert row["layers"][0]["density"] == pytest.approx(float(density(mask, **options).mean()), abs=1e-6)


def test_captured_layers_are_cut_to_the_length_that_is_asked_for(tmp_path):
    q, k, v = (torch.randn(1, heads, 512, 64) for heads in (4, 2, 2))
    layers = {"a": tensors.Captured(q, k, v, 0.125, True)}
    path = tmp_path / "c.safetensors"
    path.write_bytes(tensors.pack(layers, {"model": "m", "label": None, "data": "d", "seed": 0}))
    (layer,) = tensors.CapturedSource(path, CPU, 384).layers("measured")
    assert torch.equal(layer.q, q[:, :, :384]) and torch.equal(layer.v, v[:, :, :384])
    with pytest.raises(UsageError, match="holds 512 tokens, 513 were asked for"):
        tensors.CapturedSource(path, CPU, 513)
    assert [tensors.CapturedSource(path, CPU, n, or_all=True).length for n in (384, 513, None)] == [384, 512, 512]


def test_times_are_summed_over_layers_and_selection_is_counted(source):
    chosen, _ = methods.chosen("blasst,xattention", None, True)
    bench = measure.Bench(chosen, TILE, CPU, 0.001, 0)
    for layer in source.layers("measured"):
        bench.add(layer)
    result = bench.result()
    for row in result["rows"]:
        assert row["total_ms"] == row["selection_ms"] + row["attention_ms"]
        assert len(row["samples_ms"]["attention"]) == 2 and len(row["layers"]) == 2
        assert (row["selection_ms"] > 0) == (row["method"] == "xattention")
    assert result["fastest_dense_ms"] == min(entry["ms_median"] for entry in result["dense"])


def test_matching_reads_between_a_methods_own_settings():
    rows = [{"method": "a", "total_ms": x, "recall": {"mean": y}} for x, y in ((4.0, 0.5), (8.0, 0.9), (16.0, 1.0))] + [
        {"method": "b", "total_ms": 10.0, "recall": {"mean": 0.7}},
        {"method": "c", "total_ms": 1.0, "recall": None},
    ]
    table = matching.matched(rows, "total_ms", (2.0, 6.0, 8.0, 12.0, 20.0), "recall.mean")
    assert table["a"] == [None, pytest.approx(0.7), 0.9, pytest.approx(0.95), 1.0]
    assert table["b"] == [None, None, None, 0.7, 0.7] and table["c"] == [None] * 5
    assert matching.best(table, 3, True) == ["a"] and matching.best(table, 0, True) == []
    assert matching.best(table, 3, False) == ["b"]
    told = matching.verdicts(table, ["one", "two", "three", "four"], True, own="b")
    assert told[0] == "one: no method gets there"
    assert told[2] == "three: a (0.9000); b does not get there"
    assert told[3] == "four: a (0.9500); b is number 2 of 2 (0.7000)"


def test_accuracies_that_the_questions_cannot_tell_apart_are_named_together():
    table = {"dense": [1.0], "a": [0.95], "b": [0.9], "bsfa": [0.8], "d": [0.3]}
    assert matching.best(table, 0, True) == ["a"]
    assert matching.best(table, 0, True, asked=20) == ["a", "b", "bsfa"]
    (told,) = matching.verdicts(table, ["x"], True, asked=20)
    assert told == "x: a and b and bsfa (0.9500 to 0.8000, not told apart by 20 questions)"
    (told,) = matching.verdicts(table, ["x"], True, asked=100)
    assert told == "x: a and b (0.9500 to 0.9000, not told apart by 100 questions); bsfa is number 3 of 4 (0.8000)"
    tasks = {"multi-key": {"questions": 20}, "records": {"questions": 4}}
    cell = {"rows": [{"accuracy": None}, {"accuracy": {"tasks": tasks}}]}
    assert matching.questions(cell, matching.ACCURACY) == 24 and matching.questions(cell, "error") is None


@pytest.mark.parametrize(
    "points, expected",
    [([(8192, 0.9), (16384, 0.5)], (8192, "8,192 or less")), ([(1, 2.0), (16384, 1.5)], (None, "slower up to 16,384")),
     ([(1024, 1.5), (4096, 0.5)], (2048, "2,048")), ([(1024, 0.8), (2048, 1.2), (8192, 0.8)], (4096, "4,096")),
     ([], (None, "not measured"))],
)  # fmt: skip
def test_break_even_length(points, expected):
    assert matching.break_even(points) == expected


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("--methods", "magic"), 2, "no method 'magic'; there is all or dense, sliding_window"),
        (("--length", "8k"), 2, "whole numbers separated by commas"),
        (("--length", "0"), 2, "positive"),
        (("--length", "32"), 2, "at least 64 tokens"),
        (("--heads", "3", "--kv-heads", "2"), 2, "multiple of kv_heads"),
        (("--tile", "8x8"), 2, "64x128 or 128x64"),
        (("--seconds", "0"), 2, "--seconds must be positive"),
        (("--calibrate-on", "a.safetensors"), 2, "belongs to --captured"),
        (("--captured", "/nonexistent/a.safetensors"), 4, "cannot read"),
        (("--output", "/proc/nowhere/a.json"), 2, "cannot write"),
        (("--data", "a.txt"), 2, "--data means nothing on structured layers"),
        (("--captured", "a", "--heads", "4"), 2, "--heads means nothing on captured layers"),
        (("bundled", "--layers", "2"), 2, "--layers means nothing inside a model"),
        (("bundled", "--data", "a.txt"), 4, "a.txt does not exist"),
        (("bundled", "--tasks", "poems"), 2, "no task 'poems'"),
        (("--setting", "magic=1"), 2, "no method 'magic' with a setting; there is sliding_window"),
        (("--setting", "dense=1"), 2, "no method 'dense' with a setting"),
        (("--setting", "xattention"), 2, "takes numbers separated by commas"),
        (("--setting", "xattention=2"), 2, "coverage must lie in [0, 1], got 2"),
        (("--setting", "xattention.size=2"), 2, "xattention has one of coverage, stride, block, chunk"),
        (("--setting", "xattention.stride=7"), 2, "multiple of stride"),
        (("--setting", "blasst.stride=7"), 2, "blasst has none but its knob"),
        (("--setting", "blasst=0"), 2, "blasst takes positive factors"),
        (("--setting", "bsfa=1.5"), 2, "skip rates between 0 and 1"),
        (("--setting", "bsfa_top_k=2.5"), 2, "whole numbers"),
        (("--methods", "blasst", "--setting", "xattention=0.9"), 2, "xattention, which --methods leaves out"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(run, one_sentence, arguments, code, words):
    one_sentence(run("compare", *arguments, "--device", "cpu"), code, words)


def test_the_command_writes_what_it_shows(run, tmp_path):
    path = tmp_path / "result.json"
    options = ("--length", "512,1024", "--heads", "2", "--head-dim", "32", "--seconds", "0.001", "--device", "cpu")
    picture = tmp_path / "plot.svg"
    done = run("compare", *options, "--methods", "sliding_window,xattention", "-o", path, "--plot", picture, "--json")
    assert done.code == 0 and picture.read_text().startswith("<svg")
    stored = json.loads(done.out)
    assert stored == json.loads(path.read_text()) and stored["complete"]
    assert [cell["length"] for cell in stored["cells"]] == [512, 1024]
    assert stored["cells"][0]["label"] == "synthetic, structured"
    assert "no slower than the fastest" in done.err and "at equal density" in done.err


def test_a_method_that_cannot_take_part_is_left_out_of_all_and_refused_by_name():
    chosen, left_out = methods.chosen("all", None, True)
    assert [method.name for method in chosen][:2] == ["dense", "sliding_window"]
    assert left_out["bsfa"] == left_out["pbs+bsfa"] == "no calibration for its thresholds"
    assert left_out["global_attention"] == "not defined for causal attention"
    with pytest.raises(UsageError, match="--methods bsfa: no calibration"):
        methods.chosen("bsfa,pbs", None, True)
    with pytest.raises(UsageError, match="--methods pbs: not defined for non-causal"):
        methods.chosen("sliding_window,pbs", None, False)
    with pytest.raises(UsageError, match="there is no method"):
        methods.chosen("pbs,", None, True)


def test_every_tile_is_kept_by_the_kernel_that_drops_some(source, monkeypatch):
    """Where few heads leave a GPU idle, "auto" gives a call without a gate to split_kv: other rounding, other times."""

    def unsupported(request):
        gated = request.gate.absolute is not None or request.gate.gap is not None
        return "tiles are dropped or counted" if gated or request.blocks or request.want_counts else None

    def attention(request):
        raise AssertionError("served by another kernel")

    monkeypatch.setattr(split_kv, "suits", lambda request: True)
    monkeypatch.setattr(split_kv, "unsupported", unsupported)
    monkeypatch.setattr(split_kv, "attention", attention)
    found = run.cell(source, None, "dense,sliding_window", TILE, CPU, 0.001, 0)
    assert {row["backend"] for row in found["rows"]} == {"torch"} and rows_of(found, "dense")[0]["error"] == 0


@pytest.mark.gpu
def test_every_method_runs_on_the_gpu_and_agrees_with_the_cpu():
    wide = Shape("structured", 4, 2, 128)
    found = {}
    for device, dtype in ((torch.device("cuda"), torch.bfloat16), (CPU, torch.float32)):
        source = tensors.StructuredSource(wide, 2048, 1, 0, device, dtype)
        found[device.type] = run.cell(source, source, "all", TILE, device, 0.001, 0)
    cuda = {(row["method"], row["setting"]): row for row in found["cuda"]["rows"]}
    assert found["cuda"]["fastest_dense"] in ("cuDNN", *(f"FlashAttention-{n}" for n in (2, 3, 4)))
    assert all(row["finite"] and row["backend"] in ("hopper", "triton") for row in cuda.values())
    for row in found["cpu"]["rows"]:
        other = cuda.get((row["method"], row["setting"]))
        # Noise and rounding differ between devices, what is planted does not.
        if other is not None:
            assert other["density"] == pytest.approx(row["density"], abs=0.15)
    assert cuda["sliding_window", 512]["needle"]["mean"] < 0.01 < 0.9 < cuda["bsfa", 0.3]["needle"]["mean"]
    assert cuda["dense", 1.0]["error"] < 1e-6
