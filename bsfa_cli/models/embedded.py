"""The model that commands take when none is named: a small Llama, built here from a seed.

Its weights are random, so it says nothing about accuracy. It exists to run every command without a download: heads
attend to near tokens with different strengths and to matching content, so that skipping tiles has an effect.
"""

from __future__ import annotations

import torch

LABEL = "random weights: says nothing about accuracy"
LABEL_KEY = "bsfa_label"  # in the config.json of a checkpoint that bsfa made and must be labelled
ID = "bsfa/embedded-random-llama"
SEED = 20251
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 64, 256
MAX_POSITIONS = 131072
# Standard deviation of a score from content alone, and the bonus of the nearest tokens by query head.
CONTENT, NEARNESS = 1.5, (8.0, 14.0, 20.0, 28.0)


def build(attn_implementation: str):
    """LlamaForCausalLM in float32 on the CPU, the same for every call on every machine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, attention_bias=True,
        max_position_embeddings=MAX_POSITIONS, bos_token_id=256, eos_token_id=256, tie_word_embeddings=False,
        attn_implementation=attn_implementation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        for layer in model.model.layers:
            _shape_attention(layer.self_attn)
    return model


def _shape_attention(attention) -> None:
    """Scores of standard deviation CONTENT; equal query and key biases, which RoPE turns into nearness."""
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(CONTENT**0.5)
        projection.bias.zero_()
    for projection in (attention.v_proj, attention.o_proj):
        projection.bias.zero_()
    attention.k_proj.bias.fill_(1)
    # A query bias b against key biases of 1 adds scale * D * b to the score of a token's own position.
    bonus = torch.tensor(NEARNESS) / (attention.scaling * HEAD_DIM)
    attention.q_proj.bias.view(QUERY_HEADS, HEAD_DIM).add_(bonus[:, None])


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
