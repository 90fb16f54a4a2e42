"""What a contender's answers come to, beside the dense model's on the same questions and the tiles skipped."""

from __future__ import annotations

from collections.abc import Sequence

from ..metrics import statistics
from .run import Answer

LEAST_DENSE = 0.5  # dense accuracy below which there is too little to lose: what is kept of it says little


def summarise(answers: Sequence[Answer], dense: Sequence[Answer]) -> dict:
    """JSON: all together, by_task, by_length, by_length_and_depth (a list), by_modality (of what questions about frames
    are answered from; empty for others), the names of the worst tasks (the retention among those that the dense model
    answers), and `unanswered`, those that it answers too little of to lose any.

    Each part has questions, exact (share), exact_interval (Wilson, 95 %), share, skip (None where nothing was counted),
    dense (share exact), and `statistics.paired` of the exact answers.
    """
    pairs = list(zip(answers, dense, strict=True))

    def groups(key) -> dict:
        found: dict = {}
        for pair in pairs:
            found.setdefault(key(pair[0].question), []).append(pair)
        return {name: _group(part) for name, part in found.items() if name is not None}

    by_task = groups(lambda question: question.task)
    places = groups(lambda question: None if question.depth is None else (question.length, question.depth))
    retained = {name: part["retention"] for name, part in by_task.items() if telling(part)}
    return {
        **_group(pairs),
        "by_task": by_task,
        "by_length": {str(length): part for length, part in groups(lambda question: question.length).items()},
        "by_length_and_depth": [
            {"length": length, "depth": depth, **part} for (length, depth), part in sorted(places.items())
        ],
        "by_modality": groups(lambda question: getattr(question, "modality", None)),
        "worst_task": min(by_task, key=lambda name: by_task[name]["exact"]),
        "worst_retention": min(retained, key=retained.get) if retained else None,
        "unanswered": [name for name, part in by_task.items() if not telling(part)],
    }


def telling(part: dict) -> bool:
    """Whether the dense model answers enough of a part for its retention to say something."""
    return part["dense"] >= LEAST_DENSE


def _group(pairs: list[tuple[Answer, Answer]]) -> dict:
    sparse, dense = ([float(pair[side].score.exact) for pair in pairs] for side in (0, 1))
    kept, candidates = (sum(getattr(answer, key) for answer, _ in pairs) for key in ("kept", "candidates"))
    return {
        "questions": len(pairs),
        "exact": sum(sparse) / len(pairs),
        "exact_interval": list(statistics.wilson(int(sum(sparse)), len(pairs))),
        "share": sum(answer.score.share for answer, _ in pairs) / len(pairs),
        "skip": 1 - kept / candidates if candidates else None,
        "dense": sum(dense) / len(pairs),
        **statistics.paired(sparse, dense),
    }
