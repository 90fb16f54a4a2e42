"""Files that are written whole or not at all, and stored results read back."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from pathlib import Path

from .errors import InputError, MachineError, UsageError
from .order import ordered

THRESHOLDS, CAPTURE, RESULT, PAGE = "a thresholds artifact", "captured layers", "a stored result", "a page of results"
FOREIGN = "a file that bsfa did not write"
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
UNPRINTABLE = re.compile(r"\\u(?:00[0189]|007f|d[89a-f]|fff[ef])|[\x7f-\x9f\ufffe\uffff]", re.IGNORECASE)  # in JSON
IN_METADATA = {"bsfa": THRESHOLDS, "bsfa_capture": CAPTURE, "bsfa_run": "part of a run"}  # keys, of safetensors files


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` as `bsfa_kernels.files.write_whole` does, its folder made where there is none.

    Raises UsageError where the place cannot be written, MachineError where the disk is full. Either way what stood at
    `path` before is untouched.
    """
    from bsfa_kernels import files  # not at the top: reading results needs no torch

    try:
        files.destination(path).parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, content)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"no space left on the disk for {path} ({len(content):,} bytes); nothing was written"
            ) from error
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, result: dict) -> None:
    """A result as JSON, through `write_whole`. NaN and infinities are refused: JSON has none."""
    write_whole(path, (json.dumps(ordered(result), indent=1, allow_nan=False) + "\n").encode())


def read_result(path: Path, formats: dict[str, int]) -> dict:
    """A stored result, with its cells, of one of the commands in `formats` {command: format it is read in}.

    Raises InputError for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        stored = json.loads(text, parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if UNPRINTABLE.search(text):
        stored = _printable(stored)
    if not isinstance(stored, dict) or not isinstance(stored.get("kind"), str) or stored["kind"] not in formats:
        raise InputError(f"{path} is not a result of {' or '.join(f'`{kind}`' for kind in formats)}")
    known = formats[stored["kind"]]
    if stored.get("format") != known:
        raise InputError(f"{path} has format {stored.get('format')}, this bsfa reads format {known}")
    measured = stored.get("cells", stored.get("points"))  # of verify
    if not isinstance(stored.get("environment"), dict) or not isinstance(measured, list):
        raise InputError(f"{path} lacks its environment or its cells")
    return stored


def _no_number(text: str):
    raise ValueError(f"it holds {text}, which no result does")


def _printable(data):
    """JSON values with control characters and half surrogate pairs replaced: they are no text of a page or a plot."""
    if isinstance(data, dict):
        return {_printable(key): _printable(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_printable(each) for each in data]
    return NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", data) if isinstance(data, str) else data


def _kind(path: Path) -> str | None:
    """What stands at `path`, in words; None where that is nothing, or an empty file. Raises OSError."""
    if not path.exists() or not path.stat().st_size:
        return None
    with open(path, "rb") as file:
        head = file.read(16)
        try:
            if head[8:9] == b"{":
                file.seek(8)
                header = json.loads(file.read(int.from_bytes(head[:8], "little")))
                return next((IN_METADATA[key] for key in header["__metadata__"] if key in IN_METADATA), FOREIGN)
            file.seek(0)
            if head[:1] == b"{" and "kind" in json.load(file):
                return RESULT
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError):
            return FOREIGN
    return PAGE if head.lower().startswith(b"<!doctype html") else FOREIGN


def check_folder(path: Path) -> None:
    """Raise UsageError where `path` is no folder to write to, and none can be made there; writes nothing."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; -o needs a directory for the run")
    parent = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write {path}: {parent} is no directory that can be written to")


def check_writable(path: Path, kind: str | None = None) -> None:
    """Find out before the work, not after it, and say where a folder is made for it.

    Raises UsageError where the place cannot be written, or where `kind` is given and another kind of file stands there.
    """
    from bsfa_kernels.files import destination

    from .console import note

    try:
        folder = destination(path).parent
        found = _kind(path)
        if kind is not None and found not in (None, kind):
            raise UsageError(f"{path} is {found} and would be replaced by {kind}; choose another place, or remove it")
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)  # another process may make it now
            note(f"created the folder {folder}")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
