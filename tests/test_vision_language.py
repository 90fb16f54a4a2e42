"""Vision-language checkpoints of four families: exact with every tile kept, gated as predicted, by modality."""

import copy
import json
import warnings

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import tiny_vlms
import torch
from bsfa_kernels.integrations.visual_tokens import VisualTokens
from bsfa_kernels.modality import IMAGE, MIXED, MODALITIES, TEXT, tile_modality
from bsfa_kernels.thresholds import Thresholds
from PIL import Image

from bsfa_cli.calibration import points, run
from bsfa_cli.calibration.store import Run
from bsfa_cli.data.image_questions import ImagePlan
from bsfa_cli.data.images import ImageData
from bsfa_cli.data.multimodal.scoring import followed
from bsfa_cli.data.prompts import load_prompts
from bsfa_cli.errors import InputError
from bsfa_cli.models.load import load_model
from bsfa_cli.models.prompts import Prompt
from bsfa_cli.suites.run import Examiner, Score

LENGTH = 768
SHAPES = "builtin:shapes"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: folder}, each saved when it is first asked for."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / family
            tiny_vlms.save(family, made[family])
        return made[family]

    return checkpoint


@pytest.fixture(scope="module")
def loaded(checkpoints):
    found = {}
    return lambda family: found.get(family) or found.setdefault(family, load_model(checkpoints(family), device="cpu"))


@pytest.fixture(scope="module")
def calibrated(loaded, tmp_path_factory):
    """{family: (its run on images, the sample of it that is fitted to)}, vision towers included."""
    found = {}

    def calibrate(family):
        if family not in found:
            model = loaded(family)
            samples = load_prompts(SHAPES, model, samples=1, length=LENGTH)
            modules, _ = run.chosen_modules(model.model, None, towers=True)
            options = run.Options(SHAPES, 1, LENGTH, 0, (64, 128), (1, 2), None, "cpu", "float32")
            path = tmp_path_factory.mktemp("run") / family
            run.calibrate(model, samples, modules, options, path)
            found[family] = Run.open(path), samples[0]
        return found[family]

    return calibrate


def logits(model, implementation, inputs):
    model.set_attn_implementation(implementation)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(**inputs).logits


def two_sequences(loaded, family):
    """Inputs of two prompts, the shorter one padded at its left."""
    parts = [load_prompts(SHAPES, loaded(family), samples=1, length=n, seed=i)[0] for i, n in enumerate((600, 450))]
    prompts = [Prompt.of(part, loaded(family).model).inputs for part in parts]
    longer, shorter = (prompt["input_ids"].shape[1] for prompt in prompts)
    inputs, pad = {}, longer - shorter
    for name in prompts[0]:
        one, two = (prompt[name] for prompt in prompts)
        if one.shape == (1, longer):
            two = torch.nn.functional.pad(two, (pad, 0), value=256 if name == "input_ids" else 0)
        inputs[name] = torch.cat([one, two])
    mask = torch.ones(2, longer, dtype=torch.int64)
    mask[1, :pad] = 0
    return inputs | {"attention_mask": mask}


def artifact_of(calibrated_run, gate="absolute", by_modality=True, rate=0.4):
    return points.export(calibrated_run, [points.Request("target-skip", rate, gate)], 0.99, by_modality=by_modality)


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_images_and_text_equal_eager_attention(family, loaded):
    model = loaded(family).model
    inputs = two_sequences(loaded, family)
    valid = inputs["attention_mask"].bool()
    expected = logits(model, "eager", inputs)[valid]
    actual = logits(model, "bsfa", inputs)[valid]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    bidirectional = "see one another both ways"
    unexpected = [note.reason for note in bsfa.notes(model) if not note.expected]
    assert all(bidirectional in reason for reason in unexpected) and (not unexpected or family == "gemma3")


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_thresholds_that_keep_everything_change_nothing(family, loaded, calibrated):
    model, (begun, _) = loaded(family).model, calibrated(family)
    artifact, *_ = artifact_of(begun)
    modal = {path: torch.full_like(tensor, -torch.inf) for path, tensor in artifact.modal.items()}
    rest = {name: value for name, value in vars(artifact).items() if name not in ("tensors", "modal")}
    inputs = two_sequences(loaded, family)
    valid = inputs["attention_mask"].bool()
    expected = logits(model, "eager", inputs)[valid]
    model.set_attn_implementation("bsfa")
    with bsfa.apply(model, Thresholds.by_modality(modal=modal, **rest), count=True):
        actual = logits(model, "bsfa", inputs)[valid]
        assert bsfa.skip_rate(model) == 0.0
        gated = [path for path, module in model.named_modules() if bsfa.active(module)]
        assert len(gated) == len(artifact.tensors)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("by_modality", [True, False])
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_tiles_are_skipped_as_the_statistics_predict(family, by_modality, loaded, calibrated):
    """On the calibrated sample, in the modules whose inputs no skipping has changed: the first of text and tower."""
    model, (begun, sample) = loaded(family).model, calibrated(family)
    for gate, rate in (("gap", 0.05), ("absolute", 0.4)):
        artifact, (report,), _ = artifact_of(begun, gate, by_modality, rate)
        handlers = bsfa.SparseAttention.for_model(artifact, bsfa.attention_modules(model), count=True)
        predicted = {module.path: module.fitted for module in report.modules}
        language = [path for path, module in bsfa.attention_modules(model).items() if not module.tower]
        tower = [path for path in predicted if path not in language]
        model.set_attn_implementation("bsfa")
        # The tower alone, then the language model alone.
        for paths in (tower, language):
            with bsfa.attach(model, {path: handlers[path] for path in paths}), torch.no_grad():
                model(**Prompt.of(sample, model).inputs)
            # Qwen2.5-VL's windows within an image are too small for a candidate.
            first = next(path for path in paths if predicted[path] is not None)
            kept, candidates = (int(x.sum()) for x in handlers[first].counts)
            assert candidates and 1 - kept / candidates == pytest.approx(predicted[first].skip, abs=1e-9)
        pairs = report.modalities["fitted"]
        shares = {(q, k): pair["share"] for q, row in pairs.items() for k, pair in row.items()}
        assert sum(shares.values()) == pytest.approx(1) and ("image", "image") in shares and "text" in pairs
        total = sum(pair["share"] * pair["skip"] for row in pairs.values() for pair in row.values())
        assert total == pytest.approx(report.point.fitted.skip)


def test_by_modality_loses_no_more_mass_where_it_is_fitted(calibrated):
    """Thresholds that may differ by modality include those that do not. Few tiles are shared out in lumps."""
    begun, _ = calibrated("llava")
    _, (apart,), _ = artifact_of(begun, by_modality=True)
    _, (together,), _ = artifact_of(begun, by_modality=False, rate=apart.point.fitted.skip)
    assert apart.point.fitted.skip <= together.point.fitted.skip
    assert apart.point.fitted.dropped_mass <= 1.02 * together.point.fitted.dropped_mass


def test_each_sequence_of_a_batch_has_thresholds_of_its_own_images(loaded, calibrated):
    model, (begun, _) = loaded("llava").model, calibrated("llava")
    artifact, *_ = artifact_of(begun)
    inputs = two_sequences(loaded, "llava")
    alone = []
    with bsfa.apply(model, artifact):
        both = logits(model, "bsfa", inputs)
        pad = int((inputs["attention_mask"][1] == 0).sum())
        for row, cut in ((0, 0), (1, pad)):
            ids = inputs["input_ids"][row : row + 1, cut:]
            images = int((ids == model.config.image_token_id).sum()) // tiny_vlms.TOKENS
            pixels = inputs["pixel_values"][:images] if row == 0 else inputs["pixel_values"][-images:]
            alone.append(logits(model, "bsfa", dict(input_ids=ids, pixel_values=pixels)))
    assert (both[0] - alone[0][0]).abs().max() < 1e-4 * both.abs().max()
    assert (both[1, pad:] - alone[1][0]).abs().max() < 1e-4 * both.abs().max()


def test_where_the_images_are_not_known_the_lowest_thresholds_hold(loaded, calibrated):
    model, (begun, sample) = loaded("llava").model, calibrated("llava")
    artifact, *_ = artifact_of(begun)
    lowest = Thresholds(**{**vars(artifact), "modal": {}})
    prompt = Prompt.of(sample, model)
    text = prompt.inputs["input_ids"].masked_fill(prompt.visual[None], 40)
    embeds = model.get_input_embeddings()(text).detach()
    found = {}
    for name, thresholds in (("by modality", artifact), ("lowest", lowest)):
        with bsfa.apply(model, thresholds, count=True):
            found[name, "embeddings"] = logits(model, "bsfa", dict(inputs_embeds=embeds))
            found[name, "ids"] = logits(model, "bsfa", dict(input_ids=text))
    assert torch.equal(found["by modality", "embeddings"], found["lowest", "embeddings"])
    assert not torch.equal(found["by modality", "ids"], found["lowest", "ids"])
    # What a pass has said is forgotten when it ends, and nothing stays on the model.
    assert not model.base_model._forward_pre_hooks and not model.base_model._forward_hooks


def test_a_copied_model_keeps_its_thresholds_by_modality(loaded, calibrated):
    model, (begun, sample) = loaded("qwen3-vl").model, calibrated("qwen3-vl")
    artifact, *_ = artifact_of(begun)
    inputs = Prompt.of(sample, model).inputs
    with bsfa.apply(model, artifact):
        expected = logits(model, "bsfa", inputs)
        copied = copy.deepcopy(model)
    dense = logits(model, "bsfa", inputs)
    assert torch.equal(logits(copied, "bsfa", inputs), expected) and not torch.equal(dense, expected)
    bsfa.remove(copied)
    assert torch.equal(logits(copied, "bsfa", inputs), dense)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_a_gpu_skips_by_modality_as_the_cpu_does(family, checkpoints, loaded, calibrated):
    """The fused kernel in bfloat16 near the reference in float32: tiles near their threshold may fall either way."""
    begun, sample = calibrated(family)
    artifact, *_ = artifact_of(begun)
    rates, found = [], []
    for model in (loaded(family).model, load_model(checkpoints(family), device="cuda", dtype="bfloat16").model):
        with bsfa.apply(model, artifact, count=True):
            found.append(logits(model, "bsfa", Prompt.of(sample, model).inputs).float().cpu())
            rates.append(bsfa.skip_rate(model))
    assert rates[0] > 0.2 and rates[1] == pytest.approx(rates[0], abs=0.05)
    assert found[1].isfinite().all() and (found[1] - found[0]).norm() < 0.25 * found[0].norm()


def test_modalities_of_tiles():
    visual = torch.zeros(400, dtype=torch.bool)
    visual[64:192] = visual[300:310] = True
    assert tile_modality(visual, 64, 7).tolist() == [TEXT, IMAGE, IMAGE, TEXT, MIXED, TEXT, TEXT]
    # Rows 40 .. of a prompt whose first 20 rows are padding stand at positions 20 ..
    assert tile_modality(visual, 64, 7, first=-20)[:3].tolist() == [MIXED, IMAGE, MIXED]
    assert tile_modality(visual, 64, 7, first=128)[2:5].tolist() == [TEXT, IMAGE, IMAGE]
    assert tile_modality(visual, 64, 7, end=64).tolist() == [TEXT] * 7
    assert VisualTokens().tiles(0, 1, 400, 64, 7, None, visual.device) is None


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_commands_on_a_checkpoint(family, checkpoints, run, tmp_path, one_sentence):
    model, begun, artifact = checkpoints(family), tmp_path / "run", tmp_path / "t.safetensors"
    common = ("--length", LENGTH, "--device", "cpu")
    result = run("calibrate", model, "-o", begun, "--samples", 2, *common)
    assert result.code == 0 and "2 attention modules stay dense: it belongs to a vision tower" in result.err
    result = run("export", begun, "-o", artifact, "--target-skip", 0.3, "--gate", "absolute", "--by-modality",
                 "--json")  # fmt: skip
    assert result.code == 0 and "query tiles of image" in result.err, result.err
    assert set(json.loads(result.out)["modalities"]["skip-30"]) == {"fitted", "held_out"}
    result = run("verify", model, "--thresholds", artifact, "--samples", 1, *common, "--max-kl-over-floor", 9,
                 "-o", tmp_path / "v.json", "--json")  # fmt: skip
    assert result.code == 0 and "tiles of images" in result.err, result.err
    (point,) = json.loads(result.out)["points"]
    assert point["logits"]["positions"] < LENGTH - tiny_vlms.TOKENS  # those before an image's tokens do not count
    told = point["modalities"]
    assert set(told) <= set(MODALITIES) and told["image"]["candidates"]
    assert sum(each["kept"] for each in told.values()) == point["calibrated"]["kept"]
    captured = run("capture", model, "-o", tmp_path / "c.safetensors", "--layers", 1, *common)
    if family == "gemma3":
        one_sentence(captured, 4, "can be captured", "see one another both ways")
        return
    assert captured.code == 0 and "1 layers" in captured.err
    if family != "qwen2.5-vl":
        return
    result = run("inspect", artifact)
    assert result.code == 0 and "text, image, mixed" in result.err
    assert run("report", tmp_path / "v.json", "-o", tmp_path / "r.html").code == 0
    assert "query tile" in (tmp_path / "r.html").read_text()
    result = run("profile", "--end-to-end", model, "--thresholds", artifact, "--lengths", 384, "--seconds", 0.01,
                 "--device", "cpu", "--language-only", "--json")  # fmt: skip
    (entry,) = json.loads(result.out)["prefill"]
    assert result.code == 0 and entry["visual_tokens"] >= tiny_vlms.TOKENS and entry["vision"] == "left out"


@pytest.mark.usefixtures("one_round")
def test_comparison_inside_a_checkpoint(checkpoints, run, tmp_path, one_sentence, calibrated):
    begun, _ = calibrated("llava")
    result = run("compare", checkpoints("llava"), "--run", begun.path, "--methods", "sliding_window,bsfa", "--length",
    640,
                 "--setting", "sliding_window=128", "--setting", "bsfa=0.05", "--samples", 1, "--seconds", 0.01,
                 "--device", "cpu", "--json")  # fmt: skip
    assert result.code == 0, result.err
    rows = json.loads(result.out)["cells"][0]["rows"]
    assert {row["method"] for row in rows} == {"dense", "sliding_window", "bsfa"} and all(row["finite"] for row in rows)
    result = run("compare", checkpoints("gemma3"), "--methods", "sliding_window", "--length", 320, "--samples", 1,
                 "--seconds", 0.01, "--device", "cpu")  # fmt: skip
    one_sentence(result, 4, "cannot be compared", "see one another both ways")


def test_what_is_refused_in_one_sentence(checkpoints, run, tmp_path, one_sentence, random_model):
    model, place = checkpoints("llava"), ("-o", tmp_path / "run", "--device", "cpu")
    one_sentence(
        run("calibrate", model, *place, "--length", 256, "--data", f"{SHAPES},builtin:prose"), 2, "images", "texts"
    )
    one_sentence(run("calibrate", random_model, *place, "--data", SHAPES), 4, "reads text only")
    one_sentence(run("calibrate", model, *place, "--length", 256, "--include-vision", "--data", "builtin:prose"), 2,
                 "--include-vision needs samples with images")  # fmt: skip
    one_sentence(run("calibrate", random_model, *place, "--length", 256, "--include-vision"), 2, "no vision tower")
    result = run("calibrate", model, *place, "--length", 512, "--samples", 1, "--data", "builtin:prose")
    assert result.code == 0
    export = ("export", tmp_path / "run", "-o", tmp_path / "t", "--by-modality")
    one_sentence(run(*export, "--target-skip", 0.2), 2, "--by-modality needs a run on images without --gradients")
    one_sentence(run(*export, "--top-k", 1), 2, "--top-k has thresholds by position alone")
    (broken := tmp_path / "broken").mkdir()
    for file in model.iterdir():
        if file.name not in ("processor_config.json", "preprocessor_config.json"):
            (broken / file.name).write_bytes(file.read_bytes())
    one_sentence(
        run("calibrate", broken, "-o", tmp_path / "b", "--device", "cpu", "--data", SHAPES), 4, "the processor of"
    )
    result = run("calibrate", broken, "-o", tmp_path / "b", "--device", "cpu", "--length", 256, "--samples", 1)
    assert result.code == 0  # of use for text


@pytest.fixture
def vqa(tmp_path):
    """12 questions about 12 images, answers A to D."""
    entries = []
    for i in range(12):
        Image.new("RGB", (28, 28), (20 * i, 90, 0)).save(tmp_path / f"{i}.png")
        entries.append(
            {"image": f"{i}.png", "question": f"Which {i}?", "question_id": i, "answer": ["ABCD"[i % 4]] * 2}
        )
    (tmp_path / "vqa.json").write_text(json.dumps(entries))
    return tmp_path / "vqa.json"


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_a_benchmarks_own_questions_are_asked(family, checkpoints, calibrated, run, tmp_path, vqa, monkeypatch):
    drawn, questions_for = [], ImagePlan.questions_for

    def watched(plan, *arguments):
        drawn.append([sample.id for sample in plan.drawn])
        return questions_for(plan, *arguments)

    monkeypatch.setattr(ImagePlan, "questions_for", watched)
    artifact, _, _ = artifact_of(calibrated(family)[0])
    artifact.write(tmp_path / "t.safetensors")
    asked = ("verify", checkpoints(family), "--thresholds", tmp_path / "t.safetensors", "--tasks", vqa, "--image-root",
             vqa.parent, "--questions", 3, "--device", "cpu", "--json")  # fmt: skip
    result = run(*asked, "--length", 600)
    assert result.code == 0, result.err
    assert "3 questions of" in result.err and "by likelihood" in result.err
    found = json.loads(result.out)
    (point,) = found["points"]
    assert [found["seed"], found["tasks"]["seed"]] == [1, 1]  # another one than calibration's, and the one drawn by
    ids = [sample.id for sample in ImagePlan(ImageData.of(str(vqa), vqa.parent), 3, 600, 1).drawn]
    assert drawn[-1] == ids
    assert point["by_task"]["vqa"]["questions"] == 3 and set(point["by_length"]) == {"600"} and point["skip"] > 0.05
    alone = run(*asked)
    assert alone.code == 0, alone.err
    assert not json.loads(alone.out)["points"][0]["by_length"]  # of lengths of their own


def test_questions_stand_behind_others_as_one_conversation(loaded, vqa):
    plan = ImagePlan(ImageData.of(str(vqa), vqa.parent), 2, 900)
    plan.check()
    examiner = Examiner(loaded("llava").model, loaded("llava").tokenizer)
    for question in plan.questions_for(loaded("llava").processor):
        asked = question.asked()
        longest = len(asked.prompt.tokens) + max(map(len, asked.continuations))
        parts = [part.id for part in asked.prompt.parts]
        assert 600 < longest <= 900 and len(set(parts)) == len(parts) == 4 and parts[-1] == question.sample.id
        # What each candidate's likelihood is, from a forward pass of its own over the whole.
        totals = []
        for tokens in asked.continuations:
            whole = followed(asked.prompt, tokens)
            logits = loaded("llava").model(**Prompt.of(whole, loaded("llava").model).inputs).logits[0].detach()
            log_p = logits[-len(tokens) - 1 : -1].log_softmax(-1)
            totals.append(float(log_p.gather(1, torch.tensor(tokens)[:, None]).sum()))
        chosen = question.weigh(totals, list(map(len, asked.continuations)))
        assert examiner.ask(question) == Score(chosen.credit > 0.5, chosen.credit)
    short = ImagePlan(plan.data, 1, 20)
    with pytest.raises(InputError, match=r"vqa.json.*tokens, more than --length 20"):
        next(short.questions_for(loaded("llava").processor)).asked()
    (last,) = ImagePlan(plan.data, 1).questions_for(loaded("llava").processor, most=20)
    with pytest.raises(InputError, match="past the model's 20 positions"):
        last.asked()


def test_questions_about_images_that_cannot_be_asked(checkpoints, run, tmp_path, vqa, one_sentence, calibrated,
                                                      random_model):  # fmt: skip
    artifact, _, _ = artifact_of(calibrated("llava")[0])
    artifact.write(tmp_path / "t.safetensors")
    asked = ("verify", checkpoints("llava"), "--thresholds", tmp_path / "t.safetensors", "--device", "cpu", "--tasks",
             vqa, "--image-root", vqa.parent)  # fmt: skip
    one_sentence(run(*asked, "--lengths", "400"), 2, "--lengths does not go with questions about images; give --length")
    one_sentence(run(*asked, "--save-questions", tmp_path / "q.jsonl"), 2, "--save-questions does not go with")
    one_sentence(run(*asked, "--data", vqa), 2, "--data and --tasks")
    one_sentence(run(*asked, "--repeat-data"), 2, "--repeat-data packs texts")
    one_sentence(run(*asked[:-1], tmp_path / "nothing"), 4, "nothing is no folder")
    one_sentence(run(*asked, "--length", 10**7), 2, "--length 10000000 is past the model's")
    vqa.write_text(json.dumps([{"image": "0.png", "question": "?", "question_id": 1, "answer": ["x"]}]))
    one_sentence(run(*asked), 4, "holds no question with an answer and other candidates")
    vqa.write_text("[]")
    one_sentence(run(*asked), 4, "holds no record")
