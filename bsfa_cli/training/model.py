"""The bundled model's architecture, its export, and its accuracy on documents it has not seen."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from ..data import tasks
from ..data.questions import HELD_OUT
from ..data.vocabulary import BEGIN, END, IDS, PAD, WORDS, build_tokenizer
from ..files import write_whole
from ..models.random_weights import LABEL_KEY

LABEL = "trained on synthetic retrieval tasks only: says little about other models"
FULL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 128}  # fmt: skip
TOY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
       "num_key_value_heads": 1, "head_dim": 64}  # fmt: skip


def build(shape: dict[str, int], seed: int):
    """LlamaForCausalLM in float32 on the CPU with weights drawn from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(WORDS) // 64) * 64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7}, tie_word_embeddings=True,
        bos_token_id=IDS[BEGIN], eos_token_id=IDS[END], pad_token_id=IDS[PAD], attn_implementation="sdpa", **shape,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def export(model, folder: Path) -> None:
    """The model in bfloat16 as a Hugging Face checkpoint: four files."""
    tensors = {name: parameter.detach().to("cpu", torch.bfloat16) for name, parameter in model.named_parameters()}
    write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    config = type(model.config).from_dict({**model.config.to_dict(), "dtype": "bfloat16"})
    config.architectures = [type(model).__name__]
    config.update({LABEL_KEY: LABEL})
    config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


@torch.no_grad()
def accuracy(model, name: str, length: int, documents: int, rows: int = 1) -> tuple[float, float]:
    """(share of questions answered exactly, share of answer tokens right), one question a document, in one prefill.

    `documents` is a multiple of `rows`.
    """
    device = next(model.parameters()).device
    exact = right = 0.0
    for index in range(0, documents, rows):
        generator = torch.Generator(device).manual_seed(HELD_OUT | index)
        depth = index // rows % tasks.DEPTHS
        batch = tasks.make(name, length=length, rows=rows, generator=generator, depth=depth)
        hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, batch.predicting])
        match = batch.right(logits.argmax(-1))
        exact += match.all(1).float().sum().item()
        right += match.float().mean(1).sum().item()
    return exact / documents, right / documents
