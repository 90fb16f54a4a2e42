"""Which benchmark an annotation file is of: told by the keys of its first record, refused where that is unclear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..samples import MultimodalSample
from . import lavis, mmlongbench, videos
from .media import Media
from .records import Record, shown


@dataclass(frozen=True)
class Family:
    """A file is of it where it has all keys of `needs`, and one of each group of `one_of`.

    `identity` is the key of a record's id where no two may have the same.
    """

    name: str
    needs: tuple[str, ...]
    build: Callable[[Record, Media], MultimodalSample]
    identity: str | None = None
    one_of: tuple[tuple[str, ...], ...] = ()

    def missing(self, record: Record) -> list[str]:
        """What a record lacks of the keys that this family needs."""
        lacking = [key for key in self.needs if key not in record.fields]
        groups = [group for group in self.one_of if not any(key in record.fields for key in group)]
        return lacking + [" or ".join(group) for group in groups]

    @property
    def keys(self) -> str:
        return ", ".join([*self.needs, *(" or ".join(group) for group in self.one_of)])


FAMILIES = (
    Family("LAVIS VQA", ("image", "question", "question_id"), lavis.vqa, "question_id"),
    Family("LAVIS captions", ("image", "caption"), lavis.captions),
    Family("LAVIS video QA", ("video", "question", "question_id"), lavis.video_qa, "question_id"),
    Family("LAVIS NLVR", ("images", "sentence", "label"), lavis.nlvr),
    Family(
        "MMLongBench", ("question", "answer"), mmlongbench.mmlongbench, one_of=(("ctxs", "page_list"),)
    ),
    Family("MMLongBench summaries", ("image_list", "summary"), mmlongbench.mmlongbench),
    Family(
        "LongVideoBench", ("id", "video_path", "question"), videos.longvideobench, "id", (("option0", "candidates"),)
    ),
    Family("Video-MME", ("videoID", "question_id", "question", "options", "answer"), videos.videomme, "question_id"),
)  # fmt: skip


def family_of(record: Record) -> Family:
    """The one family that a record's keys are of. Raises InputError, naming the keys seen and those expected."""
    found = [family for family in FAMILIES if not family.missing(record)]
    if len(found) == 1:
        return found[0]
    seen = shown(", ".join(record.fields))
    if found:
        raise record.refuse(f"its keys {seen} fit {' and '.join(family.name for family in found)}; drop those of one")
    expected = "; ".join(f"{family.name}: {family.keys}" for family in FAMILIES)
    raise record.refuse(f"its keys {seen} are those of no known benchmark ({expected})")


def sample_of(family: Family, record: Record, media: Media) -> MultimodalSample:
    """The sample of a record. Raises InputError where it lacks a key or a file, or a field is not what it should be."""
    lacking = family.missing(record)
    if lacking:
        raise record.refuse(f"lacks {', '.join(lacking)}, which {family.name} has")
    return family.build(record, media)
