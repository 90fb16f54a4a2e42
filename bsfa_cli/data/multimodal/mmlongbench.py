"""MMLongBench (EdinburghNLP/MMLongBench, arXiv 2505.10610): 8k to 128k tokens of pages, passages and images.

Its files have no field that names the task; their keys and the number of "<image>" in their texts tell it:

    page_list                                questions about the pages of a document
    image_list, summary                      summaries of a document's pages
    ctxs of file names                       visual haystack: yes or no
    ctxs of passages, image                  passages and a question about what an image shows
    ctxs of paragraphs, image_list           needles in text among images
        and choices_image                    which of these images was among them
        and needle_image_list                how often these images were among them

Many-shot learning (`exemplar_list`, `test_example`) is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from ..samples import MultimodalSample, image, text, turn
from . import choices
from .media import Media
from .records import Record, shown

PLACEHOLDER = "<image>"
YES_NO = ("No", "Yes")
BRIEFLY = "Answer as briefly as you can."


def mmlongbench(record: Record, media: Media) -> MultimodalSample:
    """A sample of any of the tasks above. Raises InputError where fields and placeholders do not fit together."""
    fields = record.fields
    contexts = fields.get("ctxs")
    first = contexts[0] if isinstance(contexts, list) and contexts else None
    if "page_list" in fields:
        return _document(record, media)
    if "summary" in fields:
        return _summary(record, media)
    if isinstance(first, str):
        return _haystack(record, media)
    if isinstance(first, dict) and "image" in fields and not fields.get("image_list"):
        return _passages(record, media)
    if isinstance(first, dict):
        return _needle(record, media)
    raise record.refuse(
        f"'ctxs' must be a list of image names or of objects with a text, and not empty; got {shown(contexts)}"
    )


def _sample(record: Record, task: str, content: list[dict], answer, **facts) -> MultimodalSample:
    split = {"task": task, "source": record.place, "benchmark": "MMLongBench", "category": task}
    identity = record.name("id", "question_id") if {"id", "question_id"} & set(record.fields) else task
    facts = {key: value for key, value in facts.items() if value is not None}
    return MultimodalSample([turn("user", *content)], identity, answer, split | record.some("category") | facts)


def _answers(record: Record) -> tuple[str, ...] | None:
    """`answer`: a text, a list of right ones, or lists of them; None where there is none."""
    value = record.fields.get("answer")
    if value is None:
        return None
    if isinstance(value, list) and any(isinstance(each, list) for each in value):
        value = [part for each in value for part in (each if isinstance(each, list) else [each])]
    return Record(record.place, {"answer": value}).texts("answer")


def _pages(record: Record, media: Media, key: str) -> Iterator[dict]:
    names = record.names(key)
    if not names:
        raise record.refuse(f"{key!r} names no page")
    for number, name in enumerate(names, 1):
        yield text(f"Page {number}:")
        yield image(media.image(record, name))


def _document(record: Record, media: Media) -> MultimodalSample:
    question = text(f"{record.text('question')}\n{BRIEFLY}")
    return _sample(record, "document_qa", [*_pages(record, media, "page_list"), question], _answers(record))


def _summary(record: Record, media: Media) -> MultimodalSample:
    summary = record.fields["summary"]
    if isinstance(summary, list):  # of sections
        summary = "\n\n".join(
            "\n".join(map(str, [part.get("section_title", ""), *(part.get("paragraphs") or ())])).strip()
            for part in summary
            if isinstance(part, dict) and isinstance(part.get("paragraphs") or [], list)
        )
    summary = Record(record.place, {"summary": summary}).text("summary")
    content = [*_pages(record, media, "image_list"), text("Summarise these pages.")]
    return _sample(record, "summary", content, (summary,))


def _haystack(record: Record, media: Media) -> MultimodalSample:
    pictures = [image(media.image(record, name)) for name in record.names("ctxs")]
    question = text(f"{record.text('question')}\nAnswer Yes or No.")
    value = record.fields.get("answer")
    said = str(value).strip().rstrip(".").capitalize()
    answer = {"0": "No", "1": "Yes", "False": "No", "True": "Yes"}.get(said, said)
    if answer not in YES_NO:
        raise record.refuse(f"'answer' must be yes or no, got {shown(value)}")
    return _sample(record, "visual_haystack", [*pictures, question], (answer,), options=YES_NO)


def _passages(record: Record, media: Media) -> MultimodalSample:
    picture = image(media.image(record, record.text("image")))
    said = [
        record.checked("title", f"{passage['title']}: {body}") if passage.get("title") else body
        for passage, body in _texts(record)
    ]
    question = text(f"{record.text('question')}\n{BRIEFLY}")
    context = text("\n\n".join(said))
    return _sample(record, "visual_rag", [context, picture, question], _answers(record), depth=_depth(record))


def _needle(record: Record, media: Media) -> MultimodalSample:
    context = "\n\n".join(body for _, body in _texts(record))
    question = record.text("question")
    names, needles, options = map(record.names, ("image_list", "needle_image_list", "choices_image"))
    facts = {}
    if options:
        task, answer = "image_needle", choices.letter(record, "answer", len(options))
        question = choices.asked(question, [PLACEHOLDER] * len(options))
        names, facts = [*names, *options], {"options": tuple(choices.LETTERS[: len(options)])}
    elif needles and f"{context}{question}".count(PLACEHOLDER) == len(names) + len(needles):
        task, names, value = "image_count", [*names, *needles], record.fields.get("answer")
        answer = (json.dumps(value),) if isinstance(value, list) else _answers(record)
    else:
        task, answer = "text_needle", _answers(record)
    asked = f"{context}\n\n{question}" if options else f"{context}\n\n{question}\n{BRIEFLY}"
    content = list(_interleaved(record, asked, [media.image(record, name) for name in names]))
    return _sample(record, task, content, answer, depth=_depth(record), **facts)


def _texts(record: Record) -> Iterator[tuple[dict, str]]:
    """(passage, its text) of `ctxs`."""
    for number, passage in enumerate(record.fields["ctxs"], 1):
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise record.refuse(f"'ctxs' must hold objects with a text; number {number} is {shown(passage)}")
        yield passage, record.checked("ctxs", passage["text"])


def _interleaved(record: Record, said: str, paths: list) -> Iterator[dict]:
    """Text parts of `said` and an image for every placeholder."""
    pieces = said.split(PLACEHOLDER)
    if len(pieces) - 1 != len(paths):
        raise record.refuse(f"its texts have {len(pieces) - 1} {PLACEHOLDER}, and {len(paths)} images are named")
    for piece, path in zip(pieces, [*paths, None], strict=True):
        if piece.strip():
            yield text(piece)
        if path is not None:
            yield image(path)


def _depth(record: Record) -> float | None:
    """Where the first context that holds the answer stands, 0 to 1; None where no mark says so."""
    passages = record.fields["ctxs"]
    positive = record.fields.get("positive_ctxs")
    positive = positive if isinstance(positive, list) else []
    right = {str(each["doc_id"]) for each in positive if isinstance(each, dict) and "doc_id" in each}
    for index, passage in enumerate(passages):
        marked = passage.get("has_answer") or passage.get("has_ans")
        if marked or "doc_id" in passage and str(passage["doc_id"]) in right:
            return index / max(1, len(passages) - 1)
    return None
