"""bsfa export: points of a run, those that it cannot give, the search for one, and what the artifact then does."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels.integrations.transformers import active, apply
from bsfa_kernels.thresholds import Point, Reached, Thresholds
from random_llama import build, build_tokenizer

from bsfa_cli.calibration import fit, points
from bsfa_cli.calibration import run as calibration
from bsfa_cli.calibration.store import Run
from bsfa_cli.data.texts import load_texts
from bsfa_cli.errors import UsageError
from bsfa_cli.models.load import load_model
from bsfa_cli.verification import search
from bsfa_cli.verification.search import Limit, Measured, Search

pytestmark = pytest.mark.usefixtures("random_model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, random_model):
    """The run of `bsfa calibrate --samples 5 --length 768 --top-k 1,2,3`."""
    path, loaded = tmp_path_factory.mktemp("finished") / "run", load_model(None, device="cpu")
    options = calibration.Options("builtin:mixed", 5, 768, 0, (64, 128), (1, 2, 3), None, "cpu", "float32")
    texts = load_texts(options.data, samples=5, length=768, tokenizer=loaded.tokenizer)
    calibration.calibrate(loaded, texts, calibration.chosen_modules(loaded.model, None)[0], options, path)
    return path


@pytest.fixture
def bsfa(run):
    """(exit code, stdout, stderr) of a command line."""

    def call(*arguments):
        done = run(*arguments)
        return done.code, done.out, done.err

    return call


def export(bsfa, run, output, *points):
    code, out, errors = bsfa("export", run, "-o", output, "--json", *points)
    assert code == 0, errors
    return json.loads(out), errors


def test_export_is_byte_identical_and_readable(finished, tmp_path, bsfa):
    points = ["--target-skip", "0.1", "--target-skip", "0.05", "--max-dropped-mass", "0.1", "--top-k", "2"]
    result, errors = export(bsfa, finished, tmp_path / "a", *points)
    export(bsfa, finished, tmp_path / "b", *points)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    artifact = Thresholds.read(tmp_path / "a")
    assert [point.name for point in artifact.points] == ["topk-2", "skip-10", "skip-5", "mass-0.1"]
    assert [point.gate for point in artifact.points] == ["absolute", "gap", "gap", "gap"]
    assert 0.1 <= artifact.points[1].fitted.skip < 0.15 and artifact.points[1].held_out is not None
    assert artifact.provenance["samples"]["heldout"] == ["mixed-3"]
    assert result["bytes"] == (tmp_path / "a").stat().st_size and "on held-out ones" in errors
    assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("gate", ["gap", "absolute"])
def test_the_first_layer_skips_on_held_out_text_what_the_table_says(gate, finished, tmp_path, bsfa):
    """Later layers see what skipping changed before them; the first sees what calibration saw."""
    result, _ = export(bsfa, finished, tmp_path / "t", "--target-skip", "0.15", "--gate", gate)
    model = build("bsfa")
    samples = load_texts("builtin:mixed", samples=5, length=768, tokenizer=build_tokenizer())
    with apply(model, tmp_path / "t", count=True), torch.inference_mode():
        model.model(input_ids=torch.tensor([samples[3].tokens]), use_cache=False)
        counts = active(model.model.layers[0].self_attn).counts
    expected = result["modules"]["skip-15"][0]["held_out"]["skip"]
    assert 1 - int(counts.kept.sum()) / int(counts.candidates.sum()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["{run}"], 2, "give -o"),
        (["{run}", "-o", "{tmp}/t"], 2, "which operating points"),
        (["-o", "{tmp}/t", "--top-k", "2"], 2, "either a run directory or --from-official"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "5"], 1, "what was collected: 1, 2, 3"),
        (["{run}", "-o", "{tmp}/t", "--target-skip", "1.5"], 2, "between 0 and 1"),
        (["{run}", "-o", "{tmp}/t", "--target-skip", "0.999"], 1, "cannot be reached"),
        (["{run}", "-o", "{tmp}/t", "--max-dropped-mass", "1e-6"], 1, "the least is 0.0001"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "2", "--top-k", "2"], 2, "asked for twice"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "2", "--gate", "both"], 2, "gap or absolute"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "2", "--quantile", "0"], 2, "--quantile must lie"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "2", "--model", "x"], 2, "--from-official"),
        (["{run}", "-o", "{tmp}/t", "--top-k", "2", "--data", "x.txt"], 2, "belong to --largest-skip-with"),
        (["{run}", "-o", "{tmp}/t", "--largest-skip-with", "top1=2"], 2, "at most 1"),
        (["{run}", "-o", "{tmp}/t", "--largest-skip-with", "kl=0.1", "--data", "x.txt"], 4, "x.txt does not exist"),
        (["{run}", "-o", "{tmp}/t", "--largest-skip-with", "kl=0.1", "--model", "x/y/z"], 4, "x/y/z does not exist"),
        (["{run}", "-o", "{run}/run.json/t", "--top-k", "2"], 2, "cannot write"),
        (["{tmp}/absent", "-o", "{tmp}/t", "--top-k", "2"], 4, "no run directory"),
        (["{tmp}", "-o", "{tmp}/t", "--top-k", "2"], 4, "holds no calibration run"),
    ],
)
def test_what_cannot_be_exported_gets_one_sentence(arguments, code, said, finished, tmp_path, bsfa):
    result = bsfa("export", *(argument.format(run=finished, tmp=tmp_path) for argument in arguments))
    assert result[0] == code and said in result[2] and "Traceback" not in result[2]
    assert not (tmp_path / "t").exists()


def test_points_out_of_reach_exit_with_1_and_leave_the_others(finished, tmp_path, bsfa):
    points = (
        "--target-skip",
        "0.1",
        "--target-skip",
        "0.999",
        "--top-k",
        "2",
        "--top-k",
        "7",
        "--one-threshold",
        "0.999",
    )
    code, out, errors = bsfa("export", finished, "-o", tmp_path / "t", "--json", *points)
    last = errors.splitlines()[-1]
    assert code == 1 and last.startswith(f"bsfa: {tmp_path / 't'} lacks topk-7: ")
    assert "skip-99.9: a skip rate of 0.999 cannot be reached" in last and "one-threshold-99.9: " in last
    assert [point.name for point in Thresholds.read(tmp_path / "t").points] == ["topk-2", "skip-10"]
    assert set(json.loads(out)["left_out"]) == {"topk-7", "skip-99.9", "one-threshold-99.9"}


def test_one_threshold_is_the_same_everywhere(finished, tmp_path, bsfa):
    export(bsfa, finished, tmp_path / "t", "--one-threshold", "0.1")
    artifact = Thresholds.read(tmp_path / "t")
    (point,) = artifact.points
    assert (point.name, point.recipe, point.gate) == ("one-threshold-10", "one-threshold", "gap")
    assert len({float(value) for tensor in artifact.tensors.values() for value in tensor.unique()}) == 1
    assert 0.1 <= point.fitted.skip < 0.2


def test_a_search_ends_at_the_largest_rate_that_keeps_its_limit(finished, tmp_path, bsfa):
    limits = ("--largest-skip-with", "top1=0.9", "--largest-skip-with", "kl=0.001", "--largest-skip-with", "kl=1e-12")
    texts = ("--samples", "2", "--length", "640", "--device", "cpu")
    code, out, errors = bsfa(
        "export", finished, "-o", tmp_path / "t", "--json", "--target-skip", "0.1", *limits, *texts
    )
    assert code == 1 and "lacks kl-1e-12: no skip rate keeps it: at 1 % skipped" in errors
    artifact, found = Thresholds.read(tmp_path / "t"), json.loads(out)["searched"]
    assert [point.name for point in artifact.points] == ["skip-10", "top1-0.9", "kl-0.001"]
    assert found == artifact.provenance["searched"] and found["top1-0.9"]["worst"] >= 0.9
    assert found["kl-0.001"]["value"] < found["kl-0.001"]["worst"] <= 0.001
    for name, each in found.items():
        point = artifact.points[artifact.index(name)]
        assert point.recipe == "target-skip" and point.argument == each["rate"]
    # The next step would miss the limit.
    loaded = load_model(None, device="cpu")
    others = load_texts(
        "builtin:mixed", samples=2, length=640, tokenizer=loaded.tokenizer, seed=found["kl-0.001"]["seed"]
    )
    searched = Search(loaded, Run.open(finished), others, "gap", 0.99)
    steps = round(found["kl-0.001"]["rate"] / search.STEP)
    assert steps == searched.rates or searched.at(steps + 1)["kl"].worst > 0.001


def test_a_search_takes_texts_that_the_run_has_not_seen(tmp_path, bsfa):
    lines = [json.dumps({"text": "".join(f"{i * j} " for j in range(300))}) for i in range(1, 5)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    options = ("--samples", "2", "--length", "512", "--data", tmp_path / "t.jsonl", "-o", tmp_path / "run")
    assert bsfa("calibrate", *options, "--device", "cpu")[0] == 0
    loaded, begun = load_model(None, device="cpu"), Run.open(tmp_path / "run")
    from bsfa_cli.commands.largest_skip import _texts

    texts = _texts(begun, str(tmp_path / "t.jsonl"), 9, 512, loaded)
    seen = {sample["id"] for sample in begun.manifest["samples"]}
    assert len(texts) == 2 and not seen & {text.id for text in texts}
    (tmp_path / "t.jsonl").write_text("\n".join(lines[int(name[-1]) - 1] for name in sorted(seen)))
    code, _, errors = bsfa("calibrate", *options, "--device", "cpu", "-o", tmp_path / "all")
    assert code == 0, errors
    command = ("export", tmp_path / "all", "-o", tmp_path / "t", "--largest-skip-with", "top1=0.9", "--device", "cpu")
    code, _, errors = bsfa(*command)
    assert code == 4 and "the run was calibrated on every text of it" in errors and not (tmp_path / "t").exists()


@pytest.mark.parametrize("text", ["top1", "top1=", "top1=x", "top1=1.1", "kl=-1", "kl=nan", "recall=0.9"])
def test_limits_that_cannot_be_meant(text):
    with pytest.raises(UsageError, match="--largest-skip-with"):
        Limit.parse(text)


def test_intervals_know_the_number_of_texts():
    """A few blocks that all agree still leave doubt, and blocks that differ leave more of it than alike ones."""
    few, many = (search.measure(torch.tensor([[128.0, 127, 128, 0.1, 0.2]] * n).double()) for n in (2, 200))
    assert few["top1"].value == many["top1"].value == 1 and few["top1"].worst < many["top1"].worst < 1
    even = search.measure(torch.tensor([[100.0, 99, 90, 1, 2]] * 10).double())
    mixed = search.measure(torch.tensor([[100.0, 99, 100, 0, 0], [100, 99, 80, 2, 4]] * 5).double())
    for metric, worse in (("top1", -1), ("kl", 1), ("perplexity-increase", 1)):
        assert even[metric].value == pytest.approx(mixed[metric].value)
        assert worse * mixed[metric].worst > worse * even[metric].worst
    assert even["perplexity-increase"].value == pytest.approx(math.expm1(20 / 990))
    assert not Limit("kl", 1.0).kept(search.measure(torch.tensor([[9.0, 8, 9, 0, 0]]).double())["kl"])
    assert not Limit("top1", 0.5).kept(Measured(math.nan, math.nan))


def test_bounds_hold_for_rows_and_use_the_mean_where_it_says_more():
    tiles, within = torch.tensor([100, 100]), torch.zeros(2, len(fit.LEVELS))
    within[0, 8:] = 100  # every query tile of the first unit stays within 0.01
    beyond = fit._beyond(tiles, within, torch.tensor([0.5, 0.02]))
    # Of the second unit, whose bounds are unknown, at most 0.02 / 0.01 = 2 query tiles' worth of rows drop over 0.01.
    assert float(beyond[8]) == pytest.approx(2) and float(beyond[0]) == 200
    table = SimpleNamespace(candidates=torch.tensor([50, 50]), tiles=tiles)
    reached = fit._reached(table, slice(None), 10.0, 0.52, beyond, 0.99)
    assert reached.dropped_mass_bound == fit.LEVELS[8] and reached.skip == 0.1
    assert fit._reached(table, slice(None), 10.0, 0.52, beyond, 1.0).dropped_mass_bound == 1.0


def test_a_rate_is_reached_on_held_out_samples_where_asked_for(finished, tmp_path, bsfa):
    path = tmp_path / "t.safetensors"
    result, errors = export(bsfa, finished, path, "--target-skip", "0.3", "--aim", "held-out")
    assert result["points"][0]["held_out"]["skip"] >= 0.3 and result["points"][0]["argument"] == 0.3
    assert Thresholds.read(path).provenance["aim"] == "held-out" and "below the 0.3" not in errors
    code, _, errors = bsfa("export", finished, "-o", path, "--target-skip", "0.3", "--aim", "all")
    assert code == 2 and "--aim must be fitted or held-out" in errors


def test_where_held_out_samples_skip_less_it_is_said_what_helps():
    reached, short = Reached(0.8, 0.01, 0.1), Reached(0.73, 0.01, 0.1)
    point = Point("skip-80", "gap", "target-skip", 0.8, 0.99, reached, short)
    said = points.remarks(points.Report(point, ()), [1000, 1024, 1048])
    assert "held-out samples skip 0.730, below the 0.8 asked for" in said[0]
    enough = "about 11 such texts, 11,264 tokens, bring it within 0.02, and --aim held-out reaches it now"
    assert f"fitted to 3 texts, 3,072 tokens; {enough}" in said[1]


def test_layers_kept_dense_skip_nothing_and_the_others_more(finished, tmp_path, bsfa):
    asked = ("--target-skip", "0.1", "--one-threshold", "0.1", "--max-dropped-mass", "0.1", "--top-k", "2")
    plain, _ = export(bsfa, finished, tmp_path / "plain", *asked)
    result, errors = export(bsfa, finished, tmp_path / "kept", *asked, "--keep-dense", "1")
    kept = Thresholds.read(tmp_path / "kept")
    assert not kept.tensors["model.layers.1.self_attn"].isfinite().any()
    assert kept.provenance["kept_dense"]["skip-10"] == ["model.layers.1.self_attn"]
    assert "skip-10 keeps every tile of model.layers.1.self_attn" in errors
    skips = {point["name"]: point["fitted"]["skip"] for point in result["points"]}
    assert skips["skip-10"] >= 0.1 and skips["one-threshold-10"] >= 0.1
    for name, modules in result["modules"].items():
        by_path = {module["path"]: module["fitted"]["skip"] for module in modules}
        before = {module["path"]: module["fitted"]["skip"] for module in plain["modules"][name]}
        assert by_path.pop("model.layers.1.self_attn") == 0, name
        assert all(skip >= before[path] for path, skip in by_path.items()), name
    result, _ = export(bsfa, finished, tmp_path / "auto", "--target-skip", "0.1", "--keep-dense", "auto:2")
    skips = [module["fitted"]["skip"] for module in result["modules"]["skip-10"]]
    assert sorted(skips)[:2] == [0, 0] and max(skips) >= 0.3


@pytest.mark.parametrize(
    "asked, words",
    [
        (("--target-skip", 0.1, "--keep-dense", "7"), "the run has no layer 7"),
        (("--target-skip", 0.1, "--keep-dense", "0-2"), "would keep all 3 modules dense"),
        (("--target-skip", 0.1, "--keep-dense", "auto:3"), "would keep all 3 modules dense"),
        (("--target-skip", 0.1, "--keep-dense", "auto:0"), "must be like 0-1,29 or auto:2"),
        (("--target-skip", 0.1, "--keep-dense", "first"), "--keep-dense must be like"),
        (("--top-k", 2, "--keep-dense", "auto:1"), "name layers for --top-k"),
        (("--keep-dense", "0"), "--keep-dense belongs to --target-skip"),
        (("--keep-dense", "0", "--target-skip", 0.1, "--largest-skip-with", "kl=0.1"), "take no search"),
    ],
)
def test_layers_that_cannot_be_kept_dense_are_refused(finished, tmp_path, run, one_sentence, asked, words):
    one_sentence(run("export", finished, "-o", tmp_path / "t", *asked), 2, words)
    assert not (tmp_path / "t").exists()


def test_a_rate_that_the_layers_left_cannot_give_is_no_wrong_command(finished, tmp_path, run, one_sentence):
    result = run("export", finished, "-o", tmp_path / "t", "--target-skip", 0.9, "--keep-dense", "0-1")
    one_sentence(result, 1, "cannot be reached")
    assert not (tmp_path / "t").exists()
