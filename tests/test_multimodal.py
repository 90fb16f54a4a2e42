"""Annotations of images and videos: every family, told by its keys, and one sentence for what cannot be used."""

import json
import os
import re

import pytest
from PIL import Image

from bsfa_cli.data.multimodal import images
from bsfa_cli.data.multimodal.annotations import Annotations
from bsfa_cli.data.multimodal.families import FAMILIES
from bsfa_cli.data.multimodal.media import Media, spread
from bsfa_cli.errors import InputError, UsageError

COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "yellow")


@pytest.fixture
def root(tmp_path):
    """Small images by name of their colour, and a video of 12 frames whose red channel counts up."""
    folder = tmp_path / "images"
    (folder / "clip").mkdir(parents=True)
    for colour in COLOURS:
        Image.new("RGB", (32, 24), colour).save(folder / f"{colour}.png")
    for i in range(12):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / "clip" / f"frame{i}.png")
    return folder


@pytest.fixture
def load(root, tmp_path):
    """Samples of records, or of the text of a file, in the order of the file."""

    def call(content, name="data.json", frames=4):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        annotations = Annotations(str(path), Media(root, frames))
        annotations.check()
        return sorted(annotations.samples(), key=lambda sample: natural(sample.metadata["source"]))

    return call


def natural(words: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", words)]


VQA = {"image": "red.png", "question": "Which colour?", "question_id": 7, "answer": ["red", "red", "dark red"]}
CAPTION = {"image": "red.png", "caption": "All red.", "image_id": "coco_1"}
RETRIEVAL = {"image": "red.png", "caption": ["All red.", "A red square."]}
VIDEO_QA = {"video": "clip.mp4", "question": "What is counted?", "question_id": "v1", "answer": "frames"}
NLVR = {"images": ["red.png", "blue.png"], "sentence": "Both are red.", "label": "False"}
LONG = {
    "id": "q_0", "video_path": "clip.mp4", "question": "Which?", "correct_choice": 1, "duration_group": 600,
    "question_category": "S2E", "option0": "this", "option1": "that", "option2": "N/A",
}  # fmt: skip
MME = {
    "videoID": "clip", "question_id": "001-1", "question": "Which?", "options": ["A. this", "B. that", "C. none"],
    "answer": "C", "duration": "long", "task_type": "Counting Problem",
}  # fmt: skip
PASSAGES = {
    "ctxs": [{"doc_id": 1, "title": "Red", "text": "A colour."}, {"doc_id": 2, "title": "T", "text": "Right."}],
    "positive_ctxs": [{"doc_id": 2}], "id": "p",
    "image": "red.png", "question": "What is this?", "answer": [["colour", "a colour"]],
}  # fmt: skip
HAYSTACK = {"id": "h", "ctxs": ["red.png", "blue.png"], "question": "Is there red?", "answer": 1}
PARAGRAPHS = [{"text": "Once <image> upon"}, {"text": "a time, <image>"}, {"text": "4711.", "has_answer": True}]
TEXT_NEEDLE = {
    "id": "n", "ctxs": PARAGRAPHS, "image_list": ["red.png", "blue.png"], "needle_image_list": None,
    "choices_image": [], "question": "Which number?", "answer": "4711",
}  # fmt: skip
COUNT = TEXT_NEEDLE | {
    "needle_image_list": ["green.png"], "question": "How often is <image> there?", "answer": [0, 1]
}  # fmt: skip
IMAGE_NEEDLE = TEXT_NEEDLE | {
    "choices_image": ["green.png", "red.png"], "needle_image_list": ["red.png"], "answer": 1,
}  # fmt: skip
PAGES = {"id": "d", "page_list": ["red.png", "blue.png"], "question": "What colour?", "answer": "blue"}
SUMMARY = {
    "id": "s", "image_list": ["red.png"], "summary": [{"section_title": "Red", "paragraphs": ["It is.", "Very."]}]
}  # fmt: skip


def shape(sample, root):
    """What is shown: names of images, and texts."""
    (message,) = sample.messages
    assert message["role"] == "user"
    return [
        str(part["image"].relative_to(root)) if part["type"] == "image" else part["text"] for part in message["content"]
    ]


def test_vqa(load, root):
    (sample,) = load([VQA])
    assert shape(sample, root) == ["red.png", "Which colour?\nAnswer with a word or a short phrase."]
    assert (sample.id, sample.answer) == ("7", ("red", "dark red"))
    assert sample.metadata == {"task": "vqa", "source": "data.json, entry 1", "counts": {"red": 2, "dark red": 1}}
    (asked,) = load([{key: VQA[key] for key in ("image", "question", "question_id")}])
    assert asked.answer is None


def test_captions_and_retrieval(load):
    caption, retrieval = load([CAPTION, RETRIEVAL])
    assert (caption.id, caption.answer, caption.metadata["task"]) == ("coco_1#1", ("All red.",), "caption")
    assert (retrieval.id, retrieval.metadata["task"]) == ("red.png#2", "retrieval")
    assert retrieval.answer == ("All red.", "A red square.")
    twice = load([CAPTION, CAPTION | {"caption": "Red indeed."}])
    assert len({sample.id for sample in twice}) == 2


def test_video_qa_shows_frames_spread_over_the_video(load, root):
    (sample,) = load([VIDEO_QA], frames=3)
    assert shape(sample, root)[:-1] == ["clip/frame2.png", "clip/frame6.png", "clip/frame10.png"]
    assert len(list(load([VIDEO_QA], frames=99)[0].images())) == 12
    assert spread(5, 5) == [0, 1, 2, 3, 4] and spread(1000, 2) == [250, 750]


def test_nlvr(load, root):
    (sample, other, third) = load([NLVR, NLVR | {"label": True}, NLVR | {"label": 0, "identifier": "x-1"}])
    assert shape(sample, root)[:4] == ["Left image:", "red.png", "Right image:", "blue.png"]
    assert [each.answer for each in (sample, other, third)] == [("False",), ("True",), ("False",)]
    assert third.id == "x-1#3" and sample.metadata["options"] == ("False", "True")


def test_multiple_choice_about_videos(load, root):
    (long,) = load([LONG])
    assert shape(long, root)[-1] == "Which?\nA. this\nB. that\nAnswer with the letter of the right option."
    assert long.answer == ("B",) and long.metadata["options"] == ("A", "B")
    assert (long.metadata["category"], long.metadata["length_class"]) == ("S2E", "600")
    (listed,) = load([{key: LONG[key] for key in ("id", "video_path", "question")} | {"candidates": ["x", "y"]}])
    assert listed.answer is None
    (mme,) = load([MME])
    assert shape(mme, root)[-1].startswith("Which?\nA. this\nB. that\nC. none\n") and mme.answer == ("C",)
    assert (mme.metadata["category"], mme.metadata["length_class"]) == ("Counting Problem", "long")


def test_mmlongbench_tells_its_tasks_apart(load, root):
    records = [PASSAGES, HAYSTACK, TEXT_NEEDLE, COUNT, IMAGE_NEEDLE, PAGES]
    found = load("\n".join(map(json.dumps, records)), "data.jsonl")
    tasks = [sample.metadata["task"] for sample in found]
    assert tasks == ["visual_rag", "visual_haystack", "text_needle", "image_count", "image_needle", "document_qa"]
    rag, haystack, needle, count, image_needle, pages = found
    assert shape(rag, root)[:2] == ["Red: A colour.\n\nT: Right.", "red.png"]
    assert rag.answer == ("colour", "a colour") and rag.metadata["depth"] == 1.0
    assert haystack.answer == ("Yes",) and shape(haystack, root)[:2] == ["red.png", "blue.png"]
    assert shape(needle, root)[:4] == ["Once ", "red.png", " upon\n\na time, ", "blue.png"]
    assert needle.metadata["depth"] == 1.0 and needle.answer == ("4711",)
    assert [path.stem for path in count.images()] == ["red", "blue", "green"] and count.answer == ("[0, 1]",)
    assert [path.stem for path in image_needle.images()] == ["red", "blue", "green", "red"]
    assert image_needle.answer == ("B",) and image_needle.metadata["options"] == ("A", "B")
    assert shape(pages, root)[:4] == ["Page 1:", "red.png", "Page 2:", "blue.png"]
    (summary,) = load([SUMMARY])
    assert summary.answer == ("Red\nIt is.\nVery.",) and summary.id == "s#1"


def test_every_shape_of_file(load):
    table = (
        'image,question,question_id,answer\nred.png,"Which, then?",1,"[""red"", ""dark""]"\nblue.png,Which?,2,blue\n'
    )
    for name, content in {
        "list.json": json.dumps([VQA]),
        "dict.json": json.dumps({"first": VQA}),
        "lines.jsonl": "\ufeff" + json.dumps(VQA) + "\n\n",
        "table.csv": table,
        "table.tsv": table.replace(",", "\t").replace("Which\t", "Which,").replace('""\t', '"",'),
    }.items():
        found = load(content, name)
        assert found[0].answer[0] == "red", name
    assert len(found) == 2 and found[1].metadata["source"] == "table.tsv, line 3"


def test_order_is_seeded_and_files_take_turns(load, root, tmp_path):
    for name in ("a", "b"):
        records = [VQA | {"question_id": f"{name}{i}"} for i in range(6)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    media = Media(root, 4)
    ids = [sample.id for sample in Annotations(f"{tmp_path}/a.json,{tmp_path}/b.json", media).samples(1)]
    assert [name.split(":")[0] for name in ids] == ["a.json", "b.json"] * 6 and len(set(ids)) == 12
    assert ids == [sample.id for sample in Annotations(f"{tmp_path}/a.json,{tmp_path}/b.json", media).samples(1)]
    assert ids != [sample.id for sample in Annotations(f"{tmp_path}/a.json,{tmp_path}/b.json", media).samples(2)]


def test_images_are_not_opened_before_they_are_packed(load, monkeypatch):
    opened = []
    monkeypatch.setattr(images, "read", opened.append)
    load([VQA | {"question_id": i} for i in range(50)])
    assert len(opened) == 1  # the first record's, to check


REFUSED = {
    "unknown keys": ([{"picture": "red.png"}], "entry 1: its keys 'picture' are those of no known", "LAVIS VQA: image"),
    "ambiguous": ([VQA | CAPTION], "fit LAVIS VQA and LAVIS captions"),
    "another family later": ([VQA, CAPTION], "entry 2: lacks question, question_id, which LAVIS VQA has"),
    "duplicate ids": ([VQA, VQA], "entry 2: 'question_id' '7' was that of", "entry 1"),
    "empty list": ([], "holds no record"),
    "not a record": ([VQA, 3], "entry 2: expected an object"),
    "COCO's own format": ({"questions": [VQA], "info": {}}, "expected a list of records, or a dict", "questions, info"),
    "number": ("17", "expected a list of records, got 17"),
    "NaN": (json.dumps([VQA | {"weight": float("nan")}]), "NaN is no JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "no question": ([VQA | {"question": " "}], "entry 1: 'question' must be text and not empty"),
    "null question": ([VQA | {"question": None}], "got nothing"),
    "empty answers": ([VQA | {"answer": []}], "'answer' must be text or a list of texts"),
    "odd answers": ([VQA | {"answer": [{"answer": "red"}]}], "'answer' must be text or a list of texts"),
    "half a pair": ([VQA | {"question": "\ud800"}], "half a surrogate pair"),
    "long field": ([VQA | {"question": "x" * 4_000_001}], "4,000,001 characters"),
    "id": ([VQA | {"question_id": [1]}], "'question_id' must be text or a whole number"),
    "one image": ([NLVR | {"images": ["red.png"]}], "must be the left and the right image, got 1"),
    "label": ([NLVR | {"label": "maybe"}], "'label' must be True or False"),
    "caption": ([CAPTION | {"caption": {}}], "'caption' must be text or a list of texts"),
    "choice past the options": ([LONG | {"correct_choice": 2}], "'correct_choice' must be a whole number from 0 to 1"),
    "letter": ([MME | {"answer": "E"}], "'answer' must name one of 3 options"),
    "one option": ([MME | {"options": ["A. x"]}], "needs 2 to 26 options"),
    "options": ([MME | {"options": 3}], "needs 2 to 26 options"),
    "contexts": ([HAYSTACK | {"ctxs": 5}], "'ctxs' must be a list"),
    "mixed contexts": ([HAYSTACK | {"ctxs": ["red.png", 5]}], "'ctxs' must be a list of file names"),
    "context without text": ([TEXT_NEEDLE | {"ctxs": [{"text": "<image>"}, {}]}], "number 2 is {}"),
    "placeholders": ([TEXT_NEEDLE | {"image_list": ["red.png"]}], "its texts have 2 <image>, and 1 images are named"),
    "haystack's answer": ([HAYSTACK | {"answer": "perhaps"}], "'answer' must be yes or no"),
    "pages": ([PAGES | {"page_list": []}], "'page_list' names no page"),
    "summary": ([SUMMARY | {"summary": [3, {"paragraphs": 4}]}], "'summary' must be text and not empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_gets_a_sentence(case, load):
    content, *words = REFUSED[case]
    with pytest.raises(InputError) as refused:
        load(content)
    for word in words:
        assert word in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.jsonl", json.dumps(VQA) + "\n{", "line 2: not JSON"),
        ("x.jsonl", json.dumps(VQA) + "\n[]", "line 2: expected an object"),
        ("x.json", b"\xff\xfe[]", "not UTF-8"),
        ("x.json", "", "is empty"),
        ("x.json", "[]\0", "zero byte"),
        ("x.parquet", "x", "must be .json or .jsonl or .csv or .tsv"),
        ("x.csv", "image,image\nred.png,red.png\n", "two columns have the same name"),
        ("x.csv", "image,caption\nred.png,a,b\n", "line 2: more cells than the 2 columns"),
        ("x.csv", 'image,caption\nred.png,"' + "x" * 200_000, "not a table"),
        ("x.csv", 'images,sentence,label\n"[1,",Red.,True\n', "line 2: 'images' must be a list of file names"),
        ("x.csv", "image,caption\n", "holds no record"),
    ],
)
def test_what_is_no_annotation_file(name, content, words, load):
    with pytest.raises(InputError, match=re.escape(words)):
        load(content, name)


def test_generated_text_has_no_images(root):
    with pytest.raises(UsageError, match="builtin:mixed is generated text"):
        Annotations("builtin:mixed", Media(root, 4)).check()


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing.png", "does not exist"),
        ("../secret.png", "leads out of the image root"),
        ("clip/../../secret.png", "leads out of the image root"),
        ("/etc/hostname", "leads out of the image root"),
        ("out.png", "leads out of the image root"),
        ("outside/secret.png", "leads out of the image root"),
        ("loop.png", "symbolic links"),
        ("clip", "is no plain file"),
        ("fifo.png", "is no plain file"),
        ("a\0b.png", "is no name of a file"),
        ("x" * 5000, "too long"),
        ("https://example.org/red.png", "nothing is downloaded"),
        ("data:image/png;base64,AAAA", "nothing is downloaded"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)  # fmt: skip
def test_paths_stay_in_the_image_root(name, words, load, root):
    Image.new("RGB", (4, 4)).save(root.parent / "secret.png")
    (root / "out.png").symlink_to(root.parent / "secret.png")
    (root / "outside").symlink_to(root.parent)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "fifo.png")
    with pytest.raises(InputError) as refused:
        load([VQA | {"image": name}])
    assert words in str(refused.value) and "data.json, entry 1: " in str(refused.value)


def test_names_within_the_root_may_wander(load, root):
    (root / "link.png").symlink_to("red.png")
    for name in ("clip/../red.png", str(root / "red.png"), "./link.png"):
        (sample,) = load([VQA | {"image": name}])
        assert next(sample.images()) == root.resolve() / "red.png"


def test_videos_without_frames(load, root):
    (root / "film.mp4").write_bytes(b"\0")
    (root / "empty").mkdir()
    (root / "empty" / ".frame0.png").write_bytes(b"")
    for name, words in {
        "film.mp4": "'film.mp4' is a video file, and bsfa has no decoder for it",
        "other.mp4": "there is no folder 'other'",
        "empty": "folder 'empty' holds no frame",
        "../images2": "leads out of the image root",
    }.items():
        with pytest.raises(InputError, match=re.escape(words)):
            load([VIDEO_QA | {"video": name}])


def test_the_registry_is_unambiguous():
    """The keys that a family needs, and no others, are those of that family alone."""
    from bsfa_cli.data.multimodal.families import family_of
    from bsfa_cli.data.multimodal.records import Record

    for family in FAMILIES:
        keys = [*family.needs, *(group[0] for group in family.one_of)]
        assert family_of(Record("here", dict.fromkeys(keys))) is family


def test_a_folder_is_searched_for_annotation_files(load, root, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="holds no .json or .jsonl"):
        Annotations(str(folder), Media(root, 1)).check()
    (folder / "a.csv").write_text("image,caption\nred.png,Red.\n")
    assert [sample.id for sample in Annotations(str(folder), Media(root, 1)).samples()] == ["red.png#1"]
