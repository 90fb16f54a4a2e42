"""The run directory: what is being calibrated, and the curves of the samples done so far.

    run.json              model, data and options: fixed when the run begins
    fit.safetensors       curves of the samples that thresholds are fitted to, and their ids
    heldout.safetensors   the same for the samples that thresholds are checked on
    sample-I.safetensors  while several processes run: one sample that is not merged yet, as an earlier one is missing

Files are replaced whole after each sample, so whatever ends the process loses at most the sample in progress. Samples
are merged in the order of run.json, so that the sums, of which some are in floating point, always come out alike.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.container import Malformed, difference, exact_keys, pack, sequence, unpack
from bsfa_kernels.thresholds import model_difference
from bsfa_kernels.words import short
from safetensors import SafetensorError, safe_open

from ..errors import BsfaError, InputError, UsageError
from ..files import check_folder, write_whole
from ..order import natural, ordered
from . import claims
from .curves import ModuleCurves, Plan
from .manifest import ROLES
from .manifest import check as check_manifest

SCHEMA = 2  # 1 lacks the effect on the residual stream
MAX_BYTES = 16 << 30
# Compared on resuming, in this order. Software may differ: a run survives an upgrade.
COMPARED = ("schema", "model", "options", "data", "modules", "samples")
GROWN = ("model", "data")  # parts that have more keys than earlier versions wrote; what a run lacks is not compared
Curves = dict[str, dict[str, torch.Tensor]]  # {module path: ModuleCurves.tensors}


@dataclass(frozen=True)
class Run:
    """A run directory; see the module docstring."""

    path: Path
    manifest: Mapping[str, object]

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises InputError where there is none or it is damaged."""
        if not path.is_dir():
            raise InputError(f"{path} is no run directory (made by `bsfa calibrate -o {path}`)")
        try:
            content = (path / "run.json").read_bytes()
        except OSError as error:
            raise InputError(f"{path} holds no calibration run: run.json: {error.strerror or error}") from error
        try:
            manifest = json.loads(content)
            if isinstance(manifest, dict) and manifest.get("schema", SCHEMA) != SCHEMA:
                said = f"has run schema {short(manifest['schema'])}; this version of bsfa knows {SCHEMA}"
                raise InputError(f"{path} {said}")
            check_manifest(manifest)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}/run.json is damaged: {error}") from None
        return cls(path, manifest)

    @classmethod
    def begin(cls, path: Path, manifest: Mapping[str, object], hash_of_first: Callable[[int], str]) -> Run:
        """Begin a run, or go on with the one at `path`, with more samples behind its own where `manifest` has more.

        `hash_of_first(n)` is the data hash of the first n samples. Raises UsageError, naming the field, when `path`
        holds another run.
        """
        cls.check_place(path)
        manifest = json.loads(json.dumps(manifest))
        if (path / "run.json").exists():
            run = cls.open(path)
            extended = _extended(path, run.manifest, manifest, hash_of_first)
            if extended is None:
                return run
            manifest = extended
        made = not path.exists()
        try:
            write_whole(path / "run.json", (json.dumps(ordered(manifest), indent=1) + "\n").encode())
        except BsfaError:
            with suppress(OSError):
                if made:
                    path.rmdir()
            raise
        return cls(path, manifest)

    @staticmethod
    def check_place(path: Path) -> None:
        """Raise UsageError where no run can begin or go on, InputError for a run that is damaged; writes nothing."""
        check_folder(path)
        if (path / "run.json").exists():
            Run.open(path)
        elif path.is_dir() and any(entry.suffix != ".part" and entry.name != ".lock" for entry in path.iterdir()):
            raise UsageError(f"{path} is not empty and holds no calibration run; choose another -o")

    def check_model(self, identity: Mapping[str, object]) -> None:
        """Raise InputError, naming the field, unless the run is of this model."""
        found = model_difference(self.manifest["model"], identity)
        if found:
            raise InputError(f"{self.path} was calibrated on another model: {found}")

    @property
    def plan(self) -> Plan:
        options = self.manifest["options"]
        longest = max(sample["tokens"] for sample in self.manifest["samples"])
        scores, gradients = options.get("scores", "exact"), options.get("gradients") is True
        modal = bool(self.manifest["data"].get("modalities"))
        return Plan(TileShape(*options["tile"]), longest, tuple(options["top_k"]), scores, gradients, modal)

    def lock(self, shared: bool = False):
        """Keep other processes from writing to this run for as long as the returned file stays open; `shared` those
        that do not ask for the same.
        """
        path = self.path / ".lock"
        try:
            # Neither emptied nor followed: whatever stands there is not ours to change.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = open(os.open(path, flags, 0o666), "rb")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(f"another bsfa calibrate is writing to {self.path}") from None
        return file

    def discard(self) -> None:
        """Remove a run of which no sample was collected, and its directory where nothing else is in it."""
        for name in ("run.json", ".lock", claims.NAME):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def planned(self, role: str) -> list[str]:
        return [sample["id"] for sample in self.manifest["samples"] if sample["role"] == role]

    def lengths(self, role: str) -> list[int]:
        """Tokens of its samples."""
        return [sample["tokens"] for sample in self.manifest["samples"] if sample["role"] == role]

    def save(self, role: str, done: list[str], curves: Curves) -> None:
        """Replace the file of `role`. Raises MachineError when the disk is full; the file before it stays."""
        self._write(self.path / f"{role}.safetensors", done, curves)

    def load(self, role: str) -> tuple[list[str], Curves]:
        """(ids of the samples merged, {module path: tensors}); ([], {}) before the first. Raises InputError."""
        file = self.path / f"{role}.safetensors"
        return self._read(file, self.planned(role)) if file.exists() else ([], {})

    def complete(self, role: str) -> Curves:
        """The curves of `role`, of all its samples. Raises InputError for a run that is damaged or not finished."""
        done, curves = self.load(role)
        if set(done) != set(self.planned(role)):
            total = len(self.manifest["samples"])
            raise InputError(
                f"{self.path} is not finished ({role}: {len(done)} of {len(self.planned(role))} samples, {total} in "
                "all); run the same `bsfa calibrate` again to finish it"
            )
        return curves

    def check_exact(self) -> None:
        """Raise UsageError for statistics of other scores than those that other engines compute."""
        if self.plan.scores != "exact":
            raise UsageError(
                f"{self.path} has statistics of {self.plan.scores} scores, and other engines have exact ones"
            )

    def save_sample(self, index: int, curves: Curves) -> None:
        """Store the curves of the sample at `index` of run.json by themselves. Errors as `save`."""
        self._write(self._sample(index), [self.manifest["samples"][index]["id"]], curves)

    def load_sample(self, name: str) -> Curves | None:
        """The curves of a sample that was stored by itself; None where it was not. Raises InputError."""
        file = self._sample(self._index(name))
        return self._read(file, [name])[1] if file.exists() else None

    def forget_sample(self, name: str) -> None:
        """Remove a sample's own file: it is merged."""
        self._sample(self._index(name)).unlink(missing_ok=True)

    def loose(self) -> list[str]:
        """Samples that are stored by themselves."""
        ids = [sample["id"] for sample in self.manifest["samples"]]
        return [name for index, name in enumerate(ids) if self._sample(index).exists()]

    def finished(self) -> set[str]:
        """Samples that are merged or stored by themselves. Raises InputError for damaged files."""
        loose = self.loose()  # before those merged: what is merged meanwhile is in both, not in neither
        return {*loose, *self.merged("fit"), *self.merged("heldout")}

    def merged(self, role: str) -> list[str]:
        """As the first part of `load`, from the file's header alone."""
        file = self.path / f"{role}.safetensors"
        if not file.exists():
            return []
        try:
            with safe_open(file, "pt") as opened:
                return json.loads(opened.metadata()["bsfa_run"])["samples"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return self.load(role)[0]  # which says what is wrong with it

    def merge(self) -> None:
        """Move samples that are stored by themselves into the files of their roles, as far as none is missing before.

        Only one process at a time may. Raises InputError for damaged files.
        """
        for role in ROLES:
            done, ready = self.merged(role), []
            for name in self.planned(role):
                if name in done:
                    self.forget_sample(name)
                elif self._sample(self._index(name)).exists():
                    ready.append(name)
                else:
                    break
            if not ready:
                continue
            done, curves = self.load(role)
            for name in ready:
                more = self.load_sample(name)
                curves = {path: _sums(curves.get(path), tensors) for path, tensors in more.items()}
            self.save(role, done + ready, curves)
            for name in ready:
                self.forget_sample(name)

    def tidy(self) -> None:
        """Remove what only processes at work need, and what lost ones were writing. Nobody may be at work."""
        (self.path / claims.NAME).unlink(missing_ok=True)
        for left_over in self.path.glob(".*.part"):
            left_over.unlink(missing_ok=True)

    def _index(self, name: str) -> int:
        return next(i for i, sample in enumerate(self.manifest["samples"]) if sample["id"] == name)

    def _sample(self, index: int) -> Path:
        return self.path / f"sample-{index}.safetensors"

    def _write(self, file: Path, done: list[str], curves: Curves) -> None:
        tensors = {
            f"{path}/{name}": _narrow(tensor).cpu()
            for path, module in curves.items()
            for name, tensor in module.items()
        }
        write_whole(file, pack("bsfa_run", {"samples": done}, tensors))

    def _read(self, file: Path, planned: list[str]) -> tuple[list[str], Curves]:
        try:
            if os.stat(file).st_size > MAX_BYTES:
                raise Malformed(f"the file is larger than the {MAX_BYTES:,} bytes allowed for it")
            metadata, tensors = unpack(file.read_bytes(), "bsfa_run", MAX_BYTES)
            exact_keys("the bsfa_run metadata", metadata, ("samples",))
            done = sequence("samples", metadata["samples"], 1, len(planned))
            if any(done.count(name) > 1 or name not in planned for name in done):
                raise Malformed("it holds samples that run.json does not plan")
            return done, self._by_module(tensors)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}") from error
        except Malformed as error:
            raise InputError(f"{file} is damaged: {error}; delete it to collect its samples again") from None

    def _by_module(self, tensors: dict[str, torch.Tensor]) -> Curves:
        """Tensors as ModuleCurves keeps them. Raises Malformed where a name, shape or sum cannot be."""
        curves: Curves = {}
        for path, heads in sorted(self.manifest["modules"].items(), key=lambda item: natural(item[0])):
            curves[path] = {}
            for name, (shape, dtype) in ModuleCurves.layout(self.plan, heads).items():
                tensor = tensors.pop(f"{path}/{name}", None)
                if tensor is None or tuple(tensor.shape) != shape:
                    raise Malformed(f"{path}/{name} must have shape {list(shape)}")
                if tensor.is_floating_point() != dtype.is_floating_point or (
                    bool((tensor == torch.inf).any() or tensor.isnan().any())
                    if dtype.is_floating_point
                    else bool((tensor < 0).any())
                ):
                    raise Malformed(f"{path}/{name} holds values that no run can give")
                curves[path][name] = tensor.to(dtype)
        if tensors:
            raise Malformed(f"unknown tensor {short(next(iter(tensors)))}")
        return curves


def _sums(sums: dict[str, torch.Tensor] | None, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return more if sums is None else {name: sums[name] + tensor for name, tensor in more.items()}


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The same counts in the smallest integer type that holds them."""
    if tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    most = int(tensor.max())
    for dtype in (torch.int16, torch.int32):
        if most <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor


def _extended(path: Path, begun: Mapping, wanted: Mapping, hash_of_first: Callable[[int], str]) -> dict | None:
    """The manifest of `begun` with the further samples of `wanted`; None where there are none.

    Data are the same when their tokens are, whatever the file is called. Raises UsageError, naming the field, for
    another run, and for further samples that are longer than those which the curves were laid out for.
    """
    count = len(begun["samples"])
    same = {**wanted, "data": {**wanted["data"], "spec": begun["data"]["spec"]}, "samples": begun["samples"]}
    same["options"] = {**wanted["options"], "data": begun["options"]["data"]}
    if len(wanted["samples"]) > count:
        same["data"]["hash"] = hash_of_first(count)
        same["options"]["samples"] = begun["options"]["samples"]
    # What two specifications differ in matters only where their texts do.
    if begun["data"]["hash"] != same["data"]["hash"]:
        same["options"]["data"] = wanted["options"]["data"]
    further = wanted["samples"][count:]
    longest = max(sample["tokens"] for sample in begun["samples"])
    if max((sample["tokens"] for sample in further), default=0) > longest:
        raise UsageError(
            f"{path} was begun with samples of up to {longest:,} tokens, and a further one has "
            f"{max(sample['tokens'] for sample in further):,}; choose another -o"
        )
    for part in COMPARED:
        old, new = begun[part], same[part]
        if part in GROWN and isinstance(old, Mapping):
            new = {key: value for key, value in new.items() if key in old}
        found = difference(part, old, new)
        if found:
            raise UsageError(
                f"{path} holds another run: {found}; give what it was begun with to resume it, or another -o"
            )
    if not further:
        return None
    return {**wanted, "samples": [*begun["samples"], *further], "software": begun["software"]}
