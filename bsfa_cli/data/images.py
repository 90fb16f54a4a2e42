"""--data that names images: annotation files, with --image-root and what else belongs to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .multimodal.annotations import Annotations

FRAMES = 32


class ImageData(str):
    """What --data names, where its images lie in a folder. A str, since everything that keeps or shows `--data` takes
    one; what reads it asks for its `annotations`.
    """

    root: Path
    frames: int
    repeat: bool

    @classmethod
    def of(cls, spec: str, root: Path, frames: int | None = None, repeat: bool = False) -> ImageData:
        found = cls(spec)
        found.root, found.frames, found.repeat = root, frames or FRAMES, repeat
        return found

    @property
    def annotations(self) -> Annotations:
        from .multimodal.annotations import Annotations
        from .multimodal.media import Media

        return Annotations(str(self), Media(self.root, self.frames), self.repeat)
