"""bsfa capture: what is kept is what the layers attend with, and a comparison reads it back."""

from __future__ import annotations

import json

import bsfa_kernels.integrations.transformers as bsfa
import pytest
import torch
from bsfa_kernels import TileShape
from safetensors.torch import load_file, save_file

from bsfa_cli.comparison import capture, tensors
from bsfa_cli.comparison import run as comparison
from bsfa_cli.data.texts import Sample
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.models.load import load_model

pytestmark = pytest.mark.usefixtures("random_model")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two captures of the random model, different texts."""
    folder = tmp_path_factory.mktemp("captured")
    loaded = load_model(None, device="cpu")
    modules = bsfa.attention_modules(loaded.model)
    paths = []
    for seed in (0, 1):
        tokens = tuple(torch.randint(256, (768,), generator=torch.Generator().manual_seed(seed)).tolist())
        found = capture.capture(loaded, modules, Sample("drawn", tokens, "a generator"))
        facts = {"model": loaded.identity["id"], "label": loaded.label, "data": "test", "seed": seed}
        paths.append(folder / f"{seed}.safetensors")
        paths[-1].write_bytes(tensors.pack(found, facts))
    return paths


def test_captured_tensors_are_those_of_the_layers(files):
    source = tensors.CapturedSource(files[0], CPU)
    layers = list(source.layers("measured"))
    assert [layer.name for layer in layers] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert layers[0].q.shape == (1, 4, 768, 64) and layers[0].k.shape == (1, 2, 768, 64)
    # The first layer's queries: its projection of the normed embeddings, rotated; norms survive the rotation.
    loaded = load_model(None, device="cpu", dtype=torch.float32)
    tokens = torch.randint(256, (768,), generator=torch.Generator().manual_seed(0))[None]
    block = loaded.model.model.layers[0]
    with torch.no_grad():
        hidden = block.input_layernorm(loaded.model.model.embed_tokens(tokens))
        q = block.self_attn.q_proj(hidden).view(1, 768, 4, 64).transpose(1, 2)
        v = block.self_attn.v_proj(hidden).view(1, 768, 2, 64).transpose(1, 2)
    assert torch.allclose(layers[0].v.float(), v, atol=1e-5)
    assert torch.allclose(layers[0].q.float().norm(dim=-1), q.norm(dim=-1), rtol=1e-4)
    assert not torch.allclose(layers[0].q.float()[:, :, 1:], q[:, :, 1:], atol=1e-2)
    assert source.label == "captured from bsfa/retrieval-llama (random weights: says nothing about accuracy)"


def test_a_comparison_runs_on_captured_layers(files):
    measured, calibrated = (tensors.CapturedSource(path, CPU, 640) for path in files)
    cell = comparison.cell(measured, calibrated, "sliding_window,bsfa", TileShape(), CPU, 0.001, 0)
    assert cell["length"] == 640 and cell["source"]["layers"] == 3 and "captured from" in cell["label"]
    methods = {row["method"] for row in cell["rows"]}
    assert methods == {"dense", "sliding_window", "bsfa"}
    assert all(row["needle"] is None and len(row["layers"]) == 3 for row in cell["rows"])
    with pytest.raises(UsageError, match="--methods bsfa: no calibration for its thresholds"):
        comparison.cell(measured, None, "bsfa,tri_shape", TileShape(), CPU, 0.001, 0)


def test_the_commands(run, files, tmp_path):
    path = tmp_path / "out.safetensors"
    done = run("capture", "--length", "300", "--layers", "1", "-o", path, "--json", "--device", "cpu")
    assert done.code == 0 and json.loads(done.out)["layers"] == ["model.layers.1.self_attn"]
    options = ("--methods", "xattention", "--seconds", "0.001", "--device", "cpu", "--json")
    done = run("compare", "--captured", path, *options)
    assert done.code == 0
    (cell,) = json.loads(done.out)["cells"]
    assert cell["length"] == 300 and cell["source"]["file"] == "out.safetensors"
    again = tmp_path / "again.safetensors"
    run("capture", "--length", "300", "--layers", "1", "-o", again, "--device", "cpu")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ((), 2, "give -o"),
        (("-o", "/proc/nowhere/x.safetensors"), 2, "cannot write"),
        (("-o", "{tmp}/x.safetensors", "--layers", "9"), 2, "no layer 9"),
        (("-o", "{tmp}/x.safetensors", "--layers", "9", "--data", "{tmp}/no.txt"), 4, "no.txt does not exist"),
        (("-o", "{tmp}/x.safetensors", "--layers", "a", "/nonexistent/model"), 2, "must be like 0-3,8"),
        (("-o", "{tmp}/x.safetensors", "/nonexistent/model"), 4, "does not exist"),
        (("-o", "{tmp}/x.safetensors", "--data", "{tmp}/short.txt", "--length", "999"), 4, "999 were asked for"),
    ],
)
def test_what_cannot_be_captured_gets_one_sentence(run, one_sentence, tmp_path, arguments, code, words):
    (tmp_path / "short.txt").write_text("too short")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    one_sentence(run("capture", *arguments, "--device", "cpu"), code, words)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_is_no_capture_is_refused(files, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is no file of `bsfa capture`"):
        tensors.CapturedSource(path, CPU)
    path.write_bytes(files[0].read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot read"):
        tensors.CapturedSource(path, CPU)
    with pytest.raises(UsageError, match="holds 768 tokens, 9999 were asked for"):
        tensors.CapturedSource(files[0], CPU, 9999)
    held = load_file(files[0])
    metadata = json.loads(json.dumps(tensors.CapturedSource(files[0], CPU).metadata))
    for change, words in (({"format": 7}, "format 7"), ({"layers": [{"name": 3}]}, "no attention can have"),
                          ({"extra": 1}, "is no file of")):  # fmt: skip
        save_file(held, path, {tensors.METADATA: json.dumps(metadata | change)})
        with pytest.raises(InputError, match=words):
            tensors.CapturedSource(path, CPU)
    held.pop("model.layers.1.self_attn/k")
    save_file(held, path, {tensors.METADATA: json.dumps(metadata)})
    with pytest.raises(InputError, match="cannot read model.layers.1"):
        list(tensors.CapturedSource(path, CPU).layers("measured"))
