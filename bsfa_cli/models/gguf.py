"""GGUF files: read as models where the packages for it are installed, and made into Hugging Face directories.

transformers dequantises a GGUF file into float32; a model loaded so refuses to be saved, hence `convert`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import torch

from ..errors import InputError, MachineError, UsageError
from .bundled import set_yarn

SUFFIX, MAGIC = ".gguf", b"GGUF"
PACKAGES = {"gguf": "0.19.0", "accelerate": "1.15.0"}  # what transformers reads GGUF files with


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether `path` names a GGUF file, by its suffix."""
    return Path(path).suffix.lower() == SUFFIX and not os.path.isdir(path)


def check(path: Path) -> None:
    """Raise InputError for what is no GGUF file, MachineError where packages to read one are missing."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"model {path} cannot be read: {error.strerror or error}") from error
    if magic != MAGIC:
        raise InputError(f"model {path} is no GGUF file: its first bytes are not {MAGIC.decode()}")
    check_packages(str(path))


def check_packages(model: str) -> None:
    """Raise MachineError, saying what to install, where packages to read GGUF files are missing."""
    missing = [f"{name}=={version}" for name, version in PACKAGES.items() if find_spec(name) is None]
    if missing:
        raise MachineError(f"model {model} is a GGUF file, and to read it takes: pip install {' '.join(missing)}")


def convert(path: Path, folder: Path, expected: str, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write the model of a GGUF file to `folder`, which must not exist, as a Hugging Face checkpoint in bfloat16, with
    `files` {name: content} beside it. Whole or not at all.

    Raises as `load_model` for a file that cannot be used, UsageError for a folder that is there, InputError for weights
    whose `weights_hash` is not `expected`.
    """
    from .load import load_model, quiet

    if folder.exists():
        raise UsageError(f"{folder} exists already; choose another, or remove it")
    loaded = load_model(path, device="cpu", dtype="float32", attn_implementation="sdpa")
    with torch.device("meta"):
        model = type(loaded.model)(loaded.model.config)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = torch.bfloat16
    found = weights_hash(model)
    if found != expected:
        raise InputError(f"{path}: its weights came out with sha256 {found}, expected {expected}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        written = Path(place) / folder.name
        with quiet():
            model.save_pretrained(written)
            loaded.tokenizer.save_pretrained(written)
        for name, content in files.items():
            (written / name).write_bytes(content)
        mask = os.umask(0)
        os.umask(mask)
        for file in written.iterdir():
            file.chmod(0o666 & ~mask)  # weights are saved for their owner alone
        os.rename(written, folder)


def weights_hash(model) -> str:
    """sha256 over the name, dtype, shape and bytes of every parameter, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stretch(folder: Path, longer: Path, factor: int) -> None:
    """A copy of the checkpoint in `folder` with YaRN for `factor` times the positions; its weights are linked.

    Raises UsageError for a folder that is there.
    """
    from transformers import AutoConfig

    if longer.exists():
        raise UsageError(f"{longer} exists already; choose another, or remove it")
    config = AutoConfig.from_pretrained(folder)
    set_yarn(config, factor, config.max_position_embeddings)
    with tempfile.TemporaryDirectory(dir=longer.parent, prefix=f".{longer.name}.") as place:
        written = Path(place) / longer.name
        shutil.copytree(folder, written, copy_function=_link)
        (written / "config.json").unlink()
        config.save_pretrained(written)
        os.rename(written, longer)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
