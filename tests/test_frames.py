"""Frames, questions about them and the bundled vision-language model's training, at toy size."""

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bsfa_cli.data import frame_tasks, frames
from bsfa_cli.data.frame_questions import FramePlan, pixel_values
from bsfa_cli.data.plans import plan
from bsfa_cli.data.texts import load_texts
from bsfa_cli.errors import UsageError
from bsfa_cli.models.bundled import BUNDLED
from bsfa_cli.models.load import load_model
from bsfa_cli.suites.run import Answer, Examiner, Score
from bsfa_cli.suites.summary import summarise
from bsfa_cli.training import frame_curriculum, frame_model, vision
from bsfa_cli.training.loop import Budget

SHAPE = {
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 64},
    "vision": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
}  # fmt: skip
PHASE = frame_curriculum.FramePhase(1.0, 400, 4, 3, 0.5, 1, 1)


class Inline:
    """A pool of one: this process."""

    imap = staticmethod(map)


class Trainer(vision.FrameTrainer):
    chunk_steps = 2


def trainer(out, chunks=2):
    values, pixels = vision.render_bank(12, False, Inline())
    return Trainer(
        frame_model.build(SHAPE, 0), (PHASE,), Budget(1.0, chunks), values=values, pixels=pixels, pool=Inline(), seed=3,
        learning_rate=1e-3, out=out,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames") / "model"
    frame_model.export(frame_model.build(SHAPE, 0), folder)
    return folder


def test_a_frame_is_drawn_from_its_values_and_seed():
    values = [0, 0, 3, 7, 0]  # a red circle southeast, seven, on black
    frame = frames.render(values, 5, held_out=True)
    assert frame.shape == (frames.SIDE, frames.SIDE, 3) and frame.dtype == np.uint8
    assert np.array_equal(frame, frames.render(values, 5, held_out=True))
    assert not np.array_equal(frame, frames.render(values, 6, held_out=True))
    red, green, blue = frame[frames.SIDE * 3 // 4, frames.SIDE * 3 // 4]
    assert red > 180 and green < 80 and blue < 80
    marked = frames.render(values, 5, held_out=True, marked=True)
    assert tuple(marked[0, 40]) == frames.MARK and np.array_equal(marked[20:60, 20:60], frame[20:60, 20:60])


@pytest.mark.parametrize("attribute", range(5))
def test_every_value_shows(attribute):
    seen = set()
    for value in range(frames.SIZES[attribute]):
        values = [1, 1, 1, 1, 1]
        values[attribute] = value
        seen.add(frames.render(values, 0, held_out=False).tobytes())
    assert len(seen) == frames.SIZES[attribute]


def test_held_out_digits_are_other_images():
    trained, held_out = (
        {image.tobytes() for images in frames.digit_images(side) for image in images} for side in (False, True)
    )
    assert len(trained) + len(held_out) > 1700 and len(trained & held_out) <= 2  # the set holds a few twins


@pytest.mark.parametrize("task", frame_tasks.NAMES)
def test_the_answer_stands_where_the_question_says(task):
    for index, ask_at in ((0, 1.0), (9, 1.0), (4, 0.5)):
        question = FramePlan((task,), (1500,), 10, ask_at=ask_at).draw(task, 1500, index)
        words = [frame_tasks.WORDS[token] for token in question.tokens]
        assert len(words) == 1500 and question.batch.tail == (0 if ask_at == 1 else question.batch.tail) >= 0
        end = len(words) - question.batch.tail - 1
        answer = words[end - question.batch.answer_length : end]
        assert tuple(answer) == question.outputs and words[end] == "."
        count = words.count("<image>") // frames.TOKENS
        assert count == len(question.values) and question.extra["pixel_values"].shape[0] == count
        start = len(words) - words[::-1].index("Question") - 1
        shown = [i for i, word in enumerate(words) if word == "<image>" and i < start]
        before, asked = len(shown) // frames.TOKENS, words[start:end]
        assert before == max(1, round(count * ask_at))
        labels = [words[i + 2] for i in range(start) if words[i : i + 2] == ["<image>", "frame"]]
        target = question.marked if task == "video-needle" else labels.index(
            answer[0] if task == "retrieval" else asked[asked.index("?") - 1]
        )  # fmt: skip
        assert target < before
        caption = [values[i] for values, i in zip(frames.ATTRIBUTES.values(), question.values[target], strict=True)]
        if task == "retrieval":
            assert asked[5:10] == caption
            assert (question.values == question.values[target]).all(1).sum() == 1
        else:
            assert task == "subtitles" or set(answer) <= set(caption)


def test_depth_is_the_tenth_of_the_frames():
    drawn = [FramePlan(("video-needle",), (8192,), 10).draw("video-needle", 8192, depth) for depth in range(10)]
    for depth, question in enumerate(drawn):
        assert question.depth == depth and int(10 * question.marked / len(question.values)) in (depth - 1, depth)


def test_pixel_values_are_the_processors(checkpoint):
    from PIL import Image

    frame = frames.render([2, 3, 1, 5, 2], 1, held_out=False)
    given = frame_model.build_processor()(
        images=[Image.fromarray(frame)], text="<image> frame 7: lantern.", return_tensors="pt"
    )
    ours = pixel_values(torch.from_numpy(frame)[None])
    assert torch.allclose(given["pixel_values"], ours, atol=1e-5)
    words = [frame_tasks.WORDS[token] for token in given["input_ids"][0]]
    assert words == ["<s>", *["<image>"] * frames.TOKENS, "frame", "7", ":", "lantern", "."]


def test_the_checkpoint_is_one_that_transformers_reads(checkpoint):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "LlavaForConditionalGeneration"
    assert frame_tasks.is_bundled(AutoTokenizer.from_pretrained(checkpoint))


def test_the_examiner_shows_the_images(checkpoint):
    loaded = load_model(checkpoint, device="cpu")
    assert "frames" in loaded.label
    asked = list(plan("frames", (700,), 1, ask_at=0.5).questions_for(loaded.tokenizer))
    examiner, shown = Examiner(loaded.model, loaded.tokenizer), []
    hook = loaded.model.model.vision_tower.register_forward_hook(lambda module, given, output: shown.append(given[0]))
    scores = [examiner.ask(question) for question in asked]
    hook.remove()
    assert [question.task for question in asked] == list(frame_tasks.NAMES)
    assert [len(pixels) for pixels in shown] == [len(question.values) for question in asked]
    answers = [Answer(question, score) for question, score in zip(asked, scores, strict=True)]
    found = summarise(answers, answers)
    assert {name: part["questions"] for name, part in found["by_modality"].items()} == {"image": 4, "text": 1}
    assert summarise([Answer(asked[0], Score(True, 1.0))], answers[:1])["by_modality"]["image"]["exact"] == 1


def test_calibration_data_holds_the_pixels_and_other_digits(checkpoint):
    loaded = load_model(checkpoint, device="cpu")
    samples = load_texts("tasks:vqa,retrieval", samples=2, length=700, tokenizer=loaded.tokenizer, seed=0)
    assert [sample.id for sample in samples] == ["vqa-0", "retrieval-0"]
    assert all(sample.extra["pixel_values"].shape[1:] == (3, frames.SIDE, frames.SIDE) for sample in samples)
    held_out = FramePlan(("vqa",), (700,), 1).draw("vqa", 700, 0)
    assert held_out.held_out and tuple(held_out.tokens) != samples[0].tokens


@pytest.mark.parametrize(
    "spec, lengths, words",
    [
        ("vqa,single", (4096,), "on their own"), ("frames", (300,), "tokens, got 300"),
        ("frames", (10**6,), "tokens, got 1000000"), ("vqua", (4096,), "no task 'vqua'"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(spec, lengths, words):
    with pytest.raises(UsageError, match=words):
        plan(spec, lengths, 1)


def test_other_models_are_not_asked_about_frames(checkpoint):
    from bsfa_cli.data.vocabulary import build_tokenizer

    with pytest.raises(UsageError, match="frames-llava"):
        next(plan("frames", (700,), 1).questions_for(build_tokenizer()))
    with pytest.raises(UsageError, match="about frames"):
        next(plan("single", (700,), 1).questions_for(load_model(checkpoint, device="cpu").tokenizer))


def test_training_looks_as_the_model_does(tmp_path):
    """The losses are those of LlavaForConditionalGeneration's own forward."""
    one = trainer(tmp_path)
    batch = next(one._batches(PHASE, random.Random(0)))
    kind, loss, *_ = one._losses(batch)
    shown = frame_model.marked_frames(one.pixels[torch.from_numpy(batch.images)], batch.marks)
    tokens = torch.from_numpy(batch.tokens).long()
    hidden = one.model.model(input_ids=tokens, pixel_values=pixel_values(shown), use_cache=False).last_hidden_state
    logits = one.model.lm_head(hidden).flatten(0, 1)[torch.from_numpy(batch.predicting)]
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.target), reduction="none")
    count = len(batch.kind)
    expected = [each[torch.from_numpy(batch.question) == question].mean() for question in range(count)]
    assert torch.allclose(loss[:count], torch.stack(expected), atol=1e-5)
    assert len(loss) == len(kind) == count + len(shown)  # and each frame's alignment
    assert torch.equal(tokens.flatten()[torch.from_numpy(batch.predicting) + 1], torch.from_numpy(batch.target))
    assert batch.marks.sum() == PHASE.rows - PHASE.described - PHASE.repeats


def test_alignment_is_best_where_the_output_is_the_words_shown():
    embedding = torch.eye(len(frame_tasks.WORDS))
    values = torch.tensor([[2, 7, 3, 9, 0], [0, 0, 0, 0, 3]])
    words = torch.from_numpy(frame_tasks.FIRST_VALUES) + values
    seen = embedding[words].sum(1, keepdim=True).expand(-1, frames.TOKENS, -1)
    logits = frame_model.alignment_logits(seen, embedding)
    assert [part.shape[1] for part in logits] == frames.SIZES.tolist()
    assert torch.equal(torch.stack([part.argmax(-1) for part in logits], 1), values)


def test_it_begins_with_heads_that_look_back_for_a_match():
    model = frame_model.build(frame_model.FULL, 0).eval()
    frame_model.begin_with(model, BUNDLED, 0)
    words = torch.randint(frame_tasks.IDS[frame_tasks.IMAGE] + 1, len(frame_tasks.WORDS), (4, 24))
    with torch.no_grad():
        predicted = model(input_ids=words.repeat(1, 2)).logits.argmax(-1)
    assert (predicted[:, 24:-1] == words[:, 1:]).float().mean() > 0.8


def test_no_answer_stands_in_the_text_before():
    """Every frame is asked about once while there are frames left, the marked one once an attribute."""
    rng = np.random.default_rng(0)
    shown = frame_tasks.Frames.of(rng.integers(0, frames.SIZES, (200, 5)), 7, rng)
    asks, kinds = frame_curriculum._asks(shown, 180, 0.1, rng)
    needles = [ask for ask, kind in zip(asks, kinds, strict=True) if kind == frame_tasks.NEEDLE]
    assert len({ask.attribute for ask in needles}) == len(needles) > 2 and {ask.target for ask in needles} == {7}
    others = [ask.target for ask, kind in zip(asks, kinds, strict=True) if kind != frame_tasks.NEEDLE]
    assert len(set(others)) == len(others) == 180 - len(needles)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    first = trainer(tmp_path / "parts")
    first._chunk()
    first.save()
    second = trainer(tmp_path / "more")
    second.load(tmp_path / "parts" / "checkpoint")
    second.run()
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        one, other = (
            load_file(tmp_path / folder / "checkpoint" / f"{name}.safetensors") for folder in ("whole", "more")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("phase", frame_curriculum.FULL, ids=lambda phase: str(phase.length))
def test_batches_have_one_shape_for_each_length(phase):
    values = np.random.default_rng(0).integers(0, frames.SIZES, (8192, 5))
    first, second = (frame_curriculum.draw(phase, seed, values) for seed in (0, 1))
    assert first.tokens.shape == second.tokens.shape == (phase.rows, phase.length)
    assert first.images.shape == second.images.shape and len(first.image_at) == len(first.images) * frames.TOKENS
    kinds = {frame_curriculum.KINDS[kind] for kind in first.kind}
    assert len(kinds) > 0 or not phase.revisited
    assert not kinds or set(frame_tasks.NAMES) | {frame_curriculum.LOOK} <= kinds


def test_the_full_model_fits_the_package_and_a_lease():
    parameters = sum(parameter.numel() for parameter in frame_model.build(frame_model.FULL, 0).parameters())
    assert 2 * parameters < 10e6 and 4 * parameters < 16 * 2**20  # bfloat16 in the package, float32 in a checkpoint
