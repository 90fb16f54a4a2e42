"""Attention libraries to be measured against: found by name and version, called as they want it, missing in words."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bsfa_kernels import TileShape
from torch.nn.functional import scaled_dot_product_attention

from bsfa_cli.comparison import measure, model
from bsfa_cli.comparison.handlers import FlashAttention, Stopwatch
from bsfa_cli.timing import baselines, flash_attention, libraries, plan, skip_softmax, sweep
from bsfa_cli.timing.entrants import Entrants
from bsfa_cli.timing.flash_attention import FA3, FA3_FP8, FA4, TokensFirst
from bsfa_cli.timing.interleave import Timing
from bsfa_cli.timing.libraries import Library
from bsfa_cli.timing.prefill import Prefill
from bsfa_cli.timing.skip_softmax_rule import ROWS, Rule

CPU = torch.device("cpu")
MODULES = ("flash_attn_interface", "fa3_fwd_interface", "flash_attn", "flash_attn.cute", "flashinfer.prefill")
VERSIONS = {"fa3-fwd": "0.0.3", "tokenspeed-fa3": "3.0.0", "flash-attn-4": "4.0.0", "flashinfer-python": "0.7.2"}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """No library, whatever this machine has; a test adds its own."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))


@pytest.fixture
def install(monkeypatch):
    """install(module, package, **contents) makes `import module` work, as if `package` had brought it."""
    brought = {}

    def version(name):
        if name not in brought:
            raise libraries.metadata.PackageNotFoundError(name)
        return brought[name]

    monkeypatch.setattr(libraries.metadata, "version", version)

    def add(name: str, package: str, **contents) -> ModuleType:
        parent = name.partition(".")[0]
        if parent != name:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        brought[package] = VERSIONS[package]
        return module

    return add


class Function:
    """flash_attn_func: exact attention on [B, T, H, D] in float32, and what it was called with."""

    def __init__(self, pair=False):
        self.calls, self.pair = [], pair

    def __call__(self, q, k, v, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None):
        self.calls.append(SimpleNamespace(**locals()))
        laid = []
        for x, scale in ((q, q_descale), (k, k_descale), (v, v_descale)):
            x = x.float().transpose(1, 2)
            if scale is not None:
                x = x * scale.repeat_interleave(x.shape[1] // scale.shape[1], 1)[:, :, None, None]
            laid.append(x)
        out = scaled_dot_product_attention(*laid, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        out = out.transpose(1, 2).to(torch.bfloat16)
        return (out, None) if self.pair else out


def tensors(length=100, head_dim=32, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, head_dim, generator=generator).to(dtype) for heads in (4, 2, 2)]


def exact(q, k, v, causal=True):
    return scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize(
    "name, module, package, pair",
    [(FA3, "fa3_fwd_interface", "fa3-fwd", False), (FA3, "flash_attn_interface", "tokenspeed-fa3", True),
     (FA4, "flash_attn.cute", "flash-attn-4", True)],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_is_called_with_tokens_before_heads(install, name, module, package, pair, causal):
    function = Function(pair)
    install(module, package, flash_attn_func=function)
    q, k, v = tensors()
    call = flash_attention.dense(name, TokensFirst(q, k, v), causal)
    assert call.library == f"{package} {VERSIONS[package]}"
    assert not function.calls
    for _ in range(2):
        torch.testing.assert_close(call().float(), exact(q, k, v, causal), atol=2e-2, rtol=2e-2)
    first, second = function.calls
    assert [tuple(x.shape) for x in (first.q, first.k, first.v)] == [(2, 100, 4, 32), (2, 100, 2, 32), (2, 100, 2, 32)]
    assert all(x.is_contiguous() for x in (first.q, first.k, first.v))
    assert (first.causal, first.softmax_scale) == (causal, None)
    assert first.q is second.q and first.v is second.v  # laid out once, before what is timed


def test_what_is_missing_is_said_with_how_to_get_it():
    q, k, v = tensors()
    for name, words in ((FA3, "pip install fa3-fwd"), (FA4, "pip install flash-attn-4")):
        reason = flash_attention.dense(name, TokensFirst(q, k, v), True)
        assert "not installed" in reason and words in reason and "\n" not in reason
    assert flash_attention.dense_fp8(TokensFirst(q, k, v), True) == flash_attention.HOW[FA3]
    ((name, reason, _),) = skip_softmax.contenders(TokensFirst(q, k, v), True, (0.5,))
    assert name == "skip-softmax" and "pip install flashinfer-python" in reason


def test_what_is_installed_but_broken_says_why(monkeypatch, tmp_path):
    (tmp_path / "fa3_fwd_interface.py").write_text("raise ImportError('undefined symbol: x\\nand more')")
    (tmp_path / "flash_attn_interface.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fa3_fwd_interface", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(libraries, "_version", lambda packages: None)
    assert flash_attention.find(FA3) == (
        "flash_attn_interface is installed but does not import: No module named 'no_such_module_anywhere'"
    )
    (tmp_path / "flash_attn_interface.py").unlink()
    assert flash_attention.find(FA3).endswith("does not import: undefined symbol: x")


def test_a_kernel_in_hugging_faces_cache_is_loaded_without_network(monkeypatch, tmp_path):
    asked = []

    def load_kernel(repository, *, lockfile, revision):
        asked.append((repository, lockfile, revision))
        return SimpleNamespace(flash_attn_func=Function())

    monkeypatch.setattr("kernels.load_kernel", load_kernel)
    assert flash_attention.find(FA3) == flash_attention.HOW[FA3] and not asked
    (tmp_path / "kernels--kernels-community--flash-attn3" / "snapshots" / "0123456789abcdef").mkdir(parents=True)
    assert flash_attention.find(FA3).version == "kernels-community/flash-attn3 0123456789"
    assert asked == [("kernels-community/flash-attn3", None, "0123456789abcdef")]


@pytest.mark.parametrize(
    "changes, words",
    [({"dtype": torch.float32}, "float16 and bfloat16, not float32"), ({"head_dim": 288}, "up to 256, not 288")],
)
def test_what_flash_attention_does_not_serve_is_not_tried(install, changes, words):
    function = Function()
    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=function)
    laid = TokensFirst(*tensors(**changes))
    assert words in flash_attention.dense(FA3, laid, True) and words in flash_attention.dense_fp8(laid, True)


def test_fp8_gets_rounded_tensors_and_their_scales(install):
    function = Function()
    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=function)
    q, k, v = tensors(length=256)
    k[:, 1] *= 8
    call = flash_attention.dense_fp8(TokensFirst(q, k, v), True)
    out = call().float()
    (seen,) = function.calls
    assert {x.dtype for x in (seen.q, seen.k, seen.v)} == {torch.float8_e4m3fn}
    assert [tuple(x.shape) for x in (seen.q, seen.k, seen.v)] == [(2, 256, 4, 32), (2, 256, 2, 32), (2, 256, 2, 32)]
    for scale in (seen.q_descale, seen.k_descale, seen.v_descale):
        assert scale.shape == (2, 2) and scale.dtype == torch.float32
    assert seen.k_descale[:, 1].min() > 4 * seen.k_descale[:, 0].max()
    error = float((out - exact(q, k, v)).norm() / exact(q, k, v).norm())
    assert 0.005 < error < 0.15


def test_a_build_without_fp8_says_so(install, monkeypatch):
    laid = TokensFirst(*tensors())
    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=lambda q, k, v, causal=False: None)
    assert flash_attention.dense_fp8(laid, True) == "fa3-fwd 0.0.3 takes no FP8"
    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=Function())
    config = ModuleType("fa3_fwd_config")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_FP8": True}}
    monkeypatch.setitem(sys.modules, "fa3_fwd_config", config)
    assert flash_attention.dense_fp8(laid, True) == "fa3-fwd 0.0.3 was built without FP8"


def test_fp8_and_other_rivals_are_never_the_fastest_dense():
    rows = [
        {"name": "cuDNN", "kind": "dense", "skip_target": None},
        {"name": "fp8", "kind": sweep.APPROXIMATE, "skip_target": None, "error": 0.04},
        {"name": "nvidia", "kind": "skip-softmax", "skip_target": 0.5, "skip": 0.5, "kept_share": 0.6},
        {"name": sweep.ZERO, "kind": "bsfa", "skip_target": 0.0, "skip": 0.0, "kept_share": 1.0},
    ]
    times = {"cuDNN": 10.0, "fp8": 5.0, "nvidia": 4.0, sweep.ZERO: 11.0}
    found = sweep.summarise(rows, {name: Timing([ms] * 3) for name, ms in times.items()}, flops=10**12)
    assert found["fastest_dense"] == "cuDNN" and found["break_even_skip"] is None
    by_name = {row["name"]: row for row in found["contenders"]}
    assert by_name["fp8"]["speedup"] == 2 and by_name["fp8"]["error"] == 0.04
    assert not by_name["fp8"]["suspect"] and not by_name["nvidia"]["suspect"]


def test_a_cell_holds_libraries_and_rivals_with_version_and_error(monkeypatch):
    def dense(q, k, v, causal, wanted, laid):
        right, wrong = (lambda: exact(q, k, v)), (lambda: exact(q, k, v) * 1.5)
        right.library = "fa3-fwd 0.0.3"
        return {"math": lambda: exact(q, k, v), FA3: right, FA4: wrong, "cuDNN": "not asked for"}

    def approximate(laid, causal, wanted):
        return {FA3_FP8: lambda: exact(*laid.given) * 1.03}

    broken = lambda: torch.zeros(1) @ torch.zeros(2)  # noqa: E731
    monkeypatch.setattr(baselines, "dense", dense)
    monkeypatch.setattr(baselines, "approximate", approximate)
    monkeypatch.setattr(sweep, "rivals", lambda *_: (("skip-softmax", broken, {"kind": "x"}) for _ in range(3)))
    small = plan.Plan("small", (plan.Shape("text", 2, 1, 32),), (256,), ())
    cell = sweep.cell(small, small.shapes[0], 256, CPU, seconds=0.01)
    rows = {row["name"]: row for row in cell["contenders"]}
    assert rows[FA3]["library"] == "fa3-fwd 0.0.3" and "library" not in rows["math"]
    assert rows[FA3_FP8]["kind"] == "dense, approximate" and rows[FA3_FP8]["error"] == pytest.approx(0.03, rel=1e-3)
    assert cell["fastest_dense"] in ("math", FA3)
    reasons = [(absent["name"], absent["reason"]) for absent in cell["unavailable"]]
    assert (FA4, "its output is 5.0e-01 away from dense attention") in reasons
    assert [name for name, _ in reasons].count("skip-softmax") == 1


def test_a_baseline_without_finite_output_is_out():
    entrants = Entrants(CPU, 1e-3)
    entrants.enter_dense("first", lambda: torch.ones(1, 1, 4, 4))
    entrants.enter_dense("second", lambda: torch.full((1, 1, 4, 4), math.nan))
    assert [row["name"] for row in entrants.rows] == [each.name for each in entrants.contenders] == ["first"]
    assert entrants.unavailable == [{"name": "second", "reason": "its output is not finite"}]


def naive(q, k, causal: bool, keys: int, gap: float) -> tuple[int, int, int]:
    """(dropped, candidates, visited) of the rule, a tile at a time."""
    q, k = q[0].float(), k[0].float()
    heads, length, head_dim = q.shape
    rows = torch.arange(-(-length // ROWS) * ROWS)
    padded = q.new_zeros(heads, len(rows), head_dim)
    padded[:, :length] = q
    dropped = candidates = visited = 0
    for head in range(heads):
        scores = padded[head] @ k[head * k.shape[0] // heads].T * head_dim**-0.5
        if causal:
            scores = scores.masked_fill(torch.arange(length) > rows[:, None], -math.inf)
        for tile in scores.split(ROWS):
            running = None
            for part in tile.split(keys, dim=1):
                largest = part.amax(1)
                if largest.max() == -math.inf:
                    continue
                visited += 1
                if running is None:
                    running = largest
                    continue
                candidates += 1
                if bool((torch.exp(largest - running) < math.exp(gap)).all()):
                    dropped += 1
                else:
                    running = torch.maximum(running, largest)
    return dropped, candidates, visited


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length, keys", [(700, 128), (512, 64), (600, 256)])
def test_the_rule_of_skip_softmax_is_the_kernels(causal, length, keys):
    q, k, _ = tensors(length)
    rule = Rule(q, k, causal=causal, keys=keys)
    assert rule.stride == 1
    for gap in (-1.0, 0.0, 0.7):  # above 0, dropped tiles would have raised the running maximum
        dropped, candidates, visited = naive(q, k, causal, keys, gap)
        found = rule.at(gap)
        assert found.skip == pytest.approx(dropped / candidates)
        assert found.kept_share == pytest.approx(1 - dropped / visited)
    assert rule.at(rule.reach(0.5)).skip == pytest.approx(0.5, abs=0.05)


def test_long_sequences_are_judged_by_a_share_of_their_query_tiles(monkeypatch):
    q, k, _ = tensors(2048)
    whole = Rule(q, k, causal=True, keys=128)
    monkeypatch.setattr("bsfa_cli.timing.skip_softmax_rule.MAXIMA", whole.maxima.numel() // 4)
    part = Rule(q, k, causal=True, keys=128)
    assert part.stride == 4 and part.maxima.shape[2] == 8
    assert part.at(1.0).skip == pytest.approx(whole.at(1.0).skip, abs=0.08)


class Fmha:
    """trtllm_fmha_v2_prefill as FlashInfer 0.7.2 declares it, up to what is used."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, qkv, input_layout, workspace_buffer, seq_lens, max_q_len, max_kv_len, bmm1_scale, bmm2_scale, batch_size,
        cum_seq_lens_q, cum_seq_lens_kv, *, mask_mode="causal", skip_softmax_threshold_scale_factor=0,
    ):  # fmt: skip
        self.calls.append(SimpleNamespace(**locals()))
        q, k, v = (x.unflatten(0, (batch_size, max_q_len)).transpose(1, 2) for x in qkv)
        return exact(q, k, v, mask_mode == "causal").transpose(1, 2).flatten(0, 1)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("causal", [True, False])
def test_skip_softmax_is_called_with_ragged_tokens_and_rates_are_computed(install, hopper, causal):
    function = Fmha()
    install("flashinfer.prefill", "flashinfer-python", trtllm_fmha_v2_prefill=function)
    q, k, v = tensors(1024, head_dim=64)
    entries = list(skip_softmax.contenders(TokensFirst(q, k, v), causal, (0.3, 0.6)))
    assert [name for name, *_ in entries] == [f"skip-softmax, {rate} % skipped" for rate in (0, 30, 60)]
    for _, call, facts in entries:
        assert call.library == "flashinfer-python 0.7.2" and facts["kind"] == "skip-softmax"
        torch.testing.assert_close(call(), exact(q, k, v, causal))
    seen = function.calls[0]
    assert [tuple(x.shape) for x in seen.qkv] == [(2048, 4, 64), (2048, 2, 64), (2048, 2, 64)]
    assert (seen.input_layout, seen.max_q_len, seen.max_kv_len, seen.batch_size) == ("SEPARATE_Q_K_V", 1024, 1024, 2)
    assert (seen.bmm1_scale, seen.bmm2_scale, seen.mask_mode) == (0.125, 1.0, "causal" if causal else "padding")
    assert seen.seq_lens.tolist() == [1024, 1024] and seen.cum_seq_lens_q.tolist() == [0, 1024, 2048]
    assert {x.dtype for x in (seen.seq_lens, seen.cum_seq_lens_q, seen.cum_seq_lens_kv)} == {torch.int32}
    rule = Rule(q, k, causal=causal, keys=256)
    factors = [call.skip_softmax_threshold_scale_factor for call in function.calls]
    assert 0 < factors[0] < 1e-20 < factors[1] < factors[2]
    for factor, (_, _, facts) in list(zip(factors, entries, strict=True))[1:]:
        assert facts["skip"] == pytest.approx(rule.at(math.log(factor / 1024)).skip, abs=0.01)
        assert facts["skip_from"] == "computed from all query tiles"
    assert entries[0][2]["skip"] == 0


def test_skip_softmax_says_why_it_cannot_run(install, monkeypatch):
    q, k, v = tensors(head_dim=48)
    install("flashinfer.prefill", "flashinfer-python")
    assert "has no trtllm_fmha_v2_prefill" in skip_softmax.find()

    def fails(*_, **__):
        raise RuntimeError("Ninja build failed. Ninja output:\n[1/9] nvcc\nx.cu(3): error: no such thing\nmore")

    install("flashinfer.prefill", "flashinfer-python", trtllm_fmha_v2_prefill=fails)
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for given, words in ((tensors(head_dim=72), "not 72"), ((q, k, v), "Hopper GPUs only, not")):
        ((_, reason, _),) = skip_softmax.contenders(TokensFirst(*given), True, ())
        assert words in reason
    capability[0] = (9, 0)
    _, call, _ = next(skip_softmax.contenders(TokensFirst(q, k, v), True, ()))
    with pytest.raises(RuntimeError, match=r"^nvcc failed: x.cu\(3\): error: no such thing$"):
        call()


def test_a_comparison_times_what_is_installed_and_says_what_is_not(monkeypatch):
    def dense(q, k, v, causal, wanted):
        assert {FA3, FA4} <= set(wanted)
        call = lambda: exact(q, k, v)  # noqa: E731
        call.library = "fa3-fwd 0.0.3"
        return {"math": lambda: exact(q, k, v), FA3: call, FA4: flash_attention.HOW[FA4]}

    monkeypatch.setattr(baselines, "dense", dense)
    bench = measure.Bench([], TileShape(), CPU, 0.01, 0)
    bench.add(measure.Layer("layer", *tensors(256, dtype=torch.float32), 32**-0.5, True))
    found = bench.result()
    assert {row["name"]: row.get("library") for row in found["dense"]} == {"math": None, FA3: "fa3-fwd 0.0.3"}
    assert found["unavailable"] == [{"name": FA4, "reason": flash_attention.HOW[FA4]}]


def test_inside_a_model_the_libraries_run_on_the_modules_tensors(install):
    function = Function(pair=True)
    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=function)
    loaded = SimpleNamespace(model=None)
    bench = model.ModelBench(loaded, {"layer": None}, [], TileShape(), torch.device("cuda"))
    runs = {run.name: run for run in bench.runs}
    assert runs[FA4].reason == flash_attention.HOW[FA4] and runs["cuDNN"].reason is None
    assert runs[FA3].library.version == "fa3-fwd 0.0.3" and runs[FA3].reason is None
    q, k, v = tensors()
    handler = FlashAttention(Library(SimpleNamespace(flash_attn_func=function), "x"), Stopwatch(CPU))
    out = handler(q, k, v, scale=32**-0.5, causal=True, spans=None)
    torch.testing.assert_close(out.float(), exact(q, k, v), atol=2e-2, rtol=2e-2)
    assert function.calls[0].q.data_ptr() == q.data_ptr() and function.calls[0].softmax_scale == 32**-0.5
    on_cpu = model.ModelBench(loaded, {"layer": None}, [], TileShape(), CPU)
    assert [run.name for run in on_cpu.runs] == ["PyTorch's CPU flash attention"]


def test_env_lists_them(run, install):
    import json

    install("fa3_fwd_interface", "fa3-fwd", flash_attn_func=Function())
    listed = json.loads(run("env", "--json").out)["baselines"]
    assert [each["name"] for each in listed] == [FA3, FA4, "skip-softmax"]
    assert listed[0] == {"name": FA3, "version": "fa3-fwd 0.0.3", "reason": None}
    assert listed[1]["version"] is None and "pip install" in listed[1]["reason"]
    shown = run("env").err
    assert "FlashAttention-3: fa3-fwd 0.0.3" in shown and "skip-softmax: not installed" in shown


def test_every_way_to_get_one_is_a_target_or_a_package():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "make gpu-baselines" in flash_attention.HOW[FA3] and "\ngpu-baselines:" in makefile
    assert "\n/.baselines/\n" in (Path(__file__).parent.parent / ".gitignore").read_text()


def test_a_prefill_is_timed_through_the_libraries_too(monkeypatch, one_round):
    function = Function(pair=True)
    found = {FA3: Library(SimpleNamespace(flash_attn_func=function), "fa3-fwd 0.0.3"), FA4: "not here"}
    monkeypatch.setattr(Prefill, "_libraries", lambda self: found)
    prefill = Prefill(None, None, None, CPU, "bfloat16")
    entry = prefill.time("builtin:mixed", 300, 0, 0.01)
    (row,) = (row for row in entry["contenders"] if row["name"] == FA3)
    layers = prefill.model.config.num_hidden_layers
    assert row["kind"] == "dense" and row["library"] == "fa3-fwd 0.0.3" and row["ms_median"] > 0
    assert len(function.calls) >= 2 * layers and len(function.calls) % layers == 0
    assert {"name": FA4, "reason": "not here"} in entry["unavailable"]
    others = prefill.time("builtin:mixed", 300, 0, 0.01, dense=("math",))
    assert FA3 not in {row["name"] for row in others["contenders"]}


def test_the_libraries_refuse_padding_windows_softcap_and_sinks():
    handler = flash_attention.Handler(Library(SimpleNamespace(flash_attn_func=None), "x"))
    q, k, v = tensors()
    for given in (dict(spans=torch.zeros(1, 4)), dict(spans=None, window=128), dict(spans=None, sinks=torch.zeros(4))):
        with pytest.raises(ValueError, match="without padding"):
            handler(q, k, v, scale=1.0, causal=True, **given)
