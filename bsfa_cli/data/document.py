"""Documents of an exact number of tokens: filler with sentences inserted between its own, whole batches at once.

The same code makes training batches on a GPU and evaluation texts on a CPU, so both have the same distribution.
"""

from __future__ import annotations

from functools import cache

import torch

from . import templates
from .vocabulary import BEGIN, IDS, RANGES

# Codes below zero in a template's table: arguments first, then random words of a class.
MOST_ARGUMENTS = 20
CLASS_CODES = {name: -MOST_ARGUMENTS - 1 - index for index, name in enumerate(RANGES)}
ID_OF_TEXT = {text: index for index, text in enumerate(templates.ALL_TEXTS)}


@cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [templates, longest], lengths [templates], answer [templates, longest] bool) of ALL_TEXTS."""
    rows = [[_code(word) for word in templates.words(text)] for text in templates.ALL_TEXTS]
    longest = max(map(len, rows))
    codes = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    answer = torch.zeros(codes.shape, dtype=torch.bool)
    for index, text in enumerate(templates.ALL_TEXTS):
        where = templates.answer(text)
        if where is not None:
            answer[index, where] = True
    return codes.to(device), torch.tensor([len(row) for row in rows], device=device), answer.to(device)


def length_of(text: str) -> int:
    """Tokens of a template."""
    return len(templates.words(text))


def prose(rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Filler tokens [rows, length] and the places between its sentences [rows, n], ascending, the last one `length`."""
    device = generator.device
    codes, lengths, _ = tables(device)
    lengths = lengths[: len(templates.FILLER)]
    shortest = min(map(length_of, templates.FILLER))
    kinds = torch.randint(len(lengths), (rows, length // shortest + 1), generator=generator, device=device)
    ends = lengths[kinds].cumsum(1)
    last = torch.searchsorted(ends, torch.full((rows, 1), length, device=device))
    # The text begins within a sentence, so that it ends with a whole one.
    cut = ends.gather(1, last) - length
    places = torch.arange(length, device=device) + cut
    sentence = torch.searchsorted(ends, places, right=True)
    kind = kinds.gather(1, sentence)
    offset = places - (ends.gather(1, sentence) - lengths[kind])
    tokens = _draw_classes(codes[kind, offset], generator)
    return tokens, (ends - cut).clamp(0, length)


def _draw_classes(codes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(codes.shape, generator=generator, device=codes.device)
    for name, (first, last) in RANGES.items():
        drawn = first + (uniform * (last + 1 - first)).long()
        codes = torch.where(codes == CLASS_CODES[name], drawn, codes)
    return codes


def places_near(breaks: torch.Tensor, wanted: torch.Tensor, length: int) -> torch.Tensor:
    """The first place between sentences at or after the share `wanted` [B, E] (0 to 1) of `length` filler tokens."""
    return breaks.gather(1, torch.searchsorted(breaks, (wanted * length).long()))


def insert(
    filler: torch.Tensor, places: torch.Tensor, kinds: torch.Tensor, arguments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences put into filler [B, F] at `places` [B, E], ascending: (tokens [B, T], answer mask [B, T]).

    `kinds` [B, E] are indices into ALL_TEXTS, `arguments` [B, E, MOST_ARGUMENTS] token ids. Every row's sentences
    must have the same number of tokens in all. The document begins with BOS.
    """
    device = filler.device
    codes, lengths, answer = tables(device)
    rows, filler_length = filler.shape
    sizes = lengths[kinds]
    before = sizes.cumsum(1)
    total = filler_length + int(before[0, -1])
    starts = places + before - sizes
    positions = torch.arange(total, device=device).expand(rows, total).contiguous()
    event = torch.searchsorted(starts, positions, right=True) - 1
    started = event >= 0
    event = event.clamp(min=0)
    offset = positions - starts.gather(1, event)
    kind = kinds.gather(1, event)
    inside = started & (offset < lengths[kind])
    offset = offset.clamp(0, codes.shape[1] - 1)
    code = codes[kind, offset]
    argument = (-1 - code).clamp(0, MOST_ARGUMENTS - 1)
    row = torch.arange(rows, device=device)[:, None]
    sentence = torch.where(code < 0, arguments[row, event, argument], code)
    gone = torch.where(started, before.gather(1, event), 0)
    rest = filler.gather(1, (positions - gone).clamp(0, filler_length - 1))
    tokens = torch.where(inside, sentence, rest)
    begin = torch.full((rows, 1), IDS[BEGIN], device=device)
    return (
        torch.cat([begin, tokens], 1),
        torch.cat([torch.zeros_like(begin, dtype=torch.bool), inside & answer[kind, offset]], 1),
    )


def _code(word: str) -> int:
    if not word.startswith("{"):
        return IDS[word]
    slot = word.strip("{}")
    return -1 - int(slot) if slot.isdecimal() else CLASS_CODES[slot]
