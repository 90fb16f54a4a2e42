"""Samples as text with a placeholder for every image: turns of a conversation, as the processor's template has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import InputError
from ..samples import MultimodalSample, turn
from ..samples import text as text_part

IMAGE = {"type": "image"}
MODALITIES = ("image", "vision", "video", "audio")  # in the names of tokens that stand for one, or begin or end it


def turns(sample: MultimodalSample) -> list[dict[str, Any]]:
    """The sample's messages and, where it has an answer, a turn of the assistant that gives the best one."""
    answered = [turn("assistant", text_part(sample.answer[0]))] if sample.answer else []
    return [*sample.messages, *answered]


class Chat:
    """A processor's chat template. Raises InputError where it has none, or shows no images."""

    def __init__(self, processor):
        self._processor = processor
        if not getattr(processor, "chat_template", None):
            raise InputError("this model's processor has no chat template, so it is not known how to show it an image")
        self.image_token = getattr(processor, "image_token", None)
        if not self.image_token or not hasattr(processor, "image_processor"):
            raise InputError("this model's processor takes no images")
        added = processor.tokenizer.get_added_vocab()
        seen = (token for token in added if any(word in token.lower() for word in MODALITIES))
        self._reserved = tuple(dict.fromkeys([self.image_token, *seen]))
        self._bos = processor.tokenizer.bos_token or ""

    def write(self, samples: Sequence[MultimodalSample]) -> list[str]:
        """The text of each sample; joined they are the whole conversation.

        Where the template does not write a turn alike whatever comes after it, every sample is a chat of its own, and
        only the first begins with BOS.
        """
        for sample in samples:
            self._check(sample)
        alone = [self._render(turns(sample)) for sample in samples]
        first, begun = turns(samples[0]), alone[0]
        found = [begun]
        for sample in samples[1:]:
            both = self._render([*first, *turns(sample)]) if samples[0].answer else ""
            found.append(both[len(begun) :] if both.startswith(begun) else "")
        conversation = [message for sample in samples for message in turns(sample)]
        if all(sample.answer for sample in samples[:-1]) and "".join(found) == self._render(conversation):
            return found
        return [begun, *(each.removeprefix(self._bos) for each in alone[1:])]

    def answers(self, question: MultimodalSample, candidates: Sequence[str]) -> tuple[str, list[str]]:
        """(what the template writes between a question and its answer, each candidate as it writes it there)."""
        for candidate in candidates:
            self._check_text(question.metadata["source"], candidate)
        asked = self._render(question.messages)
        begun = self._render(question.messages, add_generation_prompt=True)
        if not begun.startswith(asked):
            raise InputError("the processor's chat template writes a question otherwise where its answer is to come")
        found = []
        for candidate in candidates:
            whole = self._render([*question.messages, turn("assistant", text_part(candidate))])
            end = whole.rfind(candidate) + len(candidate)
            # Some templates put a thinking block before an answer that was given, and none where one is to come.
            found.append(whole[len(begun) : end] if whole.startswith(begun) and end > len(begun) else candidate)
        return begun[len(asked) :], found

    def begins_with_bos(self, text: str) -> bool:
        """Whether the template has written the beginning token already."""
        return bool(self._bos) and text.startswith(self._bos)

    def _check(self, sample: MultimodalSample) -> None:
        for message in turns(sample):
            for part in message["content"]:
                if part["type"] == "text":
                    self._check_text(sample.metadata["source"], part["text"])

    def _check_text(self, source: str, text: str) -> None:
        for token in self._reserved:
            if token in text:
                raise InputError(f"{source}: its text holds {token!r}, which this model reads as an image")

    def _render(self, messages: list[dict[str, Any]], **options) -> str:
        # The template sees that there is an image; which one is no concern of it.
        shown = [
            message | {"content": [part if part["type"] == "text" else IMAGE for part in message["content"]]}
            for message in messages
        ]
        try:
            return self._processor.apply_chat_template(shown, tokenize=False, **options)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"the processor's chat template refuses a sample: {reason}") from None
