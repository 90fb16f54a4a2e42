"""Attention libraries that may be installed beside PyTorch: the module and its version, or why there is none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from ..errors import said


@dataclass(frozen=True)
class Library:
    """An imported module; `version` names what brought it, such as "fa3-fwd 0.0.3"."""

    module: ModuleType
    version: str


def installed(name: str, distributions: tuple[str, ...]) -> Library | str | None:
    """The module `name` of one of the PyPI `distributions`; why it does not import; None where it is not installed."""
    try:
        module = import_module(name)
    except Exception as error:  # noqa: BLE001 - an extension built for another PyTorch fails in any way
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            return None
        return f"{_version(distributions) or name} is installed but does not import: {said(error)}"
    return Library(module, _version(distributions) or f"{name} {getattr(module, '__version__', 'of unknown version')}")


def cached_on_hub(repository: str) -> Library | str | None:
    """The newest snapshot of a Hugging Face kernel in the local cache, as `installed`; nothing is downloaded."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE

        from kernels import load_kernel
    except ImportError:
        return None
    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    snapshots = list((cache / f"kernels--{repository.replace('/', '--')}" / "snapshots").glob("*"))
    if not snapshots:
        return None
    newest = max(snapshots, key=lambda folder: folder.stat().st_mtime).name
    try:
        return Library(load_kernel(repository, lockfile=None, revision=newest), f"{repository} {newest[:10]}")
    except Exception as error:  # noqa: BLE001 - no build for this machine, or a failed import
        return f"{repository} is cached but does not load: {(str(error).splitlines() or [''])[0]}"


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None
