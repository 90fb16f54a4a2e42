"""--image-root and what belongs to it, as the commands take them: refused before a model is loaded."""

import json

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("no_model")


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    path = tmp_path / "vqa.json"
    path.write_text(json.dumps([{"image": "0.png", "question": "?", "question_id": 1, "answer": "x"}]))
    return path


COMMANDS = {
    "calibrate": ("calibrate", "-o", "run"),
    "capture": ("capture", "-o", "qkv.safetensors"),
    "compare": ("compare", "bundled", "--methods", "sliding_window"),
    "profile": ("profile", "--end-to-end", "bundled", "--lengths", "2048"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_images_are_checked_before_the_model(command, run, data, one_sentence, tmp_path):
    images = (*command, "--data", data, "--image-root")
    one_sentence(run(*command, "--image-root", tmp_path), 2, "--data FILE")
    one_sentence(run(*command, "--data", data, "--frames", 4), 2, "--frames belongs to --image-root")
    one_sentence(run(*command, "--repeat-data"), 2, "--repeat-data belongs to --image-root")
    one_sentence(run(*images, tmp_path / "nothing"), 4, "nothing is no folder")
    one_sentence(run(*command, "--data", data), 4, "vqa.json", "need --image-root")
    one_sentence(run(*command, "--data", "builtin:mixed", "--image-root", tmp_path), 2, "builtin:mixed")
    (tmp_path / "0.png").write_bytes(b"")
    one_sentence(run(*images, tmp_path), 4, "vqa.json, entry 1", "0.png")
    (tmp_path / "0.png").unlink()
    one_sentence(run(*images, tmp_path), 4, "vqa.json, entry 1", "does not exist")


def test_lines_that_name_images_say_what_they_need(run, data, one_sentence, tmp_path):
    lines = tmp_path / "vqa.jsonl"
    lines.write_text(json.dumps(json.loads(data.read_text())[0]))
    one_sentence(run("calibrate", "-o", "run", "--data", lines), 4, "line 1", "images need --image-root")


def test_without_pillow(run, data, one_sentence, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    given = ("calibrate", "-o", "run", "--data", data, "--image-root", tmp_path)
    one_sentence(run(*given), 3, "pip install 'bsfa[vision]'")


def test_idle_options_are_refused(run, one_sentence, tmp_path, data):
    one_sentence(run("compare", "--image-root", tmp_path), 2, "--image-root means nothing on structured layers")
    export = ("export", "run", "-o", "x.safetensors", "--target-skip", 0.5, "--image-root", tmp_path)
    one_sentence(run(*export), 2, "--image-root", "belong to --largest-skip-with")
