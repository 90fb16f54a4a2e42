"""bsfa verify: what it measures is what happened, and it fails when it must."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import TileShape, reference
from bsfa_kernels.integrations.transformers import SparseAttention
from bsfa_kernels.reference import Scoring, Span
from bsfa_kernels.request import UNBOUNDED
from bsfa_kernels.thresholds import ThresholdsError
from gap_thresholds import TILE, thresholds

from bsfa_cli.commands import verify as command
from bsfa_cli.errors import GateFailed, InputError, UsageError
from bsfa_cli.metrics.logits import Head, Predictions
from bsfa_cli.models.load import load_model
from bsfa_cli.presentation import verify_table
from bsfa_cli.verification import run as verification
from bsfa_cli.verification.gates import Gates
from bsfa_cli.verification.kernel import check_kernel
from bsfa_cli.verification.layers import DroppedMass, MeasuringAttention

pytestmark = pytest.mark.usefixtures("random_model")
SCORING = Scoring(0.125, True)


def verify(**options):
    """The command as a command line with these options would run it."""
    given = dict(negative_control=False) | options
    return command.verify(SimpleNamespace(command=SimpleNamespace(params=()), params=given), **options)


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu")


@pytest.fixture
def artifact(loaded, tmp_path):
    path = tmp_path / "thresholds.safetensors"
    thresholds(loaded, {"open": -torch.inf, "mild": -1.0, "hard": 2.0}, {"seed": 4}).write(path)
    return path


def call(capsys, artifact, failing=None, **options):
    """Run the command; returns its JSON, and checks the sentence of its failure."""
    options = dict(samples=1, length=400, json=True, max_kl_over_floor=10.0) | options
    if failing is None:
        verify(thresholds=artifact, **options)
    else:
        with pytest.raises(GateFailed, match=failing):
            verify(thresholds=artifact, **options)
    streams = capsys.readouterr()
    return json.loads(streams.out), streams.err


def test_a_mild_point_passes_and_says_what_it_did(artifact, capsys):
    result, shown = call(
        capsys, artifact, point="mild", min_top1=0.8, max_perplexity_increase=0.1, max_dropped_mass=0.5, min_skip=0.01,
        negative_control=True,
    )  # fmt: skip
    assert result["passed"] and result["label"] and result["data"]["seed"] == 5
    point = result["points"][0]
    assert 0.01 < point["skip"] < 0.5 and point["finite"]
    assert 0 < point["dropped_mass"]["mean"] < point["dropped_mass"]["p99"] <= point["dropped_mass"]["worst"]
    assert 0.8 < point["logits"]["top1"] < 1 and point["logits"]["kl"] > 0
    assert [module["path"] for module in point["modules"]] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert all(len(module["heads"]) == 4 for module in point["modules"])
    assert len(point["kernel"]) == 3 and all(check["passed"] for check in point["kernel"])
    assert result["negative_control"]["skip"] == 1 and result["negative_control"]["failures"]
    assert result["environment"]["torch"] == torch.__version__
    assert "random weights" in shown and "negative control fails, as it must" in shown
    assert "passed: --min-top1 " in shown.splitlines()[-1]


def test_without_an_accuracy_limit_texts_have_one(artifact, capsys):
    no_limit = dict(max_kl_over_floor=None)
    _, shown = call(capsys, artifact, failing=r"--max-kl-over-floor 0\.01", point="hard", **no_limit)
    assert "FAILED hard: KL above the noise floor" in shown
    result, shown = call(capsys, artifact, point="mild", min_top1=0.5, **no_limit)
    assert result["gates"]["max_kl_over_floor"] is None and "passed: --min-top1 0.5" in shown


def test_the_worst_modules_are_shown_and_details_on_request(artifact, capsys, monkeypatch):
    monkeypatch.setattr(verify_table, "WORST", 2)
    brief, full = (call(capsys, artifact, point="mild", details=details)[1] for details in (False, True))
    assert "the 2 worst of 3 modules; --details shows all" in brief and "--details" not in full
    assert "in 3 modules:" in brief and full.count("against the float64 reference, model.layers.") == 3
    table = brief.partition("operating point")[2].partition("passed: ")[0].splitlines()
    assert max(map(len, table)) <= 80 and "modules: model.layers.*.self_attn" in brief


def test_every_point_is_verified_and_one_that_skips_nothing_fails(artifact, capsys):
    result, shown = call(capsys, artifact, failing="open: nothing was skipped")
    opened, mild, hard = result["points"]
    assert not result["passed"] and opened["failures"] and not mild["failures"] and not hard["failures"]
    assert opened["logits"]["top1"] == 1 and opened["dropped_mass"]["worst"] < 1e-5
    assert opened["logits"]["perplexity_dense"] == mild["logits"]["perplexity_dense"]
    assert 0 == opened["skip"] < mild["skip"] < hard["skip"]
    assert opened["logits"]["kl"] < mild["logits"]["kl"] < hard["logits"]["kl"]
    assert "FAILED open" in shown


@pytest.mark.parametrize(
    "gate,sentence",
    [
        (dict(min_top1=0.999), "top-1 agreement is .*--min-top1 0.999"),
        (dict(max_dropped_mass=0.01), "p99 dropped mass is .*--max-dropped-mass 0.01"),
        (dict(min_skip=0.99), "skip rate is .*--min-skip 0.99"),
    ],
)
def test_a_missed_gate_is_named(artifact, capsys, gate, sentence):
    call(capsys, artifact, failing=sentence, point="hard", **gate)


def test_gates_that_let_a_broken_model_pass_are_found_out(artifact, capsys):
    call(capsys, artifact, failing="negative control passed", point="mild", min_top1=0.01, negative_control=True)


def test_the_calibration_texts_are_not_called_held_out(loaded, tmp_path, capsys, artifact):
    result, shown = call(capsys, artifact, point="mild")
    assert "held out" not in shown
    seen = {"seed": 4, "data": {"hash": result["data"]["hash"]}}
    thresholds(loaded, {"mild": -1.0}, seen).write(tmp_path / "seen.safetensors")
    assert "nothing here is held out" in call(capsys, tmp_path / "seen.safetensors")[1]


def test_the_skip_rate_is_the_whole_models(loaded, tmp_path, capsys):
    every = thresholds(loaded, {"hard": 2.0})
    one = dataclasses.replace(every, tensors=dict([list(every.tensors.items())[1]]))
    every.write(tmp_path / "every.safetensors")
    one.write(tmp_path / "one.safetensors")
    (whole,) = call(capsys, tmp_path / "every.safetensors")[0]["points"]
    assert whole["uncalibrated"] == {}
    assert whole["calibrated"] == {key: whole[key] for key in ("kept", "candidates", "skip")}
    result, shown = call(
        capsys, tmp_path / "one.safetensors", failing="skip rate is 0.2958 .--min-skip 0.3", min_skip=0.3
    )
    (point,) = result["points"]
    # Geometry gives the other two layers the tiles that the kernels count in them.
    assert point["candidates"] == whole["candidates"] == 3 * point["calibrated"]["candidates"]
    assert set(point["uncalibrated"]) == {"model.layers.0.self_attn", "model.layers.2.self_attn"}
    assert point["skip"] == pytest.approx(point["calibrated"]["skip"] / 3) and point["calibrated"]["skip"] > 0.3
    assert "in the 1 of 3 attention modules that have thresholds; the others keep all" in shown


def test_a_stored_result_becomes_a_page(artifact, run, tmp_path):
    stored, page = tmp_path / "v<1>.json", tmp_path / "report.html"
    options = ("--samples", "1", "--length", "400", "--device", "cpu", "--min-top1", "0.999", "--negative-control")
    done = run("verify", "--thresholds", artifact, *options, "-o", stored, "--json")
    assert done.code == 1 and json.loads(stored.read_text()) == json.loads(done.out)
    assert run("report", stored, "-o", page).code == 0
    text = page.read_text()
    for words in ("v&lt;1&gt;.json", "random weights", "builtin:mixed", "Failed. Limits asked for: min-top1 0.999",
                  "open: nothing was skipped", "model.layers.2.self_attn", "Negative control"):  # fmt: skip
        assert words in text
    assert text.count("<details>") == 3 and "<1>" not in text


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("--length", "2"), 2, "--length 2 is shorter than two tiles of the thresholds (128 tokens)"),
        (("--length", "131073"), 2, "--length 131073 is past the model's 131072 positions"),
        (("--data", "{tmp}/no.txt"), 4, "no.txt does not exist"),
        (("--data", "builtin:poems"), 2, "builtin:mixed"),
        (("--output", "/proc/nowhere/v.json"), 2, "cannot write"),
        (("--tasks", "poems"), 2, "no task 'poems'"),
        (("--tasks", "{tmp}/no.jsonl"), 4, "no.jsonl does not exist"),
        (("--tasks", "single", "--heat-map", "/proc/nowhere/h.svg"), 2, "cannot write"),
        (("--tasks", "single", "--save-questions", "/proc/nowhere/q.jsonl"), 2, "cannot write"),
        (("--tasks", "single", "--lengths", "512,131073"), 2, "--lengths 131073 is past the model's 131072 positions"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    run, one_sentence, artifact, tmp_path, arguments, code, words
):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    one_sentence(run("verify", "--thresholds", artifact, "--device", "cpu", *arguments), code, words)


def test_bad_requests(artifact, loaded, tmp_path):
    with pytest.raises(UsageError, match="--min-top1 must lie between 0 and 1, got 1.5"):
        verify(thresholds=artifact, min_top1=1.5)
    with pytest.raises(UsageError, match="--backend must be auto"):
        verify(thresholds=artifact, backend="fastest")
    with pytest.raises(UsageError, match="--length 131073 is past the model's 131072 positions"):
        verify(thresholds=artifact, length=131073)
    with pytest.raises(ThresholdsError, match="no point 'best' of: open, mild, hard"):
        verify(thresholds=artifact, point="best")
    other = thresholds(loaded, {"mild": -1.0})
    dataclasses.replace(other, model={**other.model, "head_dim": 128}).write(tmp_path / "other.safetensors")
    with pytest.raises(ThresholdsError, match="head_dim is 128 there and 64 here"):
        verify(thresholds=tmp_path / "other.safetensors")


def handler(loaded, gap, path="model.layers.0.self_attn"):
    return SparseAttention(thresholds(loaded, {"only": gap}), "only", path)


def attention_input(dtype=torch.float32, length=300):
    generator = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(1, 4, length, 64, generator=generator)
    k, v = torch.randn(2, 1, 2, length, 64, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def test_layer_numbers_are_those_of_the_formula(loaded):
    measuring = MeasuringAttention(handler(loaded, 1.0), check_kernel=False)
    q, k, v = attention_input()
    for part in (slice(0, 1), slice(0, 1)):
        measuring(q[part], k[part], v[part], scale=0.125, causal=True, spans=None)
    found = measuring.summary()
    options = dict(scoring=SCORING, spans=[Span(0, 0, 300, UNBOUNDED)], tile=TILE, keep_sink=True, query_tiles=10)
    sparse = reference.attention(q, k, v, measuring.sparse.gate(300, q.device), **options)
    dense = reference.attention(q, k, v, reference.Gate(), **options)
    dropped = 1 - (sparse.lse - dense.lse).exp()
    assert found["kept"] == 2 * sparse.kept.sum() and found["candidates"] == 2 * sparse.candidates.sum()
    assert 0 < found["skip"] < 1 and found["finite"]
    assert found["error"] == pytest.approx(float((sparse.out - dense.out).norm() / dense.out.norm()), rel=1e-4)
    assert found["dropped_mass"]["mean"] == pytest.approx(float(dropped.mean()), rel=1e-4)
    assert found["dropped_mass"]["worst"] == pytest.approx(float(dropped.max()), rel=1e-4)
    quantile = float(dropped.flatten().quantile(0.99, interpolation="lower"))
    assert quantile <= found["dropped_mass"]["p99"] + 1e-6 <= quantile + 2e-3
    head = found["heads"][3]
    error = (sparse.out - dense.out)[:, 3].norm() / dense.out[:, 3].norm()
    assert head["error"] == pytest.approx(float(error), rel=1e-4, abs=1e-6)
    assert head["dropped_mass"]["mean"] == pytest.approx(float(dropped[:, 3].mean()), rel=1e-4, abs=1e-6)


def test_dropped_mass_of_nothing_and_everything():
    mass = DroppedMass(2, torch.device("cpu"))
    mass.add(torch.tensor([[0.0, 1e-8, 0.0], [1.0, 1.0, 1.0]]))
    assert [head["p99"] for head in mass.by_head()] == [0.0, 1.0]
    assert DroppedMass.overall([mass])["mean"] == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_right_kernel_passes_and_a_wrong_one_does_not(loaded, dtype, monkeypatch):
    from bsfa_cli.verification import kernel

    q, k, v = attention_input(dtype)
    good = check_kernel(handler(loaded, 1.0), q, k, v, scoring=SCORING)
    assert good.passed and good.candidates > 0
    right = kernel.block_sparse_attention

    def inaccurate(*arguments, **options):
        result = right(*arguments, **options)
        return result._replace(out=result.out * (1 + 16 * torch.finfo(dtype).eps))

    def undecided(*arguments, **options):
        return right(*arguments, **options)._replace(kept=torch.zeros(1, 4, 3, dtype=torch.int32))

    for broken in (inaccurate, undecided):
        monkeypatch.setattr(kernel, "block_sparse_attention", broken)
        assert not check_kernel(handler(loaded, 1.0), q, k, v, scoring=SCORING).passed


def test_predictions_are_those_of_whole_logits(loaded, monkeypatch):
    from bsfa_cli.metrics import logits as module

    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 16 * 257)
    tokens = torch.arange(50) * 7 % 257
    with torch.no_grad():
        head = Head(loaded.model)
        dense = head.hidden(tokens)
        sparse = dense + 0.1 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
        predictions = Predictions()
        predictions.add(head, dense, sparse, tokens)
        expected = loaded.model(tokens[None]).logits[0].log_softmax(-1)
        actual = loaded.model.lm_head(sparse).log_softmax(-1)
    found = predictions.summary()
    assert found["kl"] == pytest.approx(float((expected.exp() * (expected - actual)).sum(-1).mean()), rel=1e-3)
    assert found["top1"] == int((expected.argmax(-1) == actual.argmax(-1)).sum()) / 50
    for name, x in (("perplexity_dense", expected), ("perplexity_sparse", actual)):
        assert found[name] == pytest.approx(float((-x[range(49), tokens[1:]]).mean().exp()), rel=1e-3)


class Text:
    tokens = tuple(range(100)) * 3


def test_output_that_is_not_finite_fails(loaded, monkeypatch):
    attend = SparseAttention.attend

    def poisoned(self, *arguments, **options):
        result = attend(self, *arguments, **options)
        return result._replace(out=result.out * torch.nan)

    monkeypatch.setattr(SparseAttention, "attend", poisoned)
    artifact = thresholds(loaded, {"only": 1.0})
    result = verification.verify_points(loaded.model, artifact, ["only"], [Text], "auto", lambda: None)[0]
    json.dumps(result, allow_nan=False)
    limits = Gates(min_top1=0.0, max_perplexity_increase=1e9)
    assert "perplexity increase is not finite (--max-perplexity-increase 1e+09)" in limits.failures(result)
    assert "the output is not finite" in limits.failures(result)


def test_a_model_that_is_broken_without_bsfa_is_refused():
    model = load_model(None, device="cpu").model
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
        with pytest.raises(InputError, match="not finite, with every tile kept"):
            Head(model)


def test_a_worse_perplexity_is_named(loaded):
    artifact = thresholds(loaded, {"only": 1.0})
    result = verification.verify_points(loaded.model, artifact, ["only"], [Text], "auto", lambda: None)[0]
    result["logits"]["perplexity_increase"] = 0.02
    assert Gates(max_perplexity_increase=0.03).failures(result) == []
    assert Gates(max_perplexity_increase=0.01).failures(result) == [
        "perplexity increase is 0.02 (--max-perplexity-increase 0.01)"
    ]


@pytest.mark.gpu
def test_verify_on_a_gpu(capsys, tmp_path):
    loaded = load_model(None, device="cuda", dtype="bfloat16")
    values = {"mild": -1.0, "hard": 2.0}
    artifact = dataclasses.replace(thresholds(loaded, values), tile=TileShape())
    artifact.write(tmp_path / "thresholds.safetensors")
    result, _ = call(
        capsys, tmp_path / "thresholds.safetensors", device="cuda", dtype="bfloat16", length=2048, min_skip=0.01,
        max_dropped_mass=0.95,
    )  # fmt: skip
    mild, hard = result["points"]
    assert 0.01 < mild["skip"] < hard["skip"] < 1
    assert all(check["passed"] for point in result["points"] for check in point["kernel"])
