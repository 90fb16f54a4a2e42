"""A vision-language model of Qwen2.5-VL-7B's shape with random weights, for timing where nothing can be downloaded.

    loaded = random_qwen(device)                     # load.LoadedModel, made on the device
    loaded = random_qwen(device, layers=4)

Layer counts, widths, heads, M-RoPE and vision tower are the checkpoint's own; tokens are bytes. It says nothing about
accuracy.
"""

from __future__ import annotations

from typing import Any

import torch

from ..environment import free_memory
from ..errors import MachineError
from .load import LoadedModel
from .processor import images_only
from .random_weights import CONTENT, LABEL, LABEL_KEY, build_tokenizer

NAME = "random-qwen2.5-vl-7b"
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{%- for m in messages %}{{ m['role'] + '\n' }}{%- for c in m['content'] %}{%- if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{%- else %}{{ c['text'] }}{%- endif %}{%- endfor %}{{ '\n' }}"
    "{%- endfor %}"
)


def config(layers: int | None = None, width: int = 1):
    """Qwen2_5_VLConfig with the sizes of Qwen2.5-VL-7B, or `layers` of its text layers; widths divided by `width`."""
    from transformers import Qwen2_5_VLConfig

    ids = dict(zip(SPECIAL, range(257, 257 + len(SPECIAL)), strict=True))
    text = dict(
        vocab_size=152064, hidden_size=3584 // width, intermediate_size=18944 // width, num_hidden_layers=layers or 28,
        num_attention_heads=28 // width, num_key_value_heads=4 // min(width, 4), max_position_embeddings=128000,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]), bos_token_id=256,
        eos_token_id=256, pad_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    vision = dict(
        depth=32 // width, hidden_size=1280 // width, intermediate_size=3420 // width, num_heads=16 // width,
        out_hidden_size=3584 // width, fullatt_block_indexes=[7, 15, 23, 31], window_size=112, patch_size=14,
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], architectures=["Qwen2_5_VLForConditionalGeneration"],
        **{LABEL_KEY: LABEL},
    )  # fmt: skip


def random_qwen(
    device: torch.device, *, layers: int | None = None, side: int = 448, seed: int = 0, width: int = 1
) -> LoadedModel:
    """The model on `device`, in bfloat16 on a GPU and float32 on a CPU; images are scaled to `side` pixels, which is
    (side / 28) ** 2 tokens. Raises MachineError where its weights do not fit into what memory is free.
    """
    from bsfa_kernels.integrations.transformers import model_identity
    from transformers import Qwen2_5_VLForConditionalGeneration

    shape, dtype = config(layers, width), torch.bfloat16 if device.type == "cuda" else torch.float32
    _check_memory(shape, dtype, device)
    with torch.device(device):  # not the meta device: buffers have values of their own
        model = Qwen2_5_VLForConditionalGeneration._from_config(shape, attn_implementation="bsfa", dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0 if name.endswith("bias") else 1)
            else:
                spread = CONTENT**0.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                parameter.normal_(0, spread * parameter[0].numel() ** -0.5, generator=generator)
    model = model.eval()
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    identity = {"id": NAME, "revision": None, **model_identity(model)}
    return LoadedModel(model, tokenizer, identity, LABEL, _processor(tokenizer, side))


def _check_memory(shape, dtype: torch.dtype, device: torch.device) -> None:
    """A CPU would not refuse: the system ends whoever takes too much."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(shape, dtype=dtype)
    need, free = sum(x.numel() for x in model.parameters()) * dtype.itemsize, free_memory(device)
    if free is not None and need > free:
        raise MachineError(
            f"{NAME}: its weights need {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')} and "
            f"{free / 2**30:.1f} GiB are free on {device}; fewer --layers or a --width of 4 need less"
        )


def _processor(tokenizer, side: int) -> Any:
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(min_pixels=side * side, max_pixels=side * side, patch_size=14)
    return images_only(Qwen2_5_VLProcessor, image_processor=images, tokenizer=tokenizer, chat_template=TEMPLATE)
