"""Verify operating points by what the model answers: dense, then sparse, on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules
from bsfa_kernels.thresholds import Thresholds

from ..models.load import LoadedModel
from ..suites.run import Answer, Examiner, dense_handlers, exact_instead, examine
from ..suites.summary import summarise
from .run import absurd, made_for, scores_of

DENSE = "dense"


def verify_tasks(
    loaded: LoadedModel, thresholds: Thresholds, points: list[str], questions: Sequence, backend: str,
    step: Callable[[], None], scores: str | None = None,
) -> tuple[dict, list[dict], dict[str, list[Answer]]]:  # fmt: skip
    """(dense summary, one summary per point, the answers by name, "dense" among them); see `summarise`.

    `step` is called after every answer, (1 + points) times a question. The model must run
    attn_implementation="bsfa".
    """
    contenders = {DENSE: dense_handlers(loaded.model)}
    modules = attention_modules(loaded.model)
    for point in points:
        contenders[point] = SparseAttention.for_model(
            thresholds, modules, point, backend=backend, scores=scores, count=True
        )
    answers = examine(Examiner(loaded.model, loaded.tokenizer), contenders, questions, step)
    summaries = {name: {"name": name, **summarise(found, answers[DENSE])} for name, found in answers.items()}
    for point in points:
        used = scores_of(thresholds, point, scores)
        instead = [] if used == "exact" else exact_instead(loaded.model)
        summaries[point] |= {"scores": used, "made_for": made_for(thresholds, point), "instead": instead}
    return summaries[DENSE], [summaries[point] for point in points], answers


def negative_control(
    loaded: LoadedModel, thresholds: Thresholds, point: str, questions: Sequence, backend: str,
    step: Callable[[], None], scores: str | None = None,
) -> dict:  # fmt: skip
    """The summary of `verify_tasks` for thresholds that drop every candidate tile; 2 steps a question."""
    return verify_tasks(loaded, absurd(thresholds, point), [point], questions, backend, step, scores)[1][0]


def to_json(answers: dict[str, list[Answer]]) -> list[dict]:
    """Every question with the score of every contender."""
    return [
        {
            "task": question.task,
            "length": question.length,
            "depth": question.depth,
            "answers": {
                name: {"exact": found[index].score.exact, "share": found[index].score.share}
                for name, found in answers.items()
            },
        }
        for index, question in enumerate(answer.question for answer in answers[DENSE])
    ]
