"""A small Llama with random weights, built from a seed: heads attend to near tokens with different strengths and to
matching content, so that skipping tiles has an effect.
"""

from __future__ import annotations

import torch

from bsfa_cli.models.random_weights import LABEL, LABEL_KEY, build_tokenizer

SEED = 20251
LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 4, 2, 64, 256
MAX_POSITIONS = 131072
# Standard deviation of a score from content alone, and the bonus of the nearest tokens by query head.
CONTENT, NEARNESS = 1.5, (8.0, 14.0, 20.0, 28.0)


def save(folder) -> None:
    """The model as a checkpoint directory."""
    build("sdpa").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def build(attn_implementation: str):
    """LlamaForCausalLM in float32 on the CPU, the same for every call on every machine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=257, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, attention_bias=True,
        max_position_embeddings=MAX_POSITIONS, bos_token_id=256, eos_token_id=256, tie_word_embeddings=False,
        attn_implementation=attn_implementation, **{LABEL_KEY: LABEL},
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
