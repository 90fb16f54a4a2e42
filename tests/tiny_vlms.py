"""Tiny random vision-language checkpoints of four families, each with its processor, in folders as on the Hub."""

from __future__ import annotations

import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bsfa_cli.models.random_weights import build_tokenizer

SIDE, TOKENS = 168, 144  # pixels, and tokens an image in every family: two tiles of queries and more
WINDOW = 96
TEXT = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=288, max_position_embeddings=4096, bos_token_id=256, eos_token_id=256, pad_token_id=256,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
QWEN_VISION = dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=14)
ROPE = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e4)
FAMILIES = ("llava", "qwen2.5-vl", "qwen3-vl", "gemma3")
TEMPLATE = (
    "{%- for m in messages %}{{ m['role'] + ': ' }}{%- for c in m['content'] %}"
    "{%- if c['type'] == 'image' %}IMAGE{%- else %}{{ c['text'] }}{%- endif %}{%- endfor %}{{ '\n' }}{%- endfor %}"
)


def build(family: str, **text):
    """(model in float32, its folder's image processor, tokenizer)."""
    text = TEXT | text
    tokenizer = build_tokenizer()
    special = {"llava": ["<image>"], "gemma3": ["<boi>", "<eoi>", "<soft>"]}.get(
        family, ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    size = dict(height=SIDE, width=SIDE)
    if family == "llava":
        shown = "<image>"
        config = transformers.LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", image_size=SIDE, **VISION),
            text_config=dict(model_type="llama", **text), image_token_id=ids["<image>"], image_seq_length=TOKENS,
        )  # fmt: skip
        images = CLIPImageProcessorPil(size=dict(shortest_edge=SIDE), crop_size=size)
        model = transformers.LlavaForConditionalGeneration(config)
    elif family == "gemma3":
        shown = "<boi>"
        for name, token in (("boi_token", "<boi>"), ("eoi_token", "<eoi>"), ("image_token", "<soft>")):
            tokenizer._set_model_specific_special_tokens({name: token})
        text |= dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
        config = transformers.Gemma3Config(
            vision_config=dict(image_size=SIDE, **VISION), text_config=dict(query_pre_attn_scalar=16, **text),
            boi_token_index=ids["<boi>"], eoi_token_index=ids["<eoi>"], image_token_index=ids["<soft>"],
            mm_tokens_per_image=TOKENS,
        )  # fmt: skip
        images = Gemma3ImageProcessorPil(size=size)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        names = dict(
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        )  # fmt: skip
        text |= dict(rope_parameters=ROPE)
        pixels = TOKENS * 28 * 28
        images = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels, patch_size=14)
        if family == "qwen2.5-vl":
            vision = QWEN_VISION | dict(window_size=56, fullatt_block_indexes=[1])
            config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **names)
            model_class = transformers.Qwen2_5_VLForConditionalGeneration
        else:
            vision = QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=576)
            config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **names)
            model_class = transformers.Qwen3VLForConditionalGeneration
        model = model_class(config)
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", shown)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                spread = 2.5 if path.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread * fan_in**-0.5)
    return model.eval(), images, tokenizer


def save(family: str, folder, **text) -> None:
    """A checkpoint that AutoModelForImageTextToText and AutoProcessor read."""
    model, images, tokenizer = build(family, **text)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    if family == "llava":
        (folder / "processor_config.json").write_text(
            '{"processor_class": "LlavaProcessor", "patch_size": 14, "num_additional_image_tokens": 1, '
            '"vision_feature_select_strategy": "default", "image_token": "<image>"}'
        )
    if family == "gemma3":
        (folder / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "image_seq_length": 144}')
