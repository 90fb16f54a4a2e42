"""Text and images through a model's processor, and where in the tokens each of them lies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..samples import MultimodalSample
from . import images
from .chat import Chat

TOKENS, MASK = "input_ids", "attention_mask"
BY_TOKEN = (TOKENS, MASK, "token_type_ids", "mm_token_type_ids")  # [1, T]
UNPLACED = "this model's tokenizer does not say where in a text its tokens stand"
MOST_PIXELS = 1 << 31  # of one sequence's images, 6 GB as RGB: a processor takes them all at once
OFFSETS, REPLACED = "offset_mapping", "text_replacement_offsets"


@dataclass(frozen=True)
class Encoded:
    """What a processor made of a text.

    `tensors` are the model's inputs, `offsets` int64 [T, 2] the characters that each token stands for in the text after
    replacement; `placeholders` and `replaced` are the characters of every image before and after it.
    """

    tensors: dict[str, Any]
    offsets: Any
    placeholders: list[tuple[int, int]]
    replaced: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return self.tensors[TOKENS].shape[1]

    @cached_property
    def images(self) -> list[tuple[int, int]]:
        """(start, stop) of every image's tokens."""
        return [self._tokens(*where) for where in self.replaced]

    def pieces(self, texts: Sequence[str]) -> list[tuple[int, int]]:
        """(start, stop) of the tokens of every piece, which joined are the text that was encoded."""
        found, place = [], 0
        for text in texts:
            found.append(self._tokens(self._after(place), self._after(place + len(text))))
            place += len(text)
        return found

    def _tokens(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens that begin within these characters."""
        tokens, begins = self._begins
        first, last = bisect_left(begins, start), bisect_left(begins, stop) - 1
        if first <= last and tokens[last] - tokens[first] == last - first:
            return tokens[first], tokens[last] + 1
        raise InputError(UNPLACED)

    @cached_property
    def _begins(self) -> tuple[list[int], list[int]]:
        """(tokens that stand for characters, the first character of each); BOS and the like stand for none."""
        placed = [(token, begin) for token, (begin, end) in enumerate(self.offsets.tolist()) if end > begin]
        tokens, begins = [token for token, _ in placed], [begin for _, begin in placed]
        if begins != sorted(begins):
            raise InputError(UNPLACED)
        return tokens, begins

    def _after(self, place: int) -> int:
        """A character's place after replacement."""
        done = sum(stop <= place for _, stop in self.placeholders)
        return place + (self.replaced[done - 1][1] - self.placeholders[done - 1][1] if done else 0)


class Encoder:
    """Raises InputError for a processor without images or template, or one that says not where it puts their tokens."""

    def __init__(self, processor):
        images.check_pillow()
        self.chat = Chat(processor)
        self.tokenizer = processor.tokenizer
        self._processor = processor

    def encode(self, text: str, pictures: Sequence, source: str, begins: bool = True) -> Encoded:
        """`text`, in which a placeholder stands for each of `pictures` (paths or PIL images). Unless it `begins` a
        sequence, no beginning token is added.
        """
        found = text.count(self.chat.image_token)
        if found != len(pictures):
            raise InputError(
                f"{source}: the processor's chat template writes {found} placeholders for {len(pictures)} images"
            )
        opened = self._opened(pictures, source)
        try:
            output = self._processor(
                text=[text], images=opened or None, return_tensors="pt", return_offsets_mapping=True,
                return_text_replacement_offsets=True, verbose=False,
                add_special_tokens=begins and not self.chat.begins_with_bos(text),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a processor may raise anything, such as for an image's proportions
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{source}: the model's processor refuses it: {reason}") from None
        data = dict(output)
        offsets, replaced = data.pop(OFFSETS, None), data.pop(REPLACED, [[]])[0]
        if offsets is None or len(replaced) != len(pictures):
            raise InputError("this model's processor does not say where it puts the tokens of an image")
        return Encoded(data, offsets[0], [each["span"] for each in replaced], [each["new_span"] for each in replaced])

    def _opened(self, pictures: Sequence, source: str) -> list:
        opened, pixels = [], 0
        for each in pictures:
            try:
                opened.append(images.read(each) if isinstance(each, Path) else each)
            except InputError as error:
                raise InputError(f"{source}: {error}") from None
            pixels += opened[-1].width * opened[-1].height
            if pixels > MOST_PIXELS:
                raise InputError(
                    f"{source}: its images have more than {MOST_PIXELS:,} pixels in all; make them smaller, since the "
                    "model's processor does so anyway"
                )
        return opened


def pictures(samples: Sequence[MultimodalSample]) -> list:
    """The images of samples, in order, unopened."""
    return [picture for sample in samples for picture in sample.images()]
