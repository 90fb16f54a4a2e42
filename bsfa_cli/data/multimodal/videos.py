"""Multiple-choice questions about long videos, whose frames lie in folders: LongVideoBench and Video-MME.

Subtitles are not shown; both benchmarks have a setting without them.
"""

from __future__ import annotations

from ..samples import MultimodalSample, image, text, turn
from . import choices
from .media import Media
from .records import Record

MOST_OPTIONS = 10
NONE = "N/A"  # of an option that a question does not have


def longvideobench(record: Record, media: Media) -> MultimodalSample:
    """`id, video_path, question, candidates` or `option0`, `option1`, ..., and `correct_choice`, a number from 0."""
    if "candidates" in record.fields:
        options = list(record.texts("candidates"))
    else:
        keys = [f"option{i}" for i in range(MOST_OPTIONS) if record.fields.get(f"option{i}") not in (None, NONE)]
        options = [record.text(key) for key in keys]
    options = choices.plain(record, options)
    return _sample(
        record, media, "video_path", options, record.name("id"),
        choices.letter(record, "correct_choice", len(options), required=False),
        {"benchmark": "LongVideoBench"} | _split(record, category="question_category", length_class="duration_group"),
    )  # fmt: skip


def videomme(record: Record, media: Media) -> MultimodalSample:
    """`videoID, question_id, question, options, answer`, a letter."""
    options = choices.plain(record, record.texts("options"))
    return _sample(
        record, media, "videoID", options, record.name("question_id"),
        choices.letter(record, "answer", len(options)),
        {"benchmark": "Video-MME"} | _split(record, category="task_type", length_class="duration"),
    )  # fmt: skip


def _split(record: Record, **keys: str) -> dict[str, str]:
    found = record.some(*keys.values())
    return {name: found[key] for name, key in keys.items() if key in found}


def _sample(
    record: Record, media: Media, video: str, options: list[str], identity: str,
    answer: tuple[str, ...] | None, split: dict[str, str],
) -> MultimodalSample:  # fmt: skip
    frames = [image(frame) for frame in media.video(record, record.name(video))]
    question = choices.asked(record.text("question"), options)
    facts = {"task": "multiple_choice", "source": record.place, "options": tuple(choices.LETTERS[: len(options)])}
    return MultimodalSample([turn("user", *frames, text(question))], identity, answer, facts | split)
