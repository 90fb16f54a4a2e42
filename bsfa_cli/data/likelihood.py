"""The user's own questions, judged by likelihood: a .jsonl file, one question a line, in one of two forms.

    {"question": "...", "choices": ["...", "..."], "answer": 1}   is this choice, by number or text, the likeliest?
    {"text": "...", "answer": "..."}                              is every token of the answer the likeliest?

The first is multiple choice, the second cloze as LAMBADA's. A choice or an answer follows its text after a blank where
neither has one. A line may name its `task` for the results to be told apart by.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .texts import beginning, check_text, read_text, records

MOST_CHOICES = 64


@dataclass(frozen=True)
class LikelihoodQuestion:
    """`choices` of which number `answer` is right, each behind `text`; a single one is a cloze."""

    task: str
    text: str
    choices: tuple[str, ...]
    answer: int
    length: int | None = None
    depth: int | None = None

    def tokens(self, tokenizer) -> int:
        """Positions that it takes, with its longest choice. Raises InputError as `encoded` does."""
        return max(len(self.encoded(tokenizer, choice)[0]) for choice in self.choices)

    def encoded(self, tokenizer, choice: str) -> tuple[list[int], int]:
        """(tokens of the text and a choice, how many of them are the choice's), as they are tokenised together.

        Raises InputError where no token is the choice's alone.
        """
        lead = self.text.rstrip()
        rest = self.text[len(lead) :] + choice
        if not rest[0].isspace():
            rest = " " + rest
        options = dict(add_special_tokens=False, verbose=False)  # some tokenizers end a text
        tokens = tokenizer(lead + rest, **options).input_ids
        count = len(tokens) - len(tokenizer(lead, **options).input_ids)
        if count < 1:
            raise InputError(f"{choice[:40]!r} behind {lead[-40:]!r} has no token of its own")
        return [*beginning(tokenizer), *tokens], count


def is_likelihood(record: dict) -> bool:
    """Whether a line of a file is a question of this kind."""
    return "choices" in record or ("answer" in record and "outputs" not in record)


def read(path: Path) -> list[LikelihoodQuestion]:
    """The questions of a .jsonl file. Raises InputError, naming the line."""
    found = [_question(path, number, record) for number, record in records(path, read_text(path))]
    if not found:
        raise InputError(f"{path} holds no question")
    return found


def _question(path: Path, number: int, record: dict) -> LikelihoodQuestion:
    key = "question" if "question" in record else "text"
    check_text(path, number, key, record.get(key))
    if not record[key].strip():
        raise InputError(f"{path}, line {number}: {key!r} must be text and not blank")
    task = record.get("task", path.stem)
    check_text(path, number, "task", task)
    answer = record.get("answer")
    if "choices" not in record:
        check_text(path, number, "answer", answer)
        return LikelihoodQuestion(task, record[key], (answer,), 0)
    choices = record["choices"]
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        raise InputError(f"{path}, line {number}: 'choices' must be a list of 2 to {MOST_CHOICES} texts")
    for choice in choices:
        check_text(path, number, "choices", choice)
    if len(set(choices)) < len(choices):
        raise InputError(f"{path}, line {number}: a choice stands twice in 'choices'")
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise InputError(
            f"{path}, line {number}: 'answer' must be one of the choices, or its number from 0 to {len(choices) - 1}"
        )
    return LikelihoodQuestion(task, record[key], tuple(choices), answer)
