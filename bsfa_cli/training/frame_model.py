"""The bundled vision-language model: a LLaVA of a small CLIP tower and a Llama, its export, its accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..data import frame_tasks
from ..data.frame_questions import pixel_values
from ..data.frame_tasks import FIRST_VALUES, IDS, IMAGE, WORDS
from ..data.frames import MARK, MARK_WIDTH, PATCH, SIDE, SIZES, TOKENS
from ..data.vocabulary import BEGIN, END, PAD, build_tokenizer
from ..models.random_weights import LABEL_KEY
from . import frame_curriculum

LABEL = "trained on rendered frames only: says little about other models"
FULL = {
    "text": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 128},
    "vision": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
}  # fmt: skip
TOY = {
    "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip


def build(shape: dict[str, dict[str, int]], seed: int):
    """LlavaForConditionalGeneration in float32 on the CPU with weights drawn from `seed`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=-(-len(WORDS) // 64) * 64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7}, tie_word_embeddings=True,
        bos_token_id=IDS[BEGIN], eos_token_id=IDS[END], pad_token_id=IDS[PAD], **shape["text"],
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=64, **shape["vision"])
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IDS[IMAGE], image_seq_length=TOKENS,
        vision_feature_layer=-1, vision_feature_select_strategy="default", tie_word_embeddings=True,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # CLIP's last norm is for its class token, which LLaVA does not read.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    return model


@torch.no_grad()
def begin_with(model, folder: Path, seed: int) -> None:
    """Take over a Llama's layers, last norm and words, as LLaVA began with Vicuna. Words it does not know are drawn
    from `seed` with the mean and covariance of its own: the heads that look back for a match work on them at once.

    Raises RuntimeError where its shapes are others.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    known = AutoTokenizer.from_pretrained(folder).get_vocab()
    language = model.model.language_model
    language.layers.load_state_dict(llama.layers.state_dict())
    language.norm.load_state_dict(llama.norm.state_dict())
    trained = llama.embed_tokens.weight[: len(known)]
    words = torch.distributions.MultivariateNormal(trained.mean(0), trained.T.cov() + 1e-6 * torch.eye(len(trained.T)))
    torch.manual_seed(seed)
    embedding = language.embed_tokens.weight
    embedding.copy_(words.sample((len(embedding),)))
    shared = [word for word in WORDS if word in known]
    embedding[[IDS[word] for word in shared]] = trained[[known[word] for word in shared]]


def alignment_logits(seen: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each attribute, logits [F, its values] that a frame shows them: the mean of what the language model gets to
    see of the frame, `seen` [F, TOKENS, hidden], against the embeddings of the words for them.
    """
    first = int(FIRST_VALUES[0])
    words = embedding[first : first + int(SIZES.sum())]
    return (seen.float().mean(1) @ words.float().T).split(SIZES.tolist(), 1)


def build_processor():
    """LlavaProcessor of this model's texts and frames."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        do_resize=True, size={"height": SIDE, "width": SIDE}, do_center_crop=False,
        crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images, build_tokenizer(WORDS, (IMAGE,)), patch_size=PATCH, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def exported(model):
    """A copy in bfloat16 with the configuration that is saved."""
    from transformers import LlavaForConditionalGeneration

    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    config.update({LABEL_KEY: LABEL})
    copy = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    return copy


def export(model, folder: Path) -> None:
    """The model in bfloat16 as a Hugging Face checkpoint, with its processor."""
    exported(model).save_pretrained(folder)
    build_processor().save_pretrained(folder)


@torch.no_grad()
def accuracy(
    model, task: str, length: int, documents: int, values: np.ndarray, bank: torch.Tensor
) -> tuple[float, float]:
    """(share of questions answered exactly, share of answer tokens right), one question a document, in one prefill.

    `bank` uint8 [B, SIDE, SIDE, 3], on the model's device, and its values [B, 5] are of held-out frames.
    """
    exact = right = 0.0
    for index in range(documents):
        rng = np.random.default_rng([index, length, frame_tasks.NAMES.index(task)])
        images, tokens, _, marked, answer = frame_curriculum.document_for_test(
            task, length, index % frame_tasks.DEPTHS, values, rng
        )
        frames = marked_frames(bank[torch.from_numpy(images).to(bank.device)], np.arange(len(images)) == marked)
        tokens = torch.from_numpy(tokens).to(bank.device)
        hidden = model.model(
            input_ids=tokens[None], pixel_values=pixel_values(frames), use_cache=False
        ).last_hidden_state
        predicted = model.lm_head(hidden[0, answer.start - 1 : answer.stop - 1]).argmax(-1)
        match = predicted == tokens[answer]
        exact += float(match.all())
        right += float(match.float().mean())
    return exact / documents, right / documents


def marked_frames(frames: torch.Tensor, marks: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The frames uint8 [F, SIDE, SIDE, 3] with a border where `marks` [F] is true, as `frames.mark` draws it."""
    edge = torch.ones(SIDE, SIDE, dtype=torch.bool, device=frames.device)
    edge[MARK_WIDTH:-MARK_WIDTH, MARK_WIDTH:-MARK_WIDTH] = False
    marks = torch.as_tensor(marks).to(frames.device, non_blocking=True)
    colour = torch.empty(3, dtype=torch.uint8, device=frames.device)
    for channel, value in enumerate(MARK):
        colour[channel] = value  # a tensor made of Python's numbers would wait for the GPU
    return torch.where((marks[:, None, None] & edge)[..., None], colour, frames)
