"""Where a record's images and videos lie: a root folder, and how many frames of a video are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError
from ...order import natural
from .images import find, inside
from .records import Record

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv", ".wmv", ".mpg", ".mpeg")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class Media:
    """Images below `root`; of a video, `frames` frames, spread evenly over those there are."""

    root: Path
    frames: int

    def image(self, record: Record, name: str) -> Path:
        """The path of an image. Raises InputError, naming record and file."""
        try:
            return find(self.root, name)
        except InputError as error:
            raise record.refuse(str(error)) from None

    def video(self, record: Record, name: str) -> list[Path]:
        """Paths of a video's frames in their order: images in a folder named as the video without its suffix.

        Raises InputError, naming record and video, where there is no such folder.
        """
        stem = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEO_SUFFIXES else name
        try:
            folder = inside(self.root, stem)
            if not folder.is_dir():
                raise InputError(self._missing(name, stem))
            files = sorted(
                (
                    path.name
                    for path in folder.iterdir()
                    if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
                ),
                key=natural,
            )
            if not files:
                raise InputError(f"folder {stem!r} holds no frame ({', '.join(FRAME_SUFFIXES)})")
            return [find(self.root, f"{stem}/{files[at]}") for at in spread(len(files), self.frames)]
        except InputError as error:
            raise record.refuse(str(error)) from None
        except OSError as error:
            raise record.refuse(f"video {name[:200]!r}: {error.strerror}") from None

    def _missing(self, name: str, stem: str) -> str:
        if inside(self.root, name).is_file():
            return (
                f"{name!r} is a video file, and bsfa has no decoder for it: put its frames as images into the folder "
                f"{stem!r} beside it"
            )
        return f"video {name[:200]!r}: there is no folder {stem[:200]!r} with its frames in {self.root}"


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, each in the middle of an equal share; all where there are no more."""
    if count <= wanted:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
