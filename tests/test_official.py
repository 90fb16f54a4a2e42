"""bsfa export --from-official: the BSFA authors' file, exactly, and nothing in it is ever run."""

import os
import pickle

import pytest
import torch
from bsfa_kernels import Gate, TileShape
from bsfa_kernels.integrations.transformers import model_identity
from bsfa_kernels.thresholds import Thresholds
from random_llama import build, build_tokenizer

TILES = 9


def authors_file(path, layers=3, heads=4, **changes):
    generator = torch.Generator().manual_seed(0)
    thresholds = torch.randn(2, layers, heads, TILES, generator=generator)
    thresholds[:, :, :, :3] = -torch.inf
    content = {
        "thresholds": thresholds, "k_values": [16, 64], "max_num_blocks": TILES, "num_layers": layers,
        "num_heads": heads, "q_block_size": 128, "k_block_size": 64, "aggregation_method": "mean",
    } | changes  # fmt: skip
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return thresholds


def test_every_value_survives(tmp_path, run):
    thresholds = authors_file(tmp_path / "thresholds.pt")
    result = run("export", "--from-official", tmp_path / "thresholds.pt", "-o", tmp_path / "t")
    assert result.code == 0, result.err
    artifact = Thresholds.read(tmp_path / "t")
    assert artifact.tile == TileShape(128, 64) and artifact.keep_sink is False
    assert [(point.name, point.gate) for point in artifact.points] == [("topk-16", "absolute"), ("topk-64", "absolute")]
    for i, name in enumerate(("topk-16", "topk-64")):
        for layer in range(3):
            gate = artifact.gate(f"model.layers.{layer}.self_attn", name, TILES + 3)
            assert isinstance(gate, Gate) and torch.equal(gate.absolute[:, :TILES], thresholds[i, layer])
            assert torch.equal(gate.absolute[:, TILES:], thresholds[i, layer, :, -1:].expand(-1, 3))


def test_a_model_gives_its_identity(tmp_path, run, one_sentence):
    model = build("bsfa")
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    authors_file(tmp_path / "a.pt")
    command = ["export", "--model", tmp_path / "model", "-o", tmp_path / "t", "--from-official"]
    assert run(*command, tmp_path / "a.pt").code == 0
    artifact = Thresholds.read(tmp_path / "t")
    artifact.check_model(model_identity(model))
    assert artifact.model["config_hash"] == model_identity(model)["config_hash"]
    authors_file(tmp_path / "b.pt", layers=4)
    one_sentence(run(*command, tmp_path / "b.pt"), 4, "for 4 layers of 4 heads, and the model has 3 of 4")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["torch", "pickle", "zip cut", "text", "list", "absent"])
def test_what_is_no_such_file_is_refused_and_runs_nothing(how, tmp_path, run, one_sentence):
    path, trace = tmp_path / "t.pt", tmp_path / "was-here"
    if how == "torch":
        torch.save({"thresholds": Malicious(trace)}, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    elif how == "zip cut":
        authors_file(path)
        path.write_bytes(path.read_bytes()[:500])
    elif how == "text":
        path.write_text("thresholds")
    elif how == "list":
        torch.save([1, 2], path)
    one_sentence(run("export", "--from-official", path, "-o", tmp_path / "t"), 4, str(path))
    assert not trace.exists() and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"thresholds": None}, "lacks thresholds"),
        ({"k_values": [16]}, "1 values of k"),
        ({"k_values": "16"}, "k_values must be"),
        ({"num_heads": 8}, "8 heads"),
        ({"q_block_size": 0}, "q_block_size"),
        ({"thresholds": torch.zeros(2, 3, 4)}, "float tensor"),
        ({"thresholds": torch.full((2, 3, 4, 9), torch.nan)}, "NaN"),
    ],
)
def test_wrong_contents_are_named(changes, said, tmp_path, run, one_sentence):
    authors_file(tmp_path / "t.pt", **changes)
    one_sentence(run("export", "--from-official", tmp_path / "t.pt", "-o", tmp_path / "t"), 4, said)


def test_points_cannot_be_asked_of_it(tmp_path, run, one_sentence):
    authors_file(tmp_path / "t.pt")
    command = ["export", "--from-official", tmp_path / "t.pt", "-o", tmp_path / "t", "--top-k", "16"]
    one_sentence(run(*command), 2, "own operating points")
