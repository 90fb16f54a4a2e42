"""bsfa profile: what is measured, how it is summed up, and what is refused."""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time

import pytest
import torch
from bsfa_kernels import TileShape, block_sparse_attention

from bsfa_cli import app as cli
from bsfa_cli import structured
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.timing import baselines, compare, flash_attention, interleave, plan, skip_softmax, sweep, thresholds
from bsfa_cli.timing.lead import MARGIN, Lead

pytestmark = pytest.mark.usefixtures("random_model")

CPU = torch.device("cpu")
SMALL = (
    "--lengths",
    "512",
    "--skip",
    "0.5",
    "--heads",
    "2",
    "--head-dim",
    "32",
    "--seconds",
    "0.01",
    "--device",
    "cpu",
)


@pytest.fixture
def profile(run):
    return lambda *arguments: run("profile", *arguments)


@pytest.fixture(scope="module")
def cell():
    small = plan.Plan("small", (plan.Shape("text", 4, 2, 32),), (640,), (0.5,), tile="64x64")
    return sweep.cell(small, small.shapes[0], 640, CPU, seconds=0.01)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A small result of the command itself."""
    path = tmp_path_factory.mktemp("profile") / "stored.json"
    argv, sys.argv = sys.argv, ["bsfa", "profile", *SMALL, "-o", str(path), "--plot", str(path.with_suffix(".svg"))]
    try:
        assert cli.run() == 0
    finally:
        sys.argv = argv
    return path


def test_a_cell_measures_every_contender_and_says_what_is_missing(cell):
    rows = {row["name"]: row for row in cell["contenders"]}
    assert {sweep.OPEN, sweep.ZERO, "bsfa, 50 % skipped", "PyTorch's CPU flash attention", "math"} == set(rows)
    assert cell["unavailable"] == [{"name": "FlexAttention", "reason": "timed on CUDA only"}]
    assert len({len(row["samples_ms"]) for row in rows.values()}) == 1
    for row in rows.values():
        assert len(row["samples_ms"]) >= 5
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert cell["backend"] == "torch" and set(cell["passed_over"]) == {"hopper", "triton"}
    assert cell["fastest_dense"] in baselines.CPU_SDPA
    assert rows[cell["fastest_dense"]]["speedup"] == 1
    assert cell["error_at_zero"] < 1e-6
    assert "synthetic" in cell["data"]
    json.dumps(cell, allow_nan=False)


def test_reached_skip_rate_is_counted_not_assumed(cell):
    rows = {row["skip_target"]: row for row in cell["contenders"] if row["kind"] == "bsfa"}
    # 10 query tiles of 64 see 1..10 key tiles; the diagonal and, from the second on, the sink are no candidates.
    candidates = 4 * sum(range(9))
    assert rows[0.5]["candidates"] == candidates
    assert rows[0.0]["skip"] == 0 and rows[0.0]["kept_share"] == 1
    dropped = rows[0.5]["skip"] * candidates
    assert rows[0.5]["kept_share"] == pytest.approx(1 - dropped / (4 * 55))
    assert rows[0.5]["bound"] == pytest.approx(2 / (1 + rows[0.5]["kept_share"]))
    assert rows[0.5]["skip"] == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("gate", plan.GATES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("skip", [0.25, 0.75])
@pytest.mark.parametrize("shared", [False, True])
def test_thresholds_reach_the_rate_they_were_asked_for(gate, causal, skip, shared):
    q, k, v = (torch.randn(1, heads, 1000, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    options = {"causal": causal, "tile": TileShape(64, 32), "backend": "torch"}
    fitted = thresholds.Fit(gate, q, k, v, shared=shared, **options).reach(skip)
    result = block_sparse_attention(q, k, v, fitted, return_counts=True, **options)
    reached = 1 - result.kept.sum() / result.candidates.sum()
    assert reached == pytest.approx(skip, abs=0.02)
    assert result.out.isfinite().all()
    by_head = 1 - result.kept.sum((0, 2)) / result.candidates.sum((0, 2))
    assert shared or by_head == pytest.approx(torch.full((4,), skip), abs=0.03)


def test_one_threshold_for_all_lets_heads_of_structured_data_differ():
    q, k, v, _ = structured.generate(heads=8, kv_heads=2, length=2048, head_dim=32)
    options = {"causal": True, "tile": TileShape(64, 64), "backend": "torch"}
    gate = thresholds.Fit("gap", q, k, v, shared=True, **options).reach(0.6)
    assert gate.gap.unique().numel() == 1
    result = block_sparse_attention(q, k, v, gate, return_counts=True, **options)
    by_head = 1 - result.kept.sum((0, 2)) / result.candidates.sum((0, 2))
    assert 1 - result.kept.sum() / result.candidates.sum() == pytest.approx(0.6, abs=0.02)
    assert by_head.max() - by_head.min() > 0.25


@pytest.mark.parametrize("length", [64, 128, 512, 700])
def test_the_causal_block_mask_is_the_one_that_pytorch_would_compile(length):
    from torch.nn.attention.flex_attention import create_block_mask

    ours = baselines.causal_block_mask(length, CPU)
    theirs = create_block_mask(baselines._causal, None, None, length, length, device="cpu")
    assert (ours.shape, ours.BLOCK_SIZE, ours.sparsity()) == (theirs.shape, theirs.BLOCK_SIZE, theirs.sparsity())
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(counts, expected)
        for row, count in enumerate(expected[0, 0].tolist()):
            indices, wanted = (getattr(mask, f"{kind}_indices")[0, 0, row, :count] for mask in (ours, theirs))
            assert torch.equal(indices, wanted)


def test_a_profile_names_its_baselines():
    small = plan.Plan("small", (plan.Shape("text", 2, 1, 32),), (256,), (), baselines=("math",))
    cell = sweep.cell(small, small.shapes[0], 256, CPU, seconds=0.01)
    assert [row["name"] for row in cell["contenders"] if row["kind"] == "dense"] == ["math"]
    assert {entry["reason"] for entry in cell["unavailable"]} == {"not asked for"}
    q = torch.zeros(1, 1, 4, 8)
    installed = {*flash_attention.MODULES, flash_attention.FA3_FP8, skip_softmax.NAME}
    assert {*baselines.SDPA, *baselines.dense(q, q, q, True), *installed} == set(plan.BASELINES)


def test_structured_data_are_used_labelled_and_kept_apart():
    mixed = plan.Plan(
        "mixed", (plan.Shape("a", 2, 1, 32), plan.Shape("a", 2, 1, 32, data="structured")), (512,), (0.5,)
    )
    cells = [sweep.cell(mixed, shape, length, CPU, seconds=0.01) for shape, length in mixed.cells()]
    assert [cell["data"].split(";")[0] for cell in cells] == ["synthetic, unit normal", "synthetic, structured"]
    assert cells[0]["shape"] == cells[1]["shape"]
    half = next(row for row in cells[1]["contenders"] if row["skip_target"] == 0.5)
    assert half["skip"] == pytest.approx(0.5, abs=0.15)
    stored, result = ({"cells": cells[:1]}, {"cells": cells})
    assert {row["cell"] for row in compare.changes(stored, result)} == {"a 512, synthetic, unit normal"}
    assert mixed.with_flags(data="structured").cells()[0][0].data is None
    narrow = plan.Plan("narrow", (plan.Shape("a", 2, 1, 8),), (512,), (), data="structured")
    with pytest.raises(UsageError, match="shape a: structured data need"):
        sweep.cell(narrow, narrow.shapes[0], 512, CPU, seconds=0.01)


def timing(ms: float) -> interleave.Timing:
    return interleave.Timing([ms, ms, ms])


def test_summary_speedup_bound_and_suspicion():
    rows = [
        {"name": "cuDNN", "kind": "dense", "skip_target": None},
        {"name": "FlashAttention-2", "kind": "dense", "skip_target": None},
        {"name": sweep.OPEN, "kind": "bsfa", "skip_target": None, "skip": 0.0, "kept_share": 1.0},
        {"name": sweep.ZERO, "kind": "bsfa", "skip_target": 0.0, "skip": 0.0, "kept_share": 1.0},
        {"name": "half", "kind": "bsfa", "skip_target": 0.5, "skip": 0.5, "kept_share": 0.5},
        {"name": "most", "kind": "bsfa", "skip_target": 0.9, "skip": 0.9, "kept_share": 0.1},
    ]
    times = (10.0, 20.0, 10.0, 11.0, 9.0, 5.0)
    timings = {row["name"]: timing(ms) for row, ms in zip(rows, times, strict=True)}
    result = sweep.summarise(rows, timings, flops=10**12)
    by_name = {row["name"]: row for row in result["contenders"]}
    assert result["fastest_dense"] == "cuDNN"
    assert result["overhead_at_zero"] == pytest.approx(0.1) == result["gate_overhead"]
    assert result["break_even_skip"] == pytest.approx(0.25)
    assert by_name["half"]["speedup"] == pytest.approx(10 / 9)
    assert by_name["half"]["bound"] == pytest.approx(2 / 1.5) and not by_name["half"]["suspect"]
    assert by_name["most"]["speedup"] == 2 and by_name["most"]["suspect"]
    assert by_name["cuDNN"]["tflops_dense_equivalent"] == pytest.approx(100)
    assert by_name["half"]["tflops_executed"] == pytest.approx(1e12 * 0.75 / 9 / 1e9)


@pytest.mark.parametrize(
    "points, dense, expected",
    [([(0, 9), (0.5, 6)], 10, 0), ([(0, 12), (0.5, 8)], 10, 0.25), ([(0, 12), (0.5, 11)], 10, None),
     ([(0, 12)], None, None)],
)  # fmt: skip
def test_break_even(points, dense, expected):
    assert sweep.break_even(points, dense) == expected


def test_contenders_take_turns_and_setup_is_not_timed():
    calls, prepared = [], []

    def contender(name):
        return interleave.Contender(name, lambda: calls.append(name), lambda: prepared.append(name))

    timings = interleave.measure([contender(name) for name in "abc"], CPU, seconds=0, at_least=7)
    assert {len(entry.samples_ms) for entry in timings.values()} == {7}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7 + interleave.WARM_UP
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert prepared == calls


def test_a_lead_is_the_shortest_launch():
    lead = Lead()
    for seconds in (0.02, 0.0, 0.01):
        with lead.launching():
            time.sleep(seconds)
    assert 0 <= lead.launch_ms < 10


def test_a_baseline_that_fails_leaves_its_reason():
    import warnings

    def broken():
        warnings.warn("needs another GPU", stacklevel=1)
        raise RuntimeError("No available kernel.\nmore")

    assert interleave.first_call(broken, CPU) == (None, "No available kernel.; needs another GPU")


def test_quantiles_lie_between_samples():
    entry = interleave.Timing([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (entry.median, entry.quantile(0), entry.quantile(0.2), entry.quantile(1)) == (3.0, 1.0, 1.8, 5.0)


@pytest.mark.parametrize("name", plan.available())
def test_bundled_profiles_load(name):
    loaded = plan.load(name)
    assert loaded.cells() and all(shape.heads % shape.kv_heads == 0 for shape in loaded.shapes)


def test_every_profile_of_the_repository_is_bundled():
    assert {"llama-3.1-8b", "qwen3-30b-a3b", "qwen2.5-vl-7b", "tiny"} <= set(plan.available())


def test_head_flags_make_one_shape_of_their_own():
    changed = plan.load("qwen2.5-vl-7b").with_flags(heads=8, causal=False, skip=(0.3,))
    assert [(s.name, s.heads, s.kv_heads, s.head_dim, s.causal) for s in changed.shapes] == [
        ("custom", 8, 8, 128, False)
    ]
    assert changed.skip == (0.3,)
    lengths = plan.load("qwen2.5-vl-7b").with_flags(lengths=(1024,)).cells()
    assert [length for _, length in lengths] == [1024, 1024]


@pytest.mark.parametrize(
    "content, words",
    [
        ("shapes: []\nlengths: [1]\nskip: []\n", "has no shapes"),
        ("shape: []\n", "unknown key 'shape'; known keys: shapes"),
        ("lengths: [1]\nskip: []\n", "'shapes' must be a list"),
        ("shapes: [{name: a, heads: 2}]\nlengths: [1]\nskip: []\n", "missing kv_heads, head_dim"),
        ("shapes: [{name: a, heads: 3, kv_heads: 2, head_dim: 8}]\nlengths: [1]\nskip: []\n", "multiple of"),
        ("shapes: [{name: a, heads: 2, kv_heads: 2, head_dim: 8}]\nlengths: 5\nskip: []\n", "'lengths' must be a list"),
        ("shapes: [{name: a, heads: 2, kv_heads: 2, head_dim: 8}]\nlengths: [1]\nskip: [2]\n", "between 0 and 1"),
        ("shapes: [{name: a, heads: 2, kv_heads: 2, head_dim: 8, data: odd}]\n", "data must be one of normal, struct"),
        (
            "shapes: [{name: a, heads: 2, kv_heads: 2, head_dim: 8}]\nlengths: [1]\nskip: []\nbaselines: math\n",
            "'baselines' must be a list",
        ),
        ("a: [\n", "is not YAML"),
        ("- 1\n", "expected a mapping"),
    ],
)
def test_a_bad_profile_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=words) as refused:
        plan.load(str(path))
    assert "mine.yaml" in str(refused.value) or "mine" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--profile", "nope"), "no profile 'nope'"),
        (("--profile", "nope", "--end-to-end", "bsfa/retrieval-llama"), "no profile 'nope'"),
        (("--profile", ""), "no profile ''"),
        (("--profile", "/nonexistent/x.yaml"), "cannot read profile"),
        (("--profile", "tiny.yaml"), "; the bundled one is 'tiny', without a suffix"),
        (("--end-to-end", "bsfa/retrieval-llama", "--point", "p"), "--point names an operating point of --thresholds"),
        (("--lengths", "1k"), "--lengths takes numbers"),
        (("--lengths", "0"), "positive whole numbers"),
        (("--skip", "1.5"), "between 0 and 1"),
        (("--heads", "3", "--kv-heads", "2"), "multiple of kv_heads"),
        (("--gate", "sharp"), "gate must be one of"),
        (("--baselines", "cuDNN,cudnn"), "baselines must be among"),
        (("--synthetic", "real"), "data must be one of normal, structured"),
        (("--tile", "64"), "ROWSxKEYS"),
        (("--backend", "magic"), "backend must be auto or one of"),
        (("--fail-under", "0.9"), "--baseline"),
        (("--point", "p"), "--end-to-end"),
        (("--seconds", "0"), "--seconds must be positive"),
        (("--output", "/proc/nowhere/x.json"), "cannot write"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(profile, arguments, words):
    result = profile(*arguments)
    assert result.code == 2 and result.out == ""
    assert len(result.err.splitlines()) == 1 and words in result.err


def test_a_demanded_backend_that_cannot_serve_ends_with_3(profile):
    result = profile(*SMALL, "--backend", "triton")
    assert result.code == 3
    assert "no bsfa kernel ran" in result.err.splitlines()[-1] and "needs a CUDA device" in result.err


def test_the_stored_result_carries_versions_seed_and_raw_samples(stored):
    result = compare.read(stored)
    assert result["complete"] and result["seed"] == 0 and result["device"]
    assert result["environment"]["torch"] == torch.__version__
    assert result["ceiling"]["tflops"] > 0
    assert all(row["samples_ms"] for row in result["cells"][0]["contenders"])
    assert stored.with_suffix(".svg").read_text().startswith("<svg")


def test_plots_are_svg_or_png_and_refused_early_where_they_cannot_be_drawn(profile, tmp_path, monkeypatch):
    refused = profile(*SMALL, "--plot", str(tmp_path / "plot.pdf"))
    assert refused.code == 2 and "an .svg or a .png file" in refused.err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused = profile(*SMALL, "--plot", str(tmp_path / "plot.svg"))
    assert refused.code == 3 and refused.err.count("\n") == 1 and "pip install 'bsfa[plots]'" in refused.err
    assert not list(tmp_path.iterdir())


def test_json_alone_goes_to_stdout(profile):
    result = profile(*SMALL, "--json")
    assert result.code == 0
    assert json.loads(result.out)["cells"][0]["length"] == 512


def test_comparison_passes_and_fails_by_the_ratio(profile, stored, tmp_path):
    for factor, code in ((1e6, 0), (1e-6, 1)):
        changed = compare.read(stored)
        for row in changed["cells"][0]["contenders"]:
            row["ms_median"] *= factor
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(changed))
        result = profile(*SMALL, "--baseline", path, "--fail-under", "0.9")
        assert result.code == code
    assert "asked for 0.9" in result.err.splitlines()[-1]


@pytest.mark.parametrize("key", ["gpu", "driver", "torch", "triton", "cudnn"])
def test_another_machine_or_version_is_refused(stored, key):
    result = compare.read(stored)
    other = copy.deepcopy(result["environment"]) | {key: "another"}
    compare.refuse_other_machine(result, result["environment"], result["device"], stored)
    with pytest.raises(InputError, match=f"{key} .* there, another here"):
        compare.refuse_other_machine(result, other, result["device"], stored)


@pytest.mark.parametrize(
    "content, words",
    [(None, "cannot read"), ("", "is not JSON"), ("[]", "not a result of"), ('{"kind": "bsfa profile"}', "has format"),
     ('{"kind": "bsfa profile", "format": 1}', "lacks")],
)  # fmt: skip
def test_a_bad_baseline_is_an_input_error(profile, tmp_path, content, words):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    result = profile(*SMALL, "--baseline", path)
    assert result.code == 4 and words in result.err.splitlines()[-1]


def test_end_to_end_times_dense_and_sparse_on_one_model(profile, tmp_path):
    from bsfa_kernels.integrations.transformers import attention_modules
    from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

    from bsfa_cli.models.load import load_model

    embedded = load_model(None, device="cpu")
    embedded.model.save_pretrained(tmp_path / "model")
    embedded.tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model", device="cpu")
    modules = attention_modules(loaded.model)
    everything = {path: torch.full((1, module.query_heads, 1), 100.0) for path, module in modules.items()}
    artifact = Thresholds(
        {key: loaded.identity.get(key) for key in MODEL_KEYS}, TileShape(), True, (0,),
        (Point("all", "gap", "target-skip", 1.0),), everything,
    )  # fmt: skip
    artifact.write(tmp_path / "thresholds.safetensors")
    options = ("--end-to-end", tmp_path / "model", "--lengths", "512", "--seconds", "0.01", "--device", "cpu", "--json")
    result = profile(*options, "--thresholds", tmp_path / "thresholds.safetensors")
    assert result.code == 0
    (entry,) = json.loads(result.out)["prefill"]
    rows = {row["name"]: row for row in entry["contenders"]}
    assert entry["point"] == "all" and entry["length"] == 512
    assert entry["data"] == "builtin:mixed" and entry["dense_modules"] == {}
    assert rows["bsfa"]["skip"] == 1 and rows["bsfa, nothing skipped"]["skip"] == 0
    assert {"the backend PyTorch picks", "PyTorch's CPU flash attention", "math"} <= set(rows)
    (tmp_path / "short.txt").write_text("too short")
    assert profile(*options, "--data", tmp_path / "short.txt").code == 4
    (tmp_path / "thresholds.safetensors").write_bytes(b"x" * 100)
    assert profile(*options, "--thresholds", tmp_path / "thresholds.safetensors").code == 4


def test_end_to_end_on_a_missing_model(profile):
    result = profile("--end-to-end", "/nonexistent/model", "--profile", "tiny", "--device", "cpu")
    assert result.code == 4 and "does not exist" in result.err
    assert len(result.err.splitlines()) == 1  # before the sweep began


@pytest.mark.gpu
def test_a_host_that_launches_slowly_is_timed_only_where_a_user_waits_for_it():
    x, launches = torch.zeros(1024, device="cuda"), {True: [], False: []}

    def contender(ahead: bool):
        def slow():
            begun = time.perf_counter()
            x.add_(1)
            time.sleep(0.005)
            x.add_(1)
            launches[ahead].append((time.perf_counter() - begun) * 1e3)
            return x

        return interleave.Contender(f"ahead: {ahead}", slow, ahead=ahead)

    timings = interleave.measure([contender(True), contender(False)], x.device, seconds=0, at_least=15)
    assert min(timings["ahead: False"].samples_ms) > 4
    # A busy machine may launch later than any lead, or have the GPU do something else within a sample.
    samples = timings["ahead: True"].samples_ms
    late = MARGIN * 0.75 * min(launches[True])
    prompt = [ms for ms, host in zip(samples, launches[True][-len(samples) :], strict=True) if host < late]
    assert prompt and statistics.median(prompt) < 1


@pytest.mark.gpu
def test_a_gpu_cell_names_its_baselines_and_agrees_with_dense():
    cuda = torch.device("cuda")
    small = plan.Plan("gpu", (plan.Shape("text", 8, 2, 128),), (2048,), (0.5, 0.9))
    for gate in plan.GATES:
        cell = sweep.cell(small.with_flags(gate=gate), small.shapes[0], 2048, cuda, seconds=0.2)
        names = {row["name"] for row in cell["contenders"]} | {entry["name"] for entry in cell["unavailable"]}
        assert set(plan.BASELINES) - {"PyTorch's CPU flash attention"} <= names
        assert cell["fastest_dense"] is not None
        assert cell["error_at_zero"] < cell["error_tolerance"]
        for row in cell["contenders"]:
            if row["skip_target"]:
                assert row["skip"] == pytest.approx(row["skip_target"], abs=0.03) and row["finite"]


@pytest.mark.gpu
def test_a_shape_without_a_gpu_kernel_is_told_apart_from_a_slow_one():
    small = plan.Plan("odd", (plan.Shape("odd", 2, 2, 12),), (512,), (0.5,))
    cell = sweep.cell(small, small.shapes[0], 512, torch.device("cuda"), seconds=0.01)
    assert "bsfa" not in {row["kind"] for row in cell["contenders"]}
    assert any("no GPU kernel serves this shape" in absent["reason"] for absent in cell["unavailable"])


@pytest.mark.gpu
def test_a_gpu_prefill_times_every_backend():
    from bsfa_cli.timing.prefill import Prefill

    entry = Prefill(None, None, None, torch.device("cuda"), "auto").time("builtin:mixed", 1800, 0, 0.1)
    assert {"the backend PyTorch picks", "bsfa, nothing skipped"} <= {row["name"] for row in entry["contenders"]}
    assert all(row["ms_median"] > 0 for row in entry["contenders"])
