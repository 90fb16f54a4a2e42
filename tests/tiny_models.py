"""Tiny random models of eight families, padded batches, and how their logits are compared."""

import warnings

import bsfa_kernels.integrations.transformers as bsfa
import torch
import transformers

WINDOW = 48
SHAPE = dict(
    vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
ALTERNATE = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-sliding": ("Qwen2ForCausalLM", dict(use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW)),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "mistral": ("MistralForCausalLM", dict(sliding_window=WINDOW)),
    "gemma2": ("Gemma2ForCausalLM", dict(**ALTERNATE, attn_logit_softcapping=5.0, query_pre_attn_scalar=64)),
    "gemma3": ("Gemma3ForCausalLM", dict(**ALTERNATE, query_pre_attn_scalar=64)),
    "gpt-oss": ("GptOssForCausalLM", dict(**ALTERNATE, num_local_experts=2, num_experts_per_tok=1)),
}
MLA = dict(  # heads of 48 for Q and K, of 32 for V
    num_key_value_heads=4, head_dim=16, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, n_group=1, topk_group=1,
    first_k_dense_replace=1,
)  # fmt: skip
OTHERS = {  # not part of every test
    "deepseek-v2": ("DeepseekV2ForCausalLM", MLA),
    "deepseek-v3": ("DeepseekV3ForCausalLM", MLA),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "granite-swa": ("GraniteSWAForCausalLM", dict(**ALTERNATE, attention_multiplier=64**-0.5)),
}
ROWS = {"whole": (0, 0), "left": (0, 61), "right": (0, -61)}


def build(name, place=("cpu", torch.float32), **overrides):
    kind, options = {**MODELS, **OTHERS}[name]
    settings = {**SHAPE, **options, **overrides}
    config = getattr(transformers, kind).config_class(**settings)
    torch.manual_seed(3)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            if path.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(1.7)
            if path.endswith("sinks"):
                parameter.fill_(1.0)
    return model.to(*place)


def batch(length, padding, device="cpu"):
    """(token ids [2, length], mask): the second sequence padded at the left (> 0) or right (< 0)."""
    ids = torch.randint(2, SHAPE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        if pad > 0:
            mask[row, :pad] = 0
        elif pad < 0:
            mask[row, pad:] = 0
    return ids.masked_fill(mask == 0, 0).to(device), mask.to(device)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model, implementation, ids, mask, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(ids, attention_mask=mask, position_ids=positions(mask), **options).logits


def assert_close(actual, expected):
    """Within rounding of the dtype at the scale of the logits."""
    eps = torch.finfo(actual.dtype).eps
    scale = expected.float().abs().max()
    error = (actual.float() - expected.float()).abs().max()
    assert error <= 64 * eps * scale, f"error {error:.3g} at scale {scale:.3g}"


def chunk(model, ids, mask, start, end, cache):
    model.set_attn_implementation("bsfa")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", bsfa.DenseFallback)
        return model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions(mask)[:, start:end],
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
