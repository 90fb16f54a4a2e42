"""bsfa inspect: every kind of file that bsfa writes, and one sentence for any other."""

import json
from pathlib import Path

import pytest
import torch

from bsfa_cli.comparison import tensors

STORED = Path(__file__).parent.parent / "profiles" / "results" / "llama-3.1-8b.nvidia-h200.json"
pytestmark = pytest.mark.usefixtures("random_model")


@pytest.fixture
def shown(run):
    """(JSON, what a person sees) of a file."""

    def show(path):
        done, seen = run("inspect", path, "--json"), run("inspect", path)
        assert done.code == seen.code == 0, done.err
        assert done.err == "" and seen.out == ""
        return json.loads(done.out), seen.err

    return show


def test_a_run_its_thresholds_and_what_verify_says_of_them(run, shown, tmp_path):
    begun, artifact = tmp_path / "run", tmp_path / "t.safetensors"
    small = ("--samples", "2", "--length", "512", "--top-k", "1", "--device", "cpu")
    assert run("calibrate", "-o", begun, *small).code == 0
    data, text = shown(begun)
    assert data["kind"] == "run" and data["finished"] and [s["done"] for s in data["samples"]] == [True, True]
    assert "2 of 2 done" in text and "builtin:mixed, seed 0" in text and "heldout" in text
    (begun / "heldout.safetensors").unlink()
    data, text = shown(begun)
    assert not data["finished"] and "1 of 2 done; the same command resumes" in text
    run("calibrate", "-o", begun, *small)

    assert run("export", begun, "-o", artifact, "--target-skip", "0.1", "--top-k", "1").code == 0
    data, text = shown(artifact)
    assert data["kind"] == "thresholds" and len(data["sha256"]) == 64 and data["bytes"] == artifact.stat().st_size
    assert [point["name"] for point in data["points"]] == ["topk-1", "skip-10"] and set(data["modules"].values()) == {4}
    assert data["points"][1]["least"] <= data["points"][1]["most"] and data["model"]["id"] in text
    assert "target-skip 0.1" in text and "samples of up to 512 tokens" in text

    stored = tmp_path / "v.json"
    verified = run(
        "verify",
        "--thresholds",
        artifact,
        "--samples",
        "1",
        "--length",
        "512",
        "--device",
        "cpu",
        "-o",
        stored,
        "--max-kl-over-floor",
        "1",
    )
    assert verified.code == 0, verified.err
    data, text = shown(stored)
    assert data["kind"] == "bsfa verify" and data["verdict"] == "passed" and len(data["rows"]) == 2
    assert "topk-1" in text and "on a CPU" not in text and "a CPU (Linux" in text


def test_stored_results_and_captured_layers(run, shown, tmp_path):
    data, text = shown(STORED)
    assert data["kind"] == "bsfa profile" and data["complete"] and len(data["rows"]) == 6
    assert "NVIDIA H200" in text and "131,072" in text
    layers = {"layers.3": tensors.Captured(*(torch.randn(1, 2, 256, 16) for _ in "qkv"), 0.25, True)}
    captured = tmp_path / "c.safetensors"
    captured.write_bytes(tensors.pack(layers, {"model": "m", "label": None, "data": "d", "seed": 7}))
    data, text = shown(captured)
    assert data["kind"] == "capture" and data["length"] == 256 and "layers.3" in text and "seed 7" in text
    stored = tmp_path / "m.json"
    options = ("--methods", "blasst", "--setting", "blasst=100", "--seconds", "0.001", "--device", "cpu")
    assert run("compare", "--captured", captured, *options, "-o", stored).code == 0
    data, text = shown(stored)
    assert data["kind"] == "bsfa compare" and data["settings"] == "blasst=100" and "captured from m" in text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("absent", None, "cannot read"),
        ("empty", b"", "no file of bsfa's"),
        ("text.txt", b"hello, world", "no file of bsfa's"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"kind": "x"}', "is not a result of"),
        ("a.json", b'{"kind": ["bsfa verify"]}', "is not a result of"),
        ("a.json", b'{"kind": "bsfa verify", "seed": NaN}', "it holds NaN"),
        (
            "a.json",
            b'{"kind": "bsfa verify", "format": 1, "environment": {}, "points": [], "model": {"id": null}, '
            b'"thresholds": "t", "passed": true}',
            "None is no text",
        ),
        ("a.json", b'{"kind": "bsfa verify", "format": 1, "environment": {}, "points": [3]}', "lacks or breaks"),
        ("run.json", b"{}", "is part of a run; give its directory"),
        ("a.pt", b"PK\x03\x04" + b"0" * 20, "--from-official"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{broken", "a.safetensors"),
        ("other.safetensors", b"\x02\0\0\0\0\0\0\0{}", "neither thresholds nor captured layers"),
    ],
)
def test_anything_else_gets_one_sentence(run, one_sentence, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    one_sentence(run("inspect", tmp_path / name), 4, name, words)


def test_no_file_and_no_run(run, one_sentence, tmp_path):
    one_sentence(run("inspect"), 2, "which file?")
    one_sentence(run("inspect", tmp_path), 4, "holds no calibration run")
