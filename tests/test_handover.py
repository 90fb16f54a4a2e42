"""bsfa export --to and --from-modelopt: one lambda for another engine, what it loses, and the way back."""

import copy
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels.integrations.transformers import apply, skip_rate
from bsfa_kernels.thresholds import Thresholds
from random_llama import build, build_tokenizer

from bsfa_cli.calibration import fit, handover
from bsfa_cli.calibration import run as calibration
from bsfa_cli.calibration.store import Run
from bsfa_cli.data.texts import load_texts
from bsfa_cli.errors import UsageError
from bsfa_cli.models.load import load_model

pytestmark = pytest.mark.usefixtures("random_model")
RATE = 0.2


@pytest.fixture(scope="module")
def finished(tmp_path_factory, random_model):
    path, loaded = tmp_path_factory.mktemp("finished") / "run", load_model(None, device="cpu")
    options = calibration.Options("builtin:mixed", 4, 1024, 0, (64, 128), (1,), None, "cpu", "float32")
    texts = load_texts(options.data, samples=4, length=1024, tokenizer=loaded.tokenizer)
    calibration.calibrate(loaded, texts, calibration.chosen_modules(loaded.model, None)[0], options, path)
    return path


@pytest.fixture(scope="module")
def table(finished):
    return fit.Table.of(Run.open(finished).load("fit")[1], "gap")


def written(run, finished, output, engine="modelopt", *more):
    done = run("export", finished, "-o", output, "--to", engine, "--target-skip", RATE, "--json", *more)
    assert done.code == 0, done.err
    return json.loads(output.read_text()), json.loads(done.out), done.err


def test_the_curve_is_exact_at_the_rate_that_was_asked_for(table):
    curve = handover.fit_curve(table, RATE, [1024])
    one = handover.one_number(table, curve, RATE)
    assert one.total_skip == pytest.approx(RATE, abs=1e-9) and curve.b > 0
    assert curve.gap(RATE, 2048) == pytest.approx(curve.gap(RATE) - math.log(2))
    assert all(abs(target - reached) < 0.1 for target, reached in curve.rates) and len(curve.rates) >= 2


def test_one_number_agrees_with_the_curves_of_every_head(table):
    """Its thresholds are the same everywhere, so a point of that threshold in every unit must give the same."""
    curve = handover.fit_curve(table, RATE, [1024])
    entry = 30
    one = handover.one_number(table, _Same(float(table.values[entry])), RATE)
    expected = fit.evaluate(table, torch.full_like(table.candidates, entry), 0.99)
    assert one.total_skip == pytest.approx(expected.skip) and one.total_mass == pytest.approx(expected.dropped_mass)
    ours = handover.by_head(table, table, RATE)
    assert ours.total_mass <= handover.one_number(table, curve, RATE).total_mass


def test_a_layer_that_loses_most_is_kept_dense(table):
    """Every head as a module of its own, and one of those that skip made dear."""
    modules = {f"layer.{head}": slice(head, head + 1) for head in range(len(table.candidates))}
    apart = replace(table, modules=modules)
    dear = int(handover.one_number(apart, handover.fit_curve(apart, RATE, [1024]), RATE).skip.argmax())
    mass = table.mass.clone()
    mass[dear] *= 1000
    apart = replace(apart, mass=mass)
    curve = handover.fit_curve(apart, RATE, [1024])
    assert f"layer.{dear}" in curve.ignore and len(curve.ignore) <= len(modules) // 4
    one = handover.one_number(apart, curve, RATE)
    assert one.total_skip == pytest.approx(RATE) and one.skip[dear] == 0
    gap = next(gap for gap in torch.arange(-30, 0, 0.01).tolist() if _skip(apart, gap) >= RATE)
    assert one.total_mass < handover.one_number(apart, _Same(gap), RATE).total_mass


class _Same:
    """A curve with one threshold and no module kept dense."""

    def __init__(self, gap: float):
        self.gap, self.ignore = lambda rate: gap, ()


def _skip(table, gap: float) -> float:
    return handover.one_number(table, _Same(gap), RATE).total_skip


def test_a_run_of_int8_scores_is_refused(finished, tmp_path, run, one_sentence):
    copy = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((copy / "run.json").read_text())
    manifest["options"]["scores"] = "int8"
    (copy / "run.json").write_text(json.dumps(manifest))
    done = run("export", copy, "-o", tmp_path / "t", "--to", "trtllm", "--target-skip", RATE)
    one_sentence(done, 2, "statistics of int8 scores")


def test_what_the_engines_read(finished, tmp_path, run):
    whole, result, errors = written(run, finished, tmp_path / "new.json")
    group = whole["sparse_attention_config"]["config_groups"]["group_0"]
    assert group["algorithm"] == "skip_softmax" and group["target_sparsity"] == {"prefill": RATE}
    factor = group["threshold_scale_factor"]
    assert set(factor) == {"formula", "prefill"} and factor["formula"] == "a * exp(b * target_sparsity)"
    a, b = factor["prefill"]["a"], factor["prefill"]["b"]
    assert math.log(a * math.exp(b * RATE) / result["length"]) == pytest.approx(result["gap"])
    assert "one lambda drops" in errors and "merge it into" in errors
    assert len(result["heads"]) == 12 and result["one_number"]["dropped_mass"] >= result["by_head"]["dropped_mass"] / 2
    omni = written(run, finished, tmp_path / "omni.json", "vllm-omni")[0]["sparse_attention_config"]
    group = omni["config_groups"]["group_0"]
    assert group["threshold_scale_factor"]["coefficients"] == {"a": a, "b": b} and "target_sparsity" not in group


def test_a_checkpoints_configuration_is_completed_and_anything_else_left_alone(finished, tmp_path, run, one_sentence):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope": {"b": 1, "a": 2}}
    output = tmp_path / "config.json"
    output.write_text(json.dumps(config))
    whole, _, errors = written(run, finished, output, "trtllm")
    assert {key: whole[key] for key in config} == config and "the rest is as it was" in errors
    written(run, finished, output, "trtllm")  # again
    for other in ({"architectures": ["BertModel"]}, {"num_hidden_layers": 99}):
        output.write_text(json.dumps(config | other))
        one_sentence(run("export", finished, "-o", output, "--to", "trtllm", "--target-skip", RATE), 4, "the run")
        assert json.loads(output.read_text()) == config | other
    (tmp_path / "link.json").symlink_to(output)
    command = ("export", finished, "-o", tmp_path / "link.json", "--to", "trtllm", "--target-skip", RATE)
    one_sentence(run(*command), 4, "is a link")
    for content in ('{"x": 1}', "not JSON", "[]"):
        output.write_text(content)
        command = ("export", finished, "-o", output, "--to", "trtllm", "--target-skip", RATE)
        one_sentence(run(*command), 4, "it is left alone")
        assert output.read_text() == content


def test_layers_that_were_not_calibrated_stay_dense():
    assert handover.uncalibrated({"model.layers.1.self_attn": 4, "model.layers.3.self_attn": 4}, 5) == [
        f"model.layers.{i}.self_attn" for i in (0, 2, 4)
    ]
    assert handover.uncalibrated({"model.layers.0.self_attn": 4}, 1) == []
    with pytest.raises(UsageError, match="modules of 2 kinds"):
        handover.uncalibrated({"model.layers.0.self_attn": 4, "visual.blocks.0.attn": 4}, 1)
    with pytest.raises(UsageError, match="calibrate all layers"):
        handover.uncalibrated({"a.0.b.1.attn": 4}, 2)


def test_model_optimizer_reads_it(finished, tmp_path, run):
    reader = pytest.importorskip("modelopt.torch.sparsity.attention_sparsity.plugins.sparse_attn_config")
    from modelopt.torch.sparsity.attention_sparsity.methods.triton_skip_softmax import TritonSkipSoftmaxMethod

    whole, result, _ = written(run, finished, tmp_path / "config.json")
    whole["sparse_attention_config"]["config_groups"]["group_0"]["ignore"] = ["model.layers.1.self_attn"]
    found, name = reader.load_from_checkpoint_metadata(SimpleNamespace(**whole))
    assert name == "CHECKPOINT_CALIBRATED_SOFTMAX_SKIP"
    layers = [reader.match_sparse_config(f"model.layers.{i}.self_attn", found) for i in range(3)]
    assert [layer["enable"] for layer in layers] == [True, False, True]
    method = TritonSkipSoftmaxMethod({})
    method.calibration_params = layers[0]["threshold_scale_factor"]
    method.target_sparse_ratio = layers[0]["target_sparse_ratio"]
    threshold = method.get_inference_threshold(seq_q=1024, seq_k=result["length"])
    assert math.log(threshold) == pytest.approx(result["gap"])


def test_the_way_back_gives_the_same_lambda(finished, tmp_path, run):
    _, result, _ = written(run, finished, tmp_path / "config.json")
    options = ("--from-modelopt", tmp_path / "config.json", "-o", tmp_path / "t", "--json")
    done = run("export", finished, *options)
    assert done.code == 0, done.err
    artifact, length = Thresholds.read(tmp_path / "t"), json.loads(done.out)["length"]
    assert [point.name for point in artifact.points] == ["modelopt-20"]
    values = torch.cat([tensor.flatten() for tensor in artifact.tensors.values()]).unique()
    assert values.tolist() == [pytest.approx(result["gap"] + math.log(result["length"] / length), rel=1e-6)]
    assert artifact.points[0].fitted.skip == pytest.approx(RATE, abs=0.01)
    shorter = run("export", finished, *options, "--length", "512", "--target-skip", "0.1")
    assert shorter.code == 0 and json.loads(shorter.out)["points"][0]["name"] == "modelopt-10"
    model = build("bsfa")
    ids = torch.tensor([load_texts("builtin:mixed", samples=1, length=1024, tokenizer=build_tokenizer())[0].tokens])
    with apply(model, artifact, count=True), torch.inference_mode():
        model(ids, use_cache=False)
        assert 0.05 < skip_rate(model) < 0.5


def test_patterns_keep_modules_dense_on_the_way_back(finished, tmp_path, run):
    whole, *_ = written(run, finished, tmp_path / "config.json")
    group = whole["sparse_attention_config"]["config_groups"]["group_0"]
    group["ignore"], group["threshold_scale_factor"]["decode"] = ["*.1.self_attn", "layers.2"], {"a": 1.0, "b": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    done = run("export", finished, "--from-modelopt", tmp_path / "config.json", "-o", tmp_path / "t")
    assert done.code == 0 and "decoding are left out" in done.err
    kept = [bool(tensor.isfinite().any()) for tensor in Thresholds.read(tmp_path / "t").tensors.values()]
    assert kept == [True, False, False]


GROUP = {
    "algorithm": "skip_softmax", "targets": ["LlamaAttention"], "target_sparsity": {"prefill": 0.2},
    "threshold_scale_factor": {"formula": "a * exp(b * target_sparsity)", "prefill": {"a": 1.0, "b": 5.0}},
}  # fmt: skip


def changed(**changes):
    group = copy.deepcopy(GROUP)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = group
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return {"sparse_attention_config": {"config_groups": {"group_0": group}}}


@pytest.mark.parametrize(
    "config, code, said",
    [
        ({}, 4, "no sparse_attention_config with config_groups"),
        ([], 4, "must be a JSON object"),
        (changed(algorithm="sparse_softmax"), 4, "the algorithm is sparse_softmax"),
        (changed(initial_disabled_steps=3), 4, "initial_disabled_steps, which bsfa does not know"),
        (changed(threshold_scale_factor__formula="a + b"), 4, "its formula is a + b"),
        (changed(threshold_scale_factor__prefill=None), 4, "coefficients a and b, for prefill"),
        (changed(threshold_scale_factor__prefill={"log_a": 1, "b": 2}), 4, "must be a and b, got log_a, b"),
        (changed(threshold_scale_factor__prefill__a=True), 4, "a must be a finite number"),
        (changed(threshold_scale_factor__prefill__a=10**400), 4, "a must be a finite number"),
        (changed(targets=["Linear"]), 4, "targets must be a list of attention classes"),
        (changed(threshold_scale_factor__prefill__a=-1), 4, "a must be above 0"),
        (changed(threshold_scale_factor__prefill__b=1e9), 2, "the engines skip nothing from 1 on"),
        (changed(target_sparsity=2), 4, "target_sparsity must lie in [0, 1]"),
        (changed(target_sparsity=None), 2, "has no target_sparsity; give --target-skip"),
        (changed(ignore="x"), 4, "ignore must be a list of names"),
        (changed() | {"architectures": ["Qwen3ForCausalLM"]}, 4, "is of Qwen3ForCausalLM, and the run of Llama"),
        (changed() | {"num_hidden_layers": 32}, 4, "num_hidden_layers is 32, and 3 in the run's model"),
        ({"sparse_attention_config": {"config_groups": {"a": GROUP, "b": GROUP}}}, 4, "holds 2 groups"),
        ({"sparse_attention_config": {"config_groups": {"a": GROUP}, "x": 1}}, 4, "has x, unknown"),
    ],
)
def test_what_is_not_known_is_refused(config, code, said, finished, tmp_path, run, one_sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("export", finished, "--from-modelopt", tmp_path / "config.json", "-o", tmp_path / "t")
    one_sentence(done, code, said)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--to", "sglang", "--target-skip", "0.2"], "--to must be one of modelopt, trtllm, vllm-omni"),
        (["--to", "modelopt"], "give --target-skip"),
        (["--to", "modelopt", "--target-skip", "0.2", "--target-skip", "0.3"], "takes one --target-skip"),
        (["--to", "modelopt", "--target-skip", "1.5"], "between 0 and 1"),
        (["--to", "modelopt", "--top-k", "3"], "take RUN, -o and --target-skip"),
        (["--to", "modelopt", "--target-skip", "0.2", "--gate", "absolute"], "take RUN, -o and --target-skip"),
        (["--to", "modelopt", "--target-skip", "0.2", "--length", "512"], "take RUN, -o and --target-skip"),
        (["--to", "modelopt", "--target-skip", "0.2", "--quantile", "0.5"], "--quantile means nothing with --to"),
        (["--to", "modelopt", "--target-skip", "0.99"], "cannot be reached with one lambda below 1"),
        (["--to", "modelopt", "--from-modelopt", "x.json", "--target-skip", "0.2"], "give either --to or"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments, said, finished, tmp_path, run, one_sentence):
    code = 1 if "cannot be reached" in said else 2
    one_sentence(run("export", finished, "-o", tmp_path / "t", *arguments), code, said)
    assert not (tmp_path / "t").exists()
