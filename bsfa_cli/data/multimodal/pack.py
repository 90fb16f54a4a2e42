"""Samples packed into one sequence of a length that a benchmark's own samples do not reach.

    packed = pack(processor, samples, length=32768)
    model(**packed.inputs)

Whole samples follow each other until the length is reached; what is over is cut off the end, between text tokens or
before an image, never within one, so that the sequence may end up to an image short of the length. The processor is
called once for all of it, as a server would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from ...errors import InputError
from ..samples import MultimodalSample
from .encode import BY_TOKEN, MASK, TOKENS, Encoded, Encoder, pictures
from .packed import Packed, Part

MOST_SAMPLES = 20_000  # of a pack: beyond any context

Chosen = tuple[MultimodalSample, int]  # a sample, and how often it came before


class TooShort(InputError):
    """The samples do not reach the length."""


def pack(processor, samples: Iterable[MultimodalSample], length: int, *, repeat: bool = False) -> Packed | None:
    """As many of `samples` as `length` tokens need, in turn; None where there are none.

    `repeat` begins with the first again where they do not suffice, and says so in the parts. Raises TooShort where they
    do not suffice without, naming how far they got, and InputError for an image or a text that cannot be used.
    """
    encoder, total = Encoder(processor), 0
    chosen: list[Chosen] = []
    for sample, count in _turns(samples, repeat):
        chosen.append((sample, count))
        total += added(encoder, chosen[0][0], sample)
        if len(chosen) > MOST_SAMPLES:
            raise InputError(f"{MOST_SAMPLES:,} samples have {total:,} tokens and do not reach {length:,}")
        if total < length:
            continue
        texts = encoder.chat.write([sample for sample, _ in chosen])
        encoded = encoder.encode("".join(texts), pictures([sample for sample, _ in chosen]), _words(chosen))
        total = encoded.length
        if total >= length:
            return _cut(encoder, encoded, texts, chosen, length)
    if not chosen:
        return None
    raise TooShort(
        f"the data end after {len(chosen)} sample(s) of {total:,} tokens together, which do not reach {length:,}; give "
        "more data, a shorter --length, or --repeat-data"
    )


def packed(encoded: Encoded, parts: Iterable[Part], size: int, name: str, source: str) -> Packed:
    """The first `size` tokens of what was encoded; the images must be among them."""
    extra = {}
    for key, tensor in encoded.tensors.items():
        if key in BY_TOKEN:
            tensor = tensor[:, :size]
        elif tuple(tensor.shape[:2]) == (1, encoded.length):
            raise InputError(f"this model's processor gives {key!r} by token, which bsfa does not know how to cut")
        if key == MASK and not bool(tensor.all()):
            raise InputError("this model's processor pads a single sequence, which bsfa does not know how to read")
        if key not in (TOKENS, MASK):
            extra[key] = tensor
    tokens = tuple(encoded.tensors[TOKENS][0, :size].tolist())
    return Packed(name, tokens, source, extra, tuple(parts), tuple(encoded.images))


def _turns(samples: Iterable[MultimodalSample], repeat: bool) -> Iterator[Chosen]:
    seen = []
    for sample in samples:
        seen.append(sample)
        yield sample, 0
    count = 1
    while seen and repeat:
        yield from ((sample, count) for sample in seen)
        count += 1


def added(encoder: Encoder, first: MultimodalSample, sample: MultimodalSample) -> int:
    """Tokens that `sample` adds to a conversation which `first` began; nearly so, as tokens may join across it."""
    begins = sample is first
    text = encoder.chat.write([first] if begins else [first, sample])[-1]
    return encoder.encode(text, pictures([sample]), sample.metadata["source"], begins).length


def _cut(
    encoder: Encoder, encoded: Encoded, texts: Sequence[str], chosen: list[Chosen], length: int
) -> Packed:  # fmt: skip
    """At most `length` tokens of it, images whole."""
    kept, size = sum(stop <= length for _, stop in encoded.images), length
    pieces = encoded.pieces(texts)
    if kept < len(encoded.placeholders):
        start = encoded.images[kept][0]
        follows = kept > 0 and encoded.images[kept - 1][1] == start  # an image at once, as frames may
        opening = None if follows else int(encoded.tensors[TOKENS][0, start - 1])
        text = "".join(texts)[: encoded.placeholders[kept][0]]
        encoded = encoder.encode(text, pictures([sample for sample, _ in chosen])[:kept], _words(chosen))
        size = min(length, encoded.length)
        if opening in encoder.tokenizer.all_special_ids and encoded.tensors[TOKENS][0, size - 1] == opening:
            size -= 1  # what opens an image that was cut off
    parts = [
        Part(sample.id, sample.metadata["source"], start, min(stop, size), stop <= size, repeat)
        for (sample, repeat), (start, stop) in zip(chosen, pieces, strict=True)
        if start < size
    ]
    names = hashlib.sha256(json.dumps([part.id for part in parts]).encode()).hexdigest()[:12]
    return packed(encoded, parts, size, f"pack-{names}", _words(chosen[: len(parts)]))


def _words(chosen: list[Chosen]) -> str:
    """What is packed."""
    count, shown = len(chosen), len(pictures([sample for sample, _ in chosen]))
    first = chosen[0][0].metadata["source"]
    words = f"{count} samples with {shown} images, the first {first}" if count > 1 else f"{first}, {shown} images"
    times = chosen[-1][1] + 1
    return words if times == 1 else f"{words}, each up to {times} times"
