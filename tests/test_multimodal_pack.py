"""Packs of multimodal samples: their length, where samples and images lie, and what a processor refuses."""

import math
import re
from dataclasses import replace

import pytest
import tiny_processors
import torch
from PIL import Image

from bsfa_cli.data.multimodal import scoring
from bsfa_cli.data.multimodal.annotations import Annotations
from bsfa_cli.data.multimodal.media import Media
from bsfa_cli.data.multimodal.pack import TooShort, pack
from bsfa_cli.data.samples import MultimodalSample, image, text, turn
from bsfa_cli.data.texts import data_hash
from bsfa_cli.errors import InputError
from bsfa_cli.metrics.answers import choose, normalised, vqa_accuracy

TOKENS = {"llava": "<image>", "qwen": "<|image_pad|>", "gemma": "<image_soft_token>"}


def sample(number: int, answer: str | None = "red", images: int = 1, words: str = "Which colour?") -> MultimodalSample:
    pictures = [image(Image.new("RGB", (30 + 20 * (number % 3), 40), (number, 0, 0))) for _ in range(images)]
    facts = {"task": "vqa", "source": f"x.json, entry {number}"}
    return MultimodalSample([turn("user", *pictures, text(words))], str(number), answer and (answer,), facts)


def whole(processor, samples) -> dict:
    """What transformers makes of the same conversation."""
    messages = [
        message for each in samples for message in [*each.messages, turn("assistant", text(each.answer[0]))]
    ]  # fmt: skip
    said = processor.apply_chat_template(messages, tokenize=False)
    pictures = [picture for each in samples for picture in each.images()]
    bos = processor.tokenizer.bos_token
    return processor(
        text=[said], images=pictures, return_tensors="pt", add_special_tokens=not (bos and said.startswith(bos))
    )


@pytest.mark.parametrize("name", tiny_processors.ALL)
def test_a_pack_is_the_conversation_that_a_server_would_get(name):
    processor, samples = tiny_processors.ALL[name](), [sample(i) for i in range(4)]
    expected = whole(processor, samples)
    length = expected["input_ids"].shape[1]
    packed = pack(processor, samples, length)
    assert packed.tokens == tuple(expected["input_ids"][0].tolist())
    assert set(packed.inputs) == set(expected) - {"attention_mask"} and expected["attention_mask"].all()
    for key, tensor in packed.inputs.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0)
    assert [part.id for part in packed.parts] == list("0123") and all(part.whole for part in packed.parts)
    assert [part.start for part in packed.parts[1:]] == [part.stop for part in packed.parts[:-1]]
    assert packed.parts[0].start == 0 and packed.parts[-1].stop == length


@pytest.mark.parametrize("images", [1, 3])  # several stand next to each other, as frames do
@pytest.mark.parametrize("name", tiny_processors.ALL)
def test_no_length_cuts_an_image(name, images):
    processor, samples = tiny_processors.ALL[name](), [sample(i, images=images) for i in range(6)]
    marker = processor.tokenizer.convert_tokens_to_ids(TOKENS[name])
    complete = whole(processor, samples)["input_ids"][0].tolist()
    shortest, longest = 60, 60 + 2 * len(whole(processor, samples[:1])["input_ids"][0])
    for length in range(shortest, longest, 5):
        packed = pack(processor, samples, length)
        size, tokens = len(packed.tokens), packed.inputs["input_ids"][0]
        assert packed.tokens == tuple(complete[:size]) and length - 40 < size <= length
        # Every image's tokens are there, and the tensors are those of these images.
        inside = torch.zeros(size, dtype=torch.bool)
        for start, stop in packed.images:
            inside[start:stop] = True
        assert bool(inside[tokens == marker].all())
        count = int((tokens == marker).sum())
        if name == "qwen":
            assert len(packed.images) == len(packed.extra["image_grid_thw"])
            assert count == int(packed.extra["image_grid_thw"].prod(1).sum()) // 4
            assert tokens[-1] != processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
        else:
            assert len(packed.images) == len(packed.extra["pixel_values"])
            assert count == (16 if name == "llava" else 4) * len(packed.images)
        for key, tensor in packed.extra.items():
            assert "token_type" not in key or tensor.shape == (1, size)
        assert [part.whole for part in packed.parts[:-1]] == [True] * (len(packed.parts) - 1)
        assert packed.parts[-1].stop <= size


def test_too_little_data_is_refused_with_how_far_it_got_unless_repeats_are_allowed():
    processor, samples = tiny_processors.llava(), [sample(0), sample(1)]
    with pytest.raises(
        TooShort, match=r"data end after 2 sample\(s\) of 1\d\d tokens together, which do not reach 500"
    ):
        pack(processor, samples, 500)
    packed = pack(processor, samples, 500, repeat=True)
    assert len(packed.tokens) == 500
    assert [(part.id, part.repeat) for part in packed.parts] == [(str(i % 2), i // 2) for i in range(len(packed.parts))]
    assert "each up to 5 times" in packed.source
    assert pack(processor, [], 500) is None


def test_samples_without_answers_and_templates_that_look_ahead_are_chats_of_their_own():
    processor = tiny_processors.llava()
    packed = pack(processor, [sample(i, answer=None) for i in range(3)], 100)
    said = processor.tokenizer.decode(packed.tokens)
    assert said.count("[user") == 3 and "[assistant" not in said
    last = (
        "<s>{% for m in messages %}{% if loop.last %}LAST{% endif %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    packed = pack(tiny_processors.llava(last), [sample(i) for i in range(3)], 100)
    said = processor.tokenizer.decode(packed.tokens)
    assert said.startswith("<s>") and said.count("<s>") == 1 and said.count("LAST") == 2 and len(packed.parts) == 3


@pytest.mark.parametrize(
    "words, messages, template",
    [
        ("'<image>', which this model reads as an image", sample(0, words="<image>?"), None),
        ("'<image>', which this model reads as an image", sample(0, answer="<image>"), None),
        ("'<|vision_start|>', which this model reads", sample(0, words="<|vision_start|>"), None),
        ("chat template refuses a sample: no", sample(0), "{{ raise_exception('no') }}"),
        ("writes 0 placeholders for 1 images", sample(0), "text"),
    ],
)
def test_what_a_template_or_text_makes_impossible(words, messages, template):
    processor = tiny_processors.qwen() if "vision" in words else tiny_processors.llava(template)
    with pytest.raises(InputError, match=re.escape(words)):
        pack(processor, [messages], 50)


def test_images_of_a_sequence_have_a_limit(monkeypatch):
    from bsfa_cli.data.multimodal import encode

    monkeypatch.setattr(encode, "MOST_PIXELS", 2000)
    with pytest.raises(InputError, match="x.json, entry 0: its images have more than 2,000 pixels in all"):
        pack(tiny_processors.llava(), [sample(0, images=2)], 50)


def test_processors_that_cannot():
    processor = tiny_processors.llava()
    processor.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        pack(processor, [sample(0)], 50)
    with pytest.raises(InputError, match="takes no images"):
        pack(tiny_processors.tokenizer(chat_template="x"), [sample(0)], 50)
    thin = MultimodalSample(
        [turn("user", image(Image.new("RGB", (3000, 2))), text("?"))],
        "0",
        None,
        {"task": "vqa", "source": "x, entry 1"},
    )
    with pytest.raises(InputError, match="x, entry 1: the model's processor refuses it: .*aspect ratio"):
        pack(tiny_processors.qwen(), [thin], 50)


@pytest.fixture
def annotations(tmp_path):
    lines = ["image,question,question_id,answer"]
    for i in range(8):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,Which number?,{i},{i}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    return Annotations(str(tmp_path / "data.csv"), Media(tmp_path, 4))


def test_packs_share_no_sample_unless_they_repeat(annotations, tmp_path):
    processor = tiny_processors.llava()
    packs = annotations.packed(processor, samples=9, length=200)
    ids = [part.id for packed in packs for part in packed.parts]
    assert len(packs) == 2 and len(set(ids)) == len(ids) and len({packed.id for packed in packs}) == 2
    assert len(replace(annotations, repeat=True).packed(processor, samples=3, length=900)) == 3
    with pytest.raises(TooShort):
        annotations.packed(processor, samples=1, length=2000)
    before = data_hash(packs)
    assert before == data_hash(annotations.packed(processor, samples=9, length=200))
    changed = packs[0].parts[0].id
    Image.new("RGB", (40, 40), "white").save(tmp_path / f"{changed}.png")
    assert before != data_hash(annotations.packed(processor, samples=9, length=200))
    (tmp_path / f"{changed}.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=rf"{changed}.png is none of"):
        annotations.packed(processor, samples=1, length=200)


@pytest.mark.parametrize("name", tiny_processors.ALL)
def test_questions_end_where_their_answer_begins(name):
    processor = tiny_processors.ALL[name]()
    first, second = (replace(sample(i), metadata=sample(i).metadata | {"options": ("red", "blue")}) for i in range(2))
    asked = scoring.ask(processor, second, [first])
    assert processor.tokenizer.decode(asked.prompt.tokens).endswith("assistant\n")
    assert [processor.tokenizer.decode(tokens) for tokens in asked.continuations] == ["red", "blue"]
    assert [part.id for part in asked.prompt.parts] == ["0", "1"] and len(asked.prompt.images) == 2
    assert asked.prompt.parts[1].stop == len(asked.prompt.tokens)
    expected = whole(processor, [first, second])["input_ids"][0].tolist()
    assert expected[: len(asked.prompt.tokens)] == list(asked.prompt.tokens)
    with pytest.raises(InputError, match="cannot be scored by likelihood"):
        scoring.ask(processor, first if name == "none" else sample(0), ())


def test_open_questions_get_candidates_that_are_wrong():
    samples = [replace(sample(i, answer=f"{i % 4}"), id=str(i)) for i in range(12)]
    found = scoring.with_candidates([*samples, sample(99, answer=None)], 3)
    assert len(found) == 12
    for each in found:
        options = each.metadata["options"]
        assert len(set(options)) == 3 and [scoring.credit(each, option) for option in options].count(0) == 2
    assert found == scoring.with_candidates(samples, 3) != scoring.with_candidates(samples, 3, seed=1)


def test_scores():
    vqa = replace(sample(0), metadata={"task": "vqa", "source": "x", "options": ("red", "blue"), "counts": {"red": 10}})
    assert scoring.score(vqa, [-1.0, -2.0]).credit == 1.0 and scoring.score(vqa, [-2.0, -1.0]).credit == 0.0
    caption = replace(vqa, metadata={"task": "caption", "source": "x", "options": ("red", "blue")})
    assert (
        scoring.score(caption, [-4.0, -3.0], [8, 2]).rank == 1
        and scoring.score(caption, [-4.0, -3.0], [1, 1]).rank == 2
    )
    assert choose(("a", "b"), (-1.0, -1.0), (1.0, 0.0)) == choose(("a", "b"), (-1.0, -1.0), (0.0, 1.0))
    assert choose(("a", "b"), (-1.0, -1.0), (1.0, 0.0)).rank == 2
    assert choose(("a",), (-1.0,), (0.0,)).rank is None
    with pytest.raises(ValueError, match="NaN"):
        choose(("a", "b"), (math.nan, -1.0), (1.0, 0.0))


@pytest.mark.parametrize(
    "answer, counts, expected",
    [
        ("red", {"red": 10}, 1.0),
        ("red", {"red": 3, "blue": 7}, 0.9),  # three times (2/3), seven times 1
        ("red", {"red": 1, "blue": 9}, 0.3),
        ("red", {"blue": 10}, 0.0),
        ("the Red.", {"red": 4, "a red": 2, "blue": 4}, 1.0),
        ("2", {"two": 5, "three": 5}, 1.0),
        ("dont", {"don't": 6, "no": 4}, 1.0),
        ("red", {"red": 1}, 1.0),
        ("red", {"red": 1, "dark red": 1}, 1.0),
    ],
)
def test_vqa_accuracy(answer, counts, expected):
    assert vqa_accuracy(answer, counts) == pytest.approx(expected)


def test_answers_are_compared_as_vqa_compares_them():
    assert normalised("A man, a  plan!") == "man plan"
    assert (
        normalised("1,000") == "1000"
        and normalised("3.5 in.") == "3.5 in"
        and normalised("black/white") == "black white"
    )
