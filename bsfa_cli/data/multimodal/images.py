"""Image files that strangers may have made: found below a root, measured before they are decoded, made plain RGB.

What a file is, its content says and not its name. Transparency is laid over white, EXIF orientation applied, 16-bit
grey scaled to 8. Files of several frames are refused, since which one is meant is not known; only a camera's
multi-picture JPEG has a primary image, which is taken.
"""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import InputError, MachineError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # EPS and the like run interpreters
MAX_PIXELS = 1 << 26  # 64 million, 200 MB as RGB: a bomb has thousands of millions
MULTIPLE = "MPO"  # what Pillow calls a JPEG with further pictures


def check_pillow() -> None:
    """Raise MachineError where images cannot be read at all."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MachineError("reading images needs Pillow: pip install 'bsfa[vision]'") from None


def inside(root: Path, name: str) -> Path:
    """The path of `name` in `root`, symlinks followed, whether it exists or not.

    Raises InputError, without a place, where it leads out of the root.
    """
    if name.startswith(("http:", "https:", "data:", "s3:", "file:")):
        raise InputError(f"{name[:60]!r} is a URL; images are read from files, and nothing is downloaded")
    top = os.path.realpath(root)
    try:
        path = os.path.realpath(os.path.join(top, name))
    except ValueError:
        raise InputError(f"{name[:60]!r} is no name of a file") from None
    if os.path.commonpath([top, path]) != top:
        raise InputError(f"{name[:200]!r} leads out of the image root {root}, to {path[:200]!r}")
    return Path(path)


def find(root: Path, name: str) -> Path:
    """The file `name` in `root`. Raises InputError, without a place, where there is none or it is no plain file."""
    path = inside(root, name)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"image {name[:200]!r} in {root}: {reason}") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"image {name[:200]!r} in {root} is no plain file")
    return path


def read(path: Path) -> Image:
    """The image as RGB, upright. Raises InputError with the file's name and what is wrong with it."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()  # `formats` must have been registered
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which are judged here, and odd metadata
            with Image.open(path, formats=FORMATS) as opened:
                _check(path, opened)
                opened.load()
                upright = ImageOps.exif_transpose(opened)
                return _rgb(path, upright)
    except UnidentifiedImageError:
        raise InputError(f"image {_named(path)} is none of {', '.join(FORMATS)}, or its beginning is corrupt") from None
    except Image.DecompressionBombError:
        raise InputError(f"image {_named(path)} has too many pixels; at most {MAX_PIXELS:,} are read") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - decoders raise anything on corrupt files
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"image {_named(path)} cannot be decoded: {reason}") from None


def _named(path: Path) -> str:
    """A path in a message: as it is, unless that would do something to a terminal."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def _check(path: Path, opened: Image) -> None:
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise InputError(f"image {_named(path)} has {width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if getattr(opened, "is_animated", False) and opened.format != MULTIPLE:
        raise InputError(
            f"image {_named(path)} is animated or has several pages; save the one that is meant, or put them into a "
            "folder as a video's frames"
        )


def _rgb(path: Path, image: Image) -> Image:
    from PIL import Image

    if image.mode in ("I", "F"):
        raise InputError(f"image {_named(path)} has 32-bit pixels (mode {image.mode}), whose range is not known")
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 256, "L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
