"""Files of questions: RULER's, answered by generation, or choices and clozes, answered by likelihood."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from . import likelihood, ruler
from .likelihood import LikelihoodQuestion
from .questions import TextQuestion
from .texts import read_text, records

if TYPE_CHECKING:
    from ..models.load import LoadedModel


def read(path: Path) -> list[TextQuestion] | list[LikelihoodQuestion]:
    """The questions of a .jsonl file, all of one kind. Raises InputError, naming the line."""
    kinds = {likelihood.is_likelihood(record): number for number, record in records(path, read_text(path))}
    if len(kinds) > 1:
        raise InputError(
            f"{path}, line {max(kinds.values())}: all lines must be of one kind: RULER's (input, outputs) or by "
            "likelihood (question, choices, answer; or text, answer)"
        )
    return (likelihood if kinds.get(True) else ruler).read(path)


def check_positions(path: Path, questions: list[TextQuestion] | list[LikelihoodQuestion], loaded: LoadedModel) -> None:
    """Raise InputError for a question that does not fit, its answer included, into the model's positions."""
    from bsfa_kernels.integrations.modules import most_positions

    most = most_positions(loaded.model.config)
    for number, question in enumerate(questions, 1):
        tokens = question.tokens(loaded.tokenizer)
        if most is not None and tokens > most:
            raise InputError(
                f"{path}, question {number}: its {tokens:,} tokens, answer included, are past the model's {most:,} "
                "positions (max_position_embeddings)"
            )
