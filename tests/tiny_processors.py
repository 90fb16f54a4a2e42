"""Processors of vision-language models with a tokenizer of bytes and very small images, made without a network."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TEMPLATE = (
    "BEGIN{% for message in messages %}OPEN{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}CLOSE\n{% endfor %}"
    "{% if add_generation_prompt %}OPENassistant\n{% endif %}"
)


def template(image: str, begin: str = "", open: str = "[", close: str = "]") -> str:
    found = TEMPLATE.replace("BEGIN", begin).replace("IMAGE", image)
    return found.replace("OPEN", open).replace("CLOSE", close)


def tokenizer(specials=(), **options) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, additional_special_tokens=list(specials), **options)


def llava(chat_template: str | None = None) -> LlavaProcessor:
    """16 tokens an image."""
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer(["<image>"], bos_token="<s>"),
        patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template or template("<image>"),
    )  # fmt: skip


class _Qwen(Qwen2_5_VLProcessor):
    """Without a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)


def qwen() -> Qwen2_5_VLProcessor:
    """4 to 16 tokens an image, by its size."""
    specials = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28}
    return _Qwen(
        Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size), tokenizer(specials), None,
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>", "", "<|im_start|>", "<|im_end|>"),
    )  # fmt: skip


def gemma() -> Gemma3Processor:
    """4 tokens an image, and what stands around them."""
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer(extra_special_tokens=names, bos_token="<bos>"),
        image_seq_length=4, chat_template=template("<start_of_image>", "<bos>"),
    )  # fmt: skip


ALL = {"llava": llava, "qwen": qwen, "gemma": gemma}
