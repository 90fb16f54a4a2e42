"""python -m bsfa_cli.experiments.texts --out FOLDER

Real texts that this machine already has, as .jsonl files with one long text a line: code-calibrate.jsonl and
code-judge.jsonl of Python's standard library (PSF licence), prose-calibrate.jsonl and prose-judge.jsonl of Perl's
documentation (Artistic licence) and of Python's language reference (PSF licence). No document is in both files of a
kind. They are read where they are installed and belong in no repository: other versions have other texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..errors import MachineError
from ..files import write_whole
from . import end

KINDS, SIDES = ("code", "prose"), ("calibrate", "judge")
# Parts of the standard library that are no code to read: tests, and files that are mostly tables.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
SHORTEST = 2_000  # characters of a document
POD = re.compile(r"^=[a-z]\w*.*?(?:^=cut\b|\Z)", re.M | re.S)


def code() -> Iterator[tuple[str, str]]:
    """(name, text) of the modules of Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def prose() -> Iterator[tuple[str, str]]:
    """(name, text) of Perl's documentation, where Perl is installed, and of the topics of Python's reference."""
    for root in _perl_folders():
        for path in sorted(path for path in root.rglob("*.p*") if path.suffix in (".pm", ".pod") and path.is_file()):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield path.relative_to(root).as_posix(), "\n\n".join(part.strip() for part in POD.findall(text))
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def _perl_folders() -> list[Path]:
    try:
        done = subprocess.run(["perl", "-e", 'print join "\\n", @INC'], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    folders = {Path(line).resolve() for line in done.stdout.splitlines() if Path(line).is_absolute()}
    found = sorted(folder for folder in folders if folder.is_dir())
    return [folder for folder in found if not any(folder != other and folder.is_relative_to(other) for other in found)]


def side(name: str) -> str:
    """Which of SIDES a document belongs to."""
    return SIDES[hashlib.sha256(name.encode()).digest()[0] % 2]


def lines(documents: Iterator[tuple[str, str]], wanted: str, characters: int, most: int) -> list[str]:
    """Up to `most` texts of `characters` characters: whole documents of a side, one after another."""
    seen, found, parts, size = set(), [], [], 0
    for name, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if side(name) != wanted or len(text) < SHORTEST or digest in seen:
            continue
        seen.add(digest)
        parts.append(text.strip().replace("\0", ""))
        size += len(parts[-1])
        if size >= characters:
            found.append("\n\n".join(parts)[:characters])
            parts, size = [], 0
            if len(found) == most:
                break
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.texts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--characters", type=int, default=140_000, help="of a text; a token has about four")
    parser.add_argument("--texts", type=int, default=16, help="in each file, at most")
    options = parser.parse_args()
    for kind in KINDS:
        for wanted in SIDES:
            found = lines({"code": code, "prose": prose}[kind](), wanted, options.characters, options.texts)
            if not found:
                raise MachineError(
                    f"this machine has not {options.characters:,} characters of {kind}: lower --characters"
                )
            content = "".join(json.dumps({"text": text}) + "\n" for text in found)
            path = options.out / f"{kind}-{wanted}.jsonl"
            write_whole(path, content.encode())
            print(f"written: {path} ({len(found)} texts)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    end("texts", main)
