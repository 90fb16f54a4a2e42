"""Bad input to the real commands: one clear sentence, the right exit code, no traceback, nothing on stdout."""

from __future__ import annotations

import errno
import json
import os
import pickle

import pytest
import torch

pytestmark = pytest.mark.usefixtures("random_model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The random model as a checkpoint directory."""
    from bsfa_cli.models.load import load_model

    folder = tmp_path_factory.mktemp("model")
    loaded = load_model(None, device="cpu")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint):
    """Thresholds for that checkpoint that drop nothing."""
    from bsfa_kernels import TileShape
    from bsfa_kernels.integrations.transformers import attention_modules
    from bsfa_kernels.thresholds import MODEL_KEYS, Point, Thresholds

    from bsfa_cli.models.load import load_model

    loaded = load_model(checkpoint, device="cpu")
    tensors = {
        path: torch.full((1, module.query_heads, 1), -torch.inf)
        for path, module in attention_modules(loaded.model).items()
    }
    identity = {key: loaded.identity.get(key) for key in MODEL_KEYS}
    return Thresholds(identity, TileShape(), True, (0,), (Point("p", "gap", "target-skip", 0.5),), tensors)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Every command at lengths that take seconds."""
    for name in ("BSFA_CALIBRATE", "BSFA_VERIFY"):
        monkeypatch.setenv(f"{name}_LENGTH", "256")
        monkeypatch.setenv(f"{name}_SAMPLES", "2")
        monkeypatch.setenv(f"{name}_DEVICE", "cpu")


def text_model(folder, architecture: str = "LlamaForCausalLM", **changes):
    """A directory that claims to be a model: a configuration, and a tokenizer unless told otherwise."""
    folder.mkdir()
    config = {"model_type": "llama", "architectures": [architecture], "hidden_size": 64} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODEL_CASES = {
    "missing": (lambda folder: folder / "nowhere", "does not exist"),
    "empty": (lambda folder: (folder / "empty").mkdir() or folder / "empty", "is empty"),
    "no tokenizer": (lambda folder: text_model(folder / "bare"), "tokenizer"),
    "encoder only": (
        lambda folder: text_model(folder / "bert", "BertForMaskedLM", model_type="bert"),
        "no causal language model",
    ),
}


@pytest.mark.parametrize("command", ["calibrate", "verify", "profile"])
@pytest.mark.parametrize("case", MODEL_CASES)
def test_a_model_that_cannot_be_used(run, one_sentence, tmp_path, artifact, command, case):
    make, words = MODEL_CASES[case]
    model = make(tmp_path)
    artifact.write(tmp_path / "t.safetensors")
    arguments = {
        "calibrate": ("calibrate", model, "-o", tmp_path / "run"),
        "verify": ("verify", model, "--thresholds", tmp_path / "t.safetensors"),
        "profile": ("profile", "--end-to-end", model, "--lengths", "256", "--device", "cpu"),
    }[command]
    one_sentence(run(*arguments), 4, words, str(model))


DATA_CASES = {
    "missing": ("no.txt", None, "no.txt"),
    "empty": ("empty.jsonl", b"", "empty.jsonl"),
    "binary": ("binary.txt", b"\x00\xff\xfe\x80" * 64, "binary.txt"),
    "wrong keys": ("keys.jsonl", b'{"body": "x"}\n', "text"),
    "broken line": ("line.jsonl", b'{"text": \n', "line.jsonl"),
    "too short": ("short.txt", b"only a few words", "too short"),
    "other kind": ("data.csv", b"a,b\n", "must be .txt or .jsonl"),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_data_that_cannot_be_used(run, one_sentence, tmp_path, artifact, case):
    name, content, words = DATA_CASES[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    one_sentence(run("calibrate", "--data", tmp_path / name, "-o", tmp_path / "run"), 4, words)


def damaged(artifact, path, how: str) -> None:
    content = artifact.to_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def rebuilt(text: bytes, body: bytes = content[8 + size :]) -> bytes:
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + body

    if how == "truncated":
        content = content[:-8]
    elif how == "oversized":
        content = content + b"\0" * 8
    elif how == "NaN":
        content = content[:-4] + b"\x00\x00\xc0\x7f"
    elif how == "duplicate key":
        name = next(key for key in header if key != "__metadata__")
        twice = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
        content = rebuilt(twice.encode())
    elif how == "pickle":
        content = pickle.dumps({"thresholds": [0.0]})
    elif how == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "oversized", "NaN", "duplicate key", "pickle", "empty"])
def test_a_damaged_artifact(run, one_sentence, tmp_path, checkpoint, artifact, how):
    path = tmp_path / "t.safetensors"
    damaged(artifact, path, how)
    one_sentence(run("verify", checkpoint, "--thresholds", path), 4, str(path))
    one_sentence(run("profile", "--end-to-end", checkpoint, "--thresholds", path, "--device", "cpu"), 4, str(path))


@pytest.mark.parametrize("field, value", [("query_heads", 8), ("head_dim", 128), ("config_hash", "0" * 64)])
def test_thresholds_of_another_model(run, one_sentence, tmp_path, checkpoint, artifact, field, value):
    import dataclasses

    other = dataclasses.replace(artifact, model=dict(artifact.model) | {field: value})
    other.write(tmp_path / "t.safetensors")
    one_sentence(run("verify", checkpoint, "--thresholds", tmp_path / "t.safetensors"), 4, "another model", field)


def test_a_point_that_the_artifact_does_not_hold(run, one_sentence, tmp_path, checkpoint, artifact):
    artifact.write(tmp_path / "t.safetensors")
    options = ("--thresholds", tmp_path / "t.safetensors", "--point", "nope")
    one_sentence(run("verify", checkpoint, *options), 4, "nope", "p")


def test_profile_asks_for_the_point_where_there_are_several(run, one_sentence, tmp_path, artifact):
    import dataclasses

    second = dataclasses.replace(artifact.points[0], name="second")
    tensors = {path: tensor.repeat(2, 1, 1) for path, tensor in artifact.tensors.items()}
    path = tmp_path / "t.safetensors"
    dataclasses.replace(artifact, points=(*artifact.points, second), tensors=tensors).write(path)
    command = ("profile", "--end-to-end", "no-such-model", "--thresholds", path, "--device", "cpu")
    one_sentence(run(*command), 2, "give one of them as --point: p, second")
    one_sentence(run(*command, "--point", "third"), 4, "no point 'third'")


def test_missing_thresholds(run, one_sentence, tmp_path, checkpoint):
    one_sentence(run("verify", checkpoint, "--thresholds", tmp_path / "no.safetensors"), 4, "no.safetensors")


def test_a_run_directory_that_is_none(run, one_sentence, tmp_path):
    options = ("--target-skip", "0.5", "-o", tmp_path / "t.safetensors")
    for folder in (tmp_path / "nowhere", tmp_path):
        one_sentence(run("export", folder, *options), 4, str(folder))


@pytest.mark.parametrize("command", ["calibrate", "export", "verify", "profile", "env"])
def test_an_unknown_yaml_key(run, one_sentence, tmp_path, command):
    (tmp_path / "c.yaml").write_text("lenght: 5\n")
    one_sentence(run(command, "--config", tmp_path / "c.yaml"), 2, "unknown key 'lenght'", "c.yaml", "known keys: ")


IDLE = {
    "export": [("--samples", 3), ("--device", "cpu"), ("--frames", 3), ("--repeat-data",)],
    "verify": [("--questions", 3)],
    "verify --tasks single": [("--data", "x.txt"), ("--samples", 3)],
    "verify --tasks mine.jsonl": [("--questions", 3), ("--lengths", "512")],
    "profile": [("--data", "x.txt"), ("--frames", 3)],
    "profile --end-to-end bundled": [("--skip", 0.5), ("--heads", 4)],
}


@pytest.mark.parametrize("command", IDLE)
def test_an_option_that_would_do_nothing(run, one_sentence, tmp_path, command):
    needed = {"export": ("run", "-o", tmp_path / "t", "--top-k", 1), "verify": ("--thresholds", "t")}
    for option in IDLE[command]:
        result = run(*command.split(), *needed.get(command.split()[0], ()), *option)
        one_sentence(result, 2, f"{option[0]} means nothing with")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("calibrate", "-o", "run", "--top-k", ","), "--top-k takes 1 to 32 numbers"),
        (("calibrate", "-o", "run", "--gradients", "--include-vision"), "--gradients knows text layers only"),
        (("calibrate", "-o", "run", "--processes", 2, "--length", 100), "shorter than two tiles"),
        (("profile", "--fail-under", "nan", "--baseline", "b.json"), "--fail-under must be a positive number"),
        (("profile", "--profile", "tiny", "--seed", 1 << 63), "seed must be a whole number"),
        (("profile", "--profile", "tiny", "--skip", "0"), "0 and 1, got [0.0]; 0 is always timed"),
        (("compare", "--seed", 1 << 63), "--seed must be below 2^63"),
        (("compare", "bundled", "--processes", 2), "--processes share the questions of --tasks out"),
        (("compare", "--plot", "plot.pdf"), "a plot is an .svg or a .png file"),
    ],
)
def test_values_that_cannot_be_meant(run, one_sentence, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    one_sentence(run(*arguments), 2, words)
    assert not list(tmp_path.iterdir())


MANY = 99999999999


@pytest.mark.parametrize(
    "arguments",
    [
        ("calibrate", "-o", "run", "--samples", MANY),
        ("calibrate", "-o", "run", "--length", MANY),
        ("calibrate", "-o", "run", "--samples", 4, "--processes", MANY),
        ("verify", "--thresholds", "t", "--tasks", "all", "--questions", MANY),
        ("verify", "--thresholds", "t", "--tasks", "single", "--lengths", f"512,{MANY}"),
        ("compare", "bundled", "--samples", MANY),
        ("compare", "bundled", "--tasks", "all", "--questions", MANY),
        ("compare", "bundled", "--tasks", "all", "--processes", MANY),
        ("compare", "--layers", MANY),
        ("capture", "-o", "captured", "--length", MANY),
        ("fetch", "smollm2", "-o", "model", "--stretch", MANY),
    ],
)
def test_a_count_with_digits_too_many_is_refused_before_anything_is_made(
    run, no_model, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    result = run(*arguments)
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert any(words in result.err for words in ("bsfa makes at most; lower", "one process has", "less than or eq"))
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(run, one_sentence, tmp_path):
    (tmp_path / "file").write_text("")
    one_sentence(run("calibrate", "-o", tmp_path / "file" / "run"), 2, "cannot write")
    one_sentence(run("profile", "-o", tmp_path / "file" / "p.json", "--device", "cpu"), 2, "cannot write")


def test_a_full_disk(run, one_sentence, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = run("calibrate", "-o", tmp_path / "run")
    one_sentence(result, 3, "no space left")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".part"]


@pytest.mark.parametrize("command", ["calibrate", "verify", "profile"])
def test_cuda_asked_for_where_none_is(run, one_sentence, tmp_path, artifact, monkeypatch, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    artifact.write(tmp_path / "t.safetensors")
    arguments = {
        "calibrate": ("-o", tmp_path / "run"),
        "verify": ("--thresholds", tmp_path / "t.safetensors"),
        "profile": (),
    }[command]
    one_sentence(run(command, *arguments, "--device", "cuda"), 3, "--device cuda", "--device cpu")


@pytest.mark.parametrize("command", ["calibrate", "verify", "profile"])
def test_out_of_memory_names_the_option_to_lower(
    run, one_sentence, tmp_path, checkpoint, artifact, monkeypatch, command
):
    import transformers

    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")

    artifact.write(tmp_path / "t.safetensors")
    monkeypatch.setattr(transformers.LlamaModel, "forward", greedy)
    if command == "profile":
        monkeypatch.setattr("bsfa_cli.timing.sweep.ceiling", greedy)
    arguments = {
        "calibrate": (checkpoint, "-o", tmp_path / "run"),
        "verify": (checkpoint, "--thresholds", tmp_path / "t.safetensors"),
        "profile": ("--device", "cpu"),
    }[command]
    one_sentence(run(command, *arguments), 3, "out of", "(asked for 80.00 GiB); lower --length")


def test_tasks_in_a_length_too_short_for_their_text(run, one_sentence, tmp_path, checkpoint, artifact, monkeypatch):
    monkeypatch.setenv("BSFA_CALIBRATE_LENGTH", "512")
    words = ("records does not fit into 512 tokens", "the shortest length that works is")
    one_sentence(run("calibrate", checkpoint, "--data", "tasks:records", "-o", tmp_path / "run"), 2, *words)
    artifact.write(tmp_path / "t.safetensors")
    options = ("--thresholds", tmp_path / "t.safetensors", "--tasks", "records", "--length", "512")
    one_sentence(run("verify", checkpoint, *options), 2, *words)
