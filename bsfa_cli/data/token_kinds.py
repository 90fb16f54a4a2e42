"""Kinds of the tokens that a model predicts: by how they are spelt, and by whether the text has had them before."""

from __future__ import annotations

from collections.abc import Sequence

SPELLINGS = ("word start", "continuation", "number", "punctuation", "blank")
# A pair is a token and the one before it; one that stood earlier can be copied by attending to it (induction).
HISTORIES = ("pair seen in the last 512", "pair seen farther back", "token seen, pair not", "token not seen")
NEAR = 512  # positions


def spelling(text: str) -> str:
    """One of SPELLINGS for a decoded token."""
    word = text.strip()
    if not word:
        return "blank"
    if not any(map(str.isalnum, word)):
        return "punctuation"
    if any(map(str.isdigit, word)):
        return "number"
    return "word start" if text[0].isspace() else "continuation"


def spellings(tokens: Sequence[int], tokenizer) -> list[str]:
    """The spelling of every token but the first: of what each position but the last predicts."""
    known: dict[int, str] = {}
    for token in set(tokens):
        # Alone, some tokenizers decode a token without the blank that it begins with.
        piece = tokenizer.convert_ids_to_tokens(int(token))
        text = tokenizer.decode([int(token)])
        if isinstance(piece, str) and piece[:1] in ("Ġ", "▁") and not text[:1].isspace():
            text = " " + text
        known[token] = spelling(text)
    return [known[token] for token in tokens[1:]]


def histories(tokens: Sequence[int]) -> list[str]:
    """One of HISTORIES for every token but the first."""
    pairs: dict[tuple[int, int], int] = {}
    seen, found = set(tokens[:1]), []
    for position in range(1, len(tokens)):
        pair = (tokens[position - 1], tokens[position])
        if pair in pairs:
            found.append(HISTORIES[0] if position - pairs[pair] <= NEAR else HISTORIES[1])
        else:
            found.append(HISTORIES[2] if tokens[position] in seen else HISTORIES[3])
        pairs[pair] = position
        seen.add(tokens[position])
    return found
