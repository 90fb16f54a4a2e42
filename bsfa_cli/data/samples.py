"""One multimodal sample: what a model is shown and asked, in Hugging Face's chat format, and what counts as right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class MultimodalSample:
    """A conversation over images, not yet tokenised.

    Attributes:
        messages: turns {"role": "user", "content": [part, ...]}, a part being {"type": "text", "text": str} or
            {"type": "image", "image": Path or PIL image}. A path is read when the sample is packed, not before. The
            answer is not among them; packing adds it as a turn of the assistant.
        id: names the sample within its file.
        answer: the answers that count as right, best first; None where the data gives none.
        metadata: what results are split by and scored with. Always "task" ("vqa", "caption", ...) and "source" (file
            and place in it); where the data has them "benchmark", "category", "depth" (0 to 1), "length_class",
            "options" (the candidates that an answer is chosen from) and "counts" (of each answer, for VQA's accuracy).
    """

    messages: list[dict[str, Any]]
    id: str
    answer: tuple[str, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def images(self) -> Iterator[Path | Image]:
        """The images of all turns, in the order in which the model sees them."""
        for message in self.messages:
            for part in message["content"]:
                if part["type"] == "image":
                    yield part["image"]


def text(value: str) -> dict[str, str]:
    """A content part of text."""
    return {"type": "text", "text": value}


def image(value: Path | Image) -> dict[str, Any]:
    """A content part that is an image, or the path of one."""
    return {"type": "image", "image": value}


def turn(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    """A message of `role` ("user" or "assistant") with these content parts."""
    return {"role": role, "content": list(content)}
