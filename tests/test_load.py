"""Loading models: what comes back, and one clear sentence of the right class for everything that cannot be loaded."""

import json
import shutil

import pytest
import torch
import transformers

from bsfa_cli.data import vocabulary
from bsfa_cli.data.questions import Plan, is_bundled
from bsfa_cli.errors import InputError, MachineError, UsageError
from bsfa_cli.models import bundled, load, random_weights
from bsfa_cli.models.load import explain_memory, load_model, resolve_device, resolve_dtype

TINY = dict(
    vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
    num_key_value_heads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint directory with tokenizer, in bfloat16."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).to(torch.bfloat16)
    model.save_pretrained(path)
    random_weights.build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def refused(path, kind=InputError):
    with pytest.raises(kind) as caught:
        load_model(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_directory_loads_with_its_identity(saved):
    loaded = load_model(saved, device="cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.model.config._attn_implementation == "bsfa"
    assert loaded.tokenizer("ab").input_ids == [97, 98]
    assert loaded.label is None
    assert {key: loaded.identity[key] for key in ("id", "revision", "layers", "query_heads", "key_value_heads")} == {
        "id": "tiny-llama", "revision": None, "layers": 1, "query_heads": 2, "key_value_heads": 1,
    }  # fmt: skip
    json.dumps(loaded.identity, allow_nan=False)
    again = load_model(str(saved), device=torch.device("cpu"), dtype="bfloat16", attn_implementation="sdpa")
    assert again.model.dtype == torch.bfloat16
    assert again.identity == loaded.identity


def test_the_bundled_model_is_the_same_every_time_and_says_what_it_is(tmp_path):
    first, second = (load_model(name, device="cpu", dtype="bfloat16") for name in (None, "bsfa/retrieval-llama"))
    assert first.identity == second.identity
    assert first.identity["id"] == "bsfa/retrieval-llama" and first.identity["head_dim"] == 128
    assert "synthetic retrieval tasks only" in first.label
    shutil.copytree(bundled.BUNDLED, tmp_path / "copy")
    assert load_model(tmp_path / "copy", device="cpu").identity == {**first.identity, "id": "copy"}


def test_the_bundled_tokenizer_is_the_one_that_tasks_are_made_with(tmp_path):
    shipped = load_model(None, device="cpu").tokenizer
    assert is_bundled(shipped)
    vocabulary.build_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (bundled.BUNDLED / "tokenizer.json").read_bytes()
    document = Plan(("frequent-words",), (512,), 1).draw("frequent-words", 512, 0).batch.tokens[0]
    assert shipped(shipped.decode(document[1:])).input_ids == document.tolist()


def test_the_frames_model_takes_twice_its_positions_by_another_name():
    once, twice = (load_model(f"bsfa/frames-llava{more}", device="cpu", dtype="bfloat16") for more in ("", "-2x"))
    assert twice.identity["id"] == "bsfa/frames-llava-2x" and twice.identity["weights"] == once.identity["weights"]
    assert once.identity["rope"]["rope_type"] == "default"
    config = twice.model.config.get_text_config()
    assert config.max_position_embeddings == 131072 and config.rope_parameters["factor"] == 2
    assert config.rope_parameters["original_max_position_embeddings"] == 65536
    rotary = twice.model.model.language_model.rotary_emb
    assert rotary.rope_type == "yarn" and rotary.attention_scaling == pytest.approx(1.0693, abs=1e-4)
    _, name, _ = load.load_empty("bsfa/frames-llava-2x")
    assert name == "bsfa/frames-llava-2x"


def test_the_bundled_model_fits_the_package():
    assert sum(file.stat().st_size for file in bundled.BUNDLED.iterdir()) < 8_000_000


def test_byte_level_tokens():
    tokenizer = random_weights.build_tokenizer()
    text = "Grüße, 世界\t\n"
    tokens = tokenizer(text).input_ids
    assert tokens == list(text.encode()) and tokenizer.decode(tokens) == text


def test_missing_and_empty_directories_and_files(tmp_path, checkpoint):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("./nowhere/at/all")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty")
    assert "is a file" in refused(checkpoint / "config.json")
    (checkpoint / "config.json").unlink()
    assert "no config.json" in refused(checkpoint)


def test_broken_configurations(checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "not valid JSON" in refused(checkpoint)
    (checkpoint / "config.json").write_text("[1]")
    assert "must hold a JSON object, got a list" in refused(checkpoint)
    (checkpoint / "config.json").write_text('{"model_type": "no-such-thing"}')
    assert "configuration" in refused(checkpoint) and "no-such-thing" in refused(checkpoint)


def test_a_model_without_a_tokenizer(checkpoint):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    assert "no tokenizer" in refused(checkpoint)


def test_a_broken_tokenizer(checkpoint):
    (checkpoint / "tokenizer.json").write_text("[]")
    assert "tokenizer" in refused(checkpoint)


def test_truncated_missing_and_incomplete_weights(checkpoint):
    from safetensors.torch import load, save_file

    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    tensors = load(content)
    for broken in (content[: len(content) // 2], b"", b"\xff" * 100):
        weights.write_bytes(broken)
        assert "weights" in refused(checkpoint)
    missing = dict(tensors)
    del missing["model.layers.0.self_attn.q_proj.weight"]
    save_file(missing, weights, metadata={"format": "pt"})
    assert "lacks 1 weights, among them model.layers.0.self_attn.q_proj.weight" in refused(checkpoint)
    misshapen = dict(tensors) | {"model.norm.weight": torch.ones(3)}
    save_file(misshapen, weights, metadata={"format": "pt"})
    assert "model.norm.weight is [3], expected [64]" in refused(checkpoint)
    weights.unlink()
    assert "weights" in refused(checkpoint)


def test_weights_that_the_configuration_has_no_place_for(tmp_path):
    """Fewer layers in the configuration than in the weights would otherwise be another model, loaded silently."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | {"num_hidden_layers": 3})).save_pretrained(tmp_path)
    random_weights.build_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refused(tmp_path)
    assert "do not fit its config.json: 9 have no place in it, among them model.layers.2." in message


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_named(saved, tmp_path, value):
    model = load_model(saved, device="cpu").model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :2] = value
    model.save_pretrained(tmp_path)
    random_weights.build_tokenizer().save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "model.layers.0.mlp.up_proj.weight holds 2 values that are NaN or infinite" in message
    assert "--dtype" not in message


def test_weights_past_the_range_of_float16_are_told_from_damaged_ones(saved, tmp_path):
    model = load_model(saved, device="cpu").model
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path)
    random_weights.build_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").model.dtype == torch.float32
    with pytest.raises(InputError, match="in float16; try --dtype bfloat16"):
        load_model(tmp_path, device="cpu", dtype="float16")


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ),
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(
                vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=257, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ),
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**TINY)),
    ],
    ids=["bert", "bert-lm-head", "t5", "llama-without-head"],
)
def test_models_that_are_no_causal_language_models(model, tmp_path):
    model().save_pretrained(tmp_path)
    random_weights.build_tokenizer().save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "encoder" in message


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("bsfa-nobody/no-such-model", MachineError)
    assert "cache" in message and "bsfa-nobody/no-such-model" in message


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:3"):
            with pytest.raises(MachineError, match="cpu"):
                load_model(None, device=name)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(UsageError, match="float8"):
        resolve_dtype("float8", torch.device("cpu"))


def test_running_out_of_memory_names_the_option():
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        with pytest.raises(MachineError, match="lower --length"), explain_memory("--length"):
            raise error
    with pytest.raises(MachineError, match="lower --length"), explain_memory("--length"):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="something else"), explain_memory("--length"):
        raise RuntimeError("something else")


def test_a_checkpoint_with_random_weights_keeps_its_label(tmp_path, monkeypatch):
    small = random_weights.config()
    small.update(dict(num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=300, head_dim=32))
    small.update(dict(num_attention_heads=2, num_key_value_heads=1))
    monkeypatch.setattr(random_weights, "config", lambda: small)
    random_weights.build(0, "cpu").save_pretrained(tmp_path)
    random_weights.build_tokenizer().save_pretrained(tmp_path)
    assert "nothing about accuracy" in load_model(tmp_path, device="cpu").label
