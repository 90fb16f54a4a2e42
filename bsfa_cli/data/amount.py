"""How much data is made at most, so that a count with digits too many is refused and not worked on for days."""

from __future__ import annotations

from ..errors import UsageError

MOST_TOKENS = 1 << 27  # kept as Python's numbers: 5 GB


def check_amount(count: int, tokens: int, option: str) -> None:
    """Raise UsageError where `count`, which `option` sets, pieces of `tokens` tokens each are more."""
    if count * tokens > MOST_TOKENS:
        raise UsageError(
            f"{count * tokens:,} tokens are more than the {MOST_TOKENS:,} that bsfa makes at most; lower "
            + (f"{option} or the length" if count > 1 else "the length")
        )
