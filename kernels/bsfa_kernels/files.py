"""Files that are written whole or not at all.

    write_whole("thresholds.safetensors", content)

A link is followed, so that it stays a link and what it points to is replaced. What is no regular file (a device, a
named pipe, a socket) is refused: it cannot be written whole, and a rename over it would destroy it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


def destination(path: str | os.PathLike) -> Path:
    """The regular file that writing to `path` makes or replaces: `path` with its links followed.

    Raises OSError where something else stands there, or links lead nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "special file")
        raise OSError(errno.EINVAL, f"it is a {kind}, and only regular files are written", os.fspath(path))
    return Path(os.path.realpath(path))


def write_whole(path: str | os.PathLike, content: bytes) -> None:
    """Write `content` to `path` through a new file in the same folder, flushed to disk before it takes its place.

    A file that it replaces keeps its permissions. Raises OSError; whatever stood at `path` before is then untouched.
    """
    write_together({path: content})


def write_together(contents: Mapping[str | os.PathLike, bytes]) -> None:
    """As `write_whole`, several files: none takes its place before all are on the disk."""
    parts: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            target = destination(path)
            # A name that nobody can have planted a link at, short enough for any name that the target may have.
            name = f".{os.fsdecode(os.fsencode(target.name)[:64])}.{secrets.token_hex(8)}.part"
            parts[target] = target.with_name(name)
            _write_new(parts[target], content, target)
        for target in list(parts):
            os.replace(parts[target], target)
            del parts[target]
            _sync_folder(target.parent)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


def _write_new(path: Path, content: bytes, target: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
