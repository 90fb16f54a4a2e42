"""Annotations as salesforce/LAVIS reads them (lavis/datasets/datasets): VQA, captions, retrieval, video QA, NLVR2.

LAVIS's own models see an image as 32 query tokens, so its tasks have no long context; here many of them are packed.
"""

from __future__ import annotations

from collections import Counter

from ..samples import MultimodalSample, image, text, turn
from .media import Media
from .records import SAMPLE_ID, Record, shown

BRIEFLY = "Answer with a word or a short phrase."
TRUTH = ("False", "True")
IDENTITIES = ("identifier", "question_id", "sentence_id", SAMPLE_ID)  # of a pair of images, the first that is there


def vqa(record: Record, media: Media) -> MultimodalSample:
    """`image, question, question_id`, and `answer`, one or the list that people gave (A-OKVQA: `direct_answers`)."""
    picture = image(media.image(record, record.text("image")))
    return _question(record, [picture], "vqa")


def video_qa(record: Record, media: Media) -> MultimodalSample:
    """`video, question, question_id`, and `answer`."""
    frames = [image(frame) for frame in media.video(record, record.text("video"))]
    return _question(record, frames, "video_qa")


def _question(record: Record, pictures: list[dict], task: str) -> MultimodalSample:
    key = next((key for key in ("answer", "direct_answers") if record.fields.get(key) is not None), None)
    given = Counter() if key is None else Counter(record.texts(key))
    asked = text(f"{record.text('question')}\n{BRIEFLY}")
    return MultimodalSample(
        [turn("user", *pictures, asked)],
        record.name("question_id"),
        tuple(answer for answer, _ in given.most_common()) or None,
        {"task": task, "source": record.place, "counts": dict(given)},
    )


def captions(record: Record, media: Media) -> MultimodalSample:
    """`image, caption`: a text, to be learnt, or a list, as retrieval is evaluated with, each of them right."""
    name = record.text("image")
    path = media.image(record, name)
    several = isinstance(record.fields["caption"], list)
    request = "Which description fits the image?" if several else "Describe the image in one sentence."
    return MultimodalSample(
        [turn("user", image(path), text(request))],
        record.name("image_id", SAMPLE_ID, "image"),
        record.texts("caption"),
        {"task": "retrieval" if several else "caption", "source": record.place},
    )


def nlvr(record: Record, media: Media) -> MultimodalSample:
    """`images[2], sentence, label`: whether the sentence is true of the pair."""
    names = record.names("images")
    if len(names) != 2:
        raise record.refuse(f"'images' must be the left and the right image, got {len(names)}")
    left, right = (image(media.image(record, name)) for name in names)
    asked = f"Is this true of the two images? Answer True or False.\n{record.text('sentence')}"
    return MultimodalSample(
        [turn("user", text("Left image:"), left, text("Right image:"), right, text(asked))],
        record.name(*(key for key in IDENTITIES if key in record.fields)) if _named(record) else "pair",
        (_truth(record),),
        {"task": "nlvr", "source": record.place, "options": TRUTH},
    )


def _named(record: Record) -> bool:
    return any(key in record.fields for key in IDENTITIES)


def _truth(record: Record) -> str:
    label = record.fields["label"]
    said = str(label).strip().capitalize()
    if said in TRUTH:
        return said
    if said in ("0", "1"):
        return TRUTH[int(said)]
    raise record.refuse(f"'label' must be True or False, got {shown(label)}")
