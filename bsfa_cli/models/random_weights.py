"""Write a checkpoint of a known model's shape with random weights, for timing where nothing can be downloaded.

    python -m bsfa_cli.models.random_weights DIRECTORY [--seed 0]

Llama-3.1-8B: its layer count, widths, heads and rope; byte-level tokens. It says nothing about accuracy.
"""

from __future__ import annotations

import argparse

LABEL = "random weights: says nothing about accuracy"
LABEL_KEY = "bsfa_label"  # in the config.json of a checkpoint that bsfa made and must be labelled
# Standard deviation of a query-key score in natural units: peaked enough that tiles differ.
CONTENT = 3.0


def config():
    """LlamaConfig with the sizes of Llama-3.1-8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        bos_token_id=256, eos_token_id=256, tie_word_embeddings=False, **{LABEL_KEY: LABEL},
    )  # fmt: skip


def build(seed: int, device: str):
    """LlamaForCausalLM in bfloat16: weights of variance 1 / fan-in, scores of standard deviation CONTENT."""
    import torch
    from transformers import LlamaForCausalLM

    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config()).to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.dim() == 1:
            value.fill_(1)
        else:
            spread = CONTENT**0.5 if owner.endswith(("q_proj", "k_proj")) else 1.0
            value.normal_(0, spread * parameter.shape[1] ** -0.5, generator=generator)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))
    return model


def build_tokenizer():
    """Byte-level: token i is byte i of the text's UTF-8, 256 begins and ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())} | {"<|end|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def _printable_bytes() -> list[str]:
    """The character by which byte-level BPE spells each byte: itself where printable, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build(options.seed, "cuda" if torch.cuda.is_available() else "cpu").save_pretrained(options.directory)
    build_tokenizer().save_pretrained(options.directory)


if __name__ == "__main__":
    main()
