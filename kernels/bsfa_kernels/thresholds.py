"""The thresholds artifact: one safetensors file of calibrated gates, written canonically and read with suspicion.

    thresholds = Thresholds.read("thresholds.safetensors")
    thresholds.check_model(identity)
    gate = thresholds.gate("model.layers.0.self_attn", "skip-50", query_tiles=512, device="cuda")

The file holds one float32 tensor [points, query heads, knots] per attention module, named by the module's path, or
[points, modalities, query heads, knots] where thresholds are by modality of the query tile, and one metadata key `bsfa`
of canonical JSON (keys: METADATA_KEYS). A knot is an absolute query position. A query tile
takes the value at its centre, position tile * rows + rows // 2: linear in position between knots, flat outside them,
and -inf (keep every tile) wherever an end that weighs in is -inf. No clock and no machine name goes in: the same
thresholds give the same bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from . import container
from .container import exact_keys, integer, sequence
from .files import write_whole
from .gates import Gate
from .modality import MODALITIES
from .request import SCORES
from .tiles import TileShape
from .words import short

# 1 lacks the model's `config`: of a configuration it tells that it differs, by config_hash, but not where.
# 2 lacks a point's `scores` and `exact_heads`: it is exact. 3 has no thresholds by modality.
SCHEMA = 4
MAX_FILE_BYTES = 256 << 20
MAX_POINTS, MAX_HEADS, MAX_KNOTS, MAX_POSITION, MAX_TILE = 64, 1024, 1 << 16, 1 << 31, 4096
GATES = ("gap", "absolute")
NEW_IN_3 = {"scores", "exact_heads"}  # of a point
METADATA_KEYS = frozenset({"schema", "model", "tile", "keep_sink", "knots", "points", "modalities", "provenance"})
# Compared by check_model in this order, so that the most telling difference is the one that is named.
MODEL_CHECKED = (
    "architecture", "layers", "query_heads", "key_value_heads", "head_dim", "scale", "rope", "config", "config_hash",
    "weights",
)  # fmt: skip
MODEL_KEYS = ("id", "revision", *MODEL_CHECKED)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ThresholdsError(container.Malformed):
    """The artifact is malformed, is for another model, or lacks what was asked of it; the message says which."""


@dataclass(frozen=True)
class Reached:
    """What an operating point reaches on a set of samples, over the tiles that a gate may drop."""

    skip: float  # share of candidate tiles dropped, 0 .. 1
    dropped_mass: float  # softmax mass dropped, mean over rows
    dropped_mass_bound: float  # upper bound on a row's dropped mass at the point's quantile, over query tiles and heads

    def __post_init__(self):
        for name in ("skip", "dropped_mass", "dropped_mass_bound"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ThresholdsError(f"{name} must be a finite number >= 0, got {short(value)}")


@dataclass(frozen=True)
class Point:
    """One operating point: row i of every tensor belongs to point i."""

    name: str
    gate: str  # "gap" (thresholds are ln lambda) or "absolute"
    recipe: str  # how it was chosen, e.g. "target-skip"
    argument: float  # what was asked of the recipe, e.g. 0.5
    quantile: float | None = None  # of the per-row bound, where one was stated
    fitted: Reached | None = None  # on the samples it was fitted to
    held_out: Reached | None = None  # on samples it never saw
    scores: str = "exact"  # that it is meant for, one of SCORES
    # With int8 scores: query heads of a module that keep exact ones, and with them all that share their KV head.
    exact_heads: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ThresholdsError(f"a point's name must be letters, digits, '.', '_' and '-', got {short(self.name)}")
        if not isinstance(self.gate, str) or self.gate not in GATES:
            raise ThresholdsError(f"point {self.name}: gate must be one of {', '.join(GATES)}, got {short(self.gate)}")
        if not isinstance(self.recipe, str) or not _NAME.fullmatch(self.recipe):
            raise ThresholdsError(f"point {self.name}: recipe {short(self.recipe)} is not a name")
        if not _is_number(self.argument):
            raise ThresholdsError(f"point {self.name}: argument must be a finite number, got {short(self.argument)}")
        if self.quantile is not None and not (_is_number(self.quantile) and 0 < self.quantile <= 1):
            raise ThresholdsError(f"point {self.name}: quantile must lie in (0, 1], got {short(self.quantile)}")
        if not isinstance(self.scores, str) or self.scores not in SCORES:
            raise ThresholdsError(
                f"point {self.name}: scores must be one of {', '.join(SCORES)}, got {short(self.scores)}"
            )
        try:
            self._check_exact_heads()
        except container.Malformed as error:
            raise ThresholdsError(f"point {self.name}: {error}") from None

    def _check_exact_heads(self):
        if not isinstance(self.exact_heads, Mapping):
            raise ThresholdsError(f"exact_heads must be a JSON object, got {short(self.exact_heads)}")
        if self.exact_heads and self.scores == "exact":
            raise ThresholdsError("exact_heads belong to int8 scores, and these are exact")
        for path, heads in self.exact_heads.items():
            what = f"exact_heads of {short(path)}"
            heads = sequence(what, list(heads) if isinstance(heads, tuple) else heads, 1, MAX_HEADS)
            for head in heads:
                integer(what, head, 0, MAX_HEADS - 1)
            if any(b <= a for a, b in zip(heads, heads[1:], strict=False)):
                raise ThresholdsError(f"{what} must increase")


@dataclass(frozen=True)
class Thresholds:
    """Calibrated gates of one model. Raises ThresholdsError when the parts do not fit together.

    `model` has the keys MODEL_KEYS; a value of None is unknown and is not checked. `provenance` is any JSON object.
    `modal` holds thresholds by modality, in the order of MODALITIES, for every module or for none; `tensors` then are
    the lowest of these (see `by_modality`): right, and less sparse, wherever a query tile's modality is not known.
    """

    model: Mapping[str, object]
    tile: TileShape
    keep_sink: bool
    knots: tuple[int, ...]  # absolute query positions, increasing
    points: tuple[Point, ...]
    tensors: Mapping[str, torch.Tensor]  # {module path: float32 [points, query heads, knots]}
    provenance: Mapping[str, object] = field(default_factory=dict)
    modal: Mapping[str, torch.Tensor] = field(default_factory=dict)  # float32 [points, modalities, query heads, knots]

    @classmethod
    def by_modality(cls, *, modal: Mapping[str, torch.Tensor], **rest) -> Thresholds:
        """Thresholds of the tensors `modal`, see the class; `rest` are its other fields but `tensors`."""
        for name, tensor in modal.items():
            if tensor.dim() != 4 or tensor.shape[1] != len(MODALITIES):
                expected = f"[points, {len(MODALITIES)} modalities, heads, knots]"
                raise ThresholdsError(f"{short(name)} must be {expected}, got {list(tensor.shape)}")
        return cls(tensors={path: tensor.amin(1) for path, tensor in modal.items()}, modal=modal, **rest)

    def __post_init__(self):
        try:
            self._check()
        except container.Malformed as error:
            raise ThresholdsError(str(error)) from None

    def _check(self):
        exact_keys("model", self.model, MODEL_KEYS)
        if not isinstance(self.model["id"], str):
            raise ThresholdsError(f"the model's id must be text, got {short(self.model['id'])}")
        if not isinstance(self.keep_sink, bool):
            raise ThresholdsError(f"keep_sink must be true or false, got {short(self.keep_sink)}")
        if max(self.tile.rows, self.tile.keys) > MAX_TILE:
            raise ThresholdsError(f"tile {self.tile} is larger than {MAX_TILE}")
        _check_knots(self.knots)
        names = [point.name for point in self.points]
        if not 1 <= len(names) <= MAX_POINTS or len(set(names)) != len(names):
            raise ThresholdsError(f"there must be 1 to {MAX_POINTS} points of different names, got {short(names)}")
        if not self.tensors:
            raise ThresholdsError("there is no module")
        for name, tensor in self.tensors.items():
            path, shape = short(name), tuple(tensor.shape)
            if tensor.dtype != torch.float32 or len(shape) != 3:
                raise ThresholdsError(f"{path} must be float32 [points, heads, knots], got {tensor.dtype} {shape}")
            if (shape[0], shape[2]) != (len(names), len(self.knots)) or not 1 <= shape[1] <= MAX_HEADS:
                expected = f"{len(names)} points x 1..{MAX_HEADS} heads x {len(self.knots)} knots"
                raise ThresholdsError(f"{path} must hold {expected}, got {' x '.join(map(str, shape))}")
            for point in self.points:
                if max(point.exact_heads.get(name, ()), default=0) >= shape[1]:
                    raise ThresholdsError(f"point {point.name}: exact_heads of {path} name a head past its {shape[1]}")
            if bool((torch.isnan(tensor) | (tensor == torch.inf)).any()):
                raise ThresholdsError(f"{path} holds NaN or +inf; a threshold is a finite number or -inf")
        if self.modal and set(self.modal) != set(self.tensors):
            raise ThresholdsError("thresholds by modality must be given for every module or for none")
        for name, tensor in self.modal.items():
            lowest = self.tensors[name]
            wanted = (lowest.shape[0], len(MODALITIES), *lowest.shape[1:])
            if tensor.dtype != torch.float32 or tensor.shape != wanted:
                raise ThresholdsError(
                    f"{short(name)} must be float32 {list(wanted)} by modality, got {tensor.dtype} {list(tensor.shape)}"
                )
            if bool((tensor == torch.inf).any()) or not torch.equal(tensor.amin(1), lowest):
                raise ThresholdsError(f"{short(name)} holds other thresholds by modality than without")

        for point in self.points:
            for path in point.exact_heads:
                if path not in self.tensors:
                    raise ThresholdsError(
                        f"point {point.name}: exact_heads name {short(path)}, which is no module here"
                    )

    def index(self, name: str | None = None) -> int:
        """Row of point `name`; without a name, of the only point. Raises ThresholdsError naming the points."""
        names = [point.name for point in self.points]
        if name is None and len(names) == 1:
            return 0
        if name not in names:
            what = "several points; choose one" if name is None else f"no point {name!r}"
            raise ThresholdsError(f"the thresholds have {what} of: {', '.join(names)}")
        return names.index(name)

    def gate(self, module_path: str, point: str | None, query_tiles: int, device: torch.device | str = "cpu") -> Gate:
        """The Gate of one module at one point, its tensor float32 [query heads, query_tiles] on `device`.

        Interpolated on the CPU in float64, so values are the same on every device. Of thresholds by modality these are
        the lowest. Raises ThresholdsError for a module or point that the artifact does not hold.
        """
        row = self.index(point)
        if module_path not in self.tensors:
            raise ThresholdsError(f"the thresholds hold no module '{short(module_path)}'")
        values = interpolate(self.tensors[module_path][row], self.knots, tile_positions(query_tiles, self.tile))
        return Gate(**{self.points[row].gate: values.to(device)})

    def modal_values(
        self, module_path: str, point: str | None, query_tiles: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor | None:
        """float32 [modalities, query heads, query_tiles]: the same for each of MODALITIES; None without any."""
        if not self.modal:
            return None
        values = self.modal[module_path][self.index(point)]
        return interpolate(values, self.knots, tile_positions(query_tiles, self.tile)).to(device)

    def check_model(self, identity: Mapping[str, object], modules: Mapping[str, int] | None = None) -> None:
        """Raise ThresholdsError, naming the field, unless the thresholds were made for this model.

        `identity` has keys among MODEL_KEYS; id and revision are labels and may differ. `modules` maps the model's
        attention module paths to their number of query heads.
        """
        found = model_difference(self.model, identity)
        if found:
            raise ThresholdsError(f"the thresholds were made for another model ({short(self.model['id'])}): {found}")
        for path, tensor in self.tensors.items() if modules is not None else ():
            if path not in modules:
                raise ThresholdsError(f"the thresholds hold module '{short(path)}', which this model does not have")
            if modules[path] != tensor.shape[1]:
                raise ThresholdsError(
                    f"{short(path)}: query_heads is {tensor.shape[1]} in the thresholds and {modules[path]} in this "
                    "model"
                )

    def check_tile(self, tile: TileShape) -> None:
        """Raise ThresholdsError unless the thresholds were calibrated with this tile shape."""
        if tile != self.tile:
            raise ThresholdsError(f"tile is {self.tile} in the thresholds, and {tile} was asked for")

    def to_bytes(self) -> bytes:
        """The safetensors file: modules in order of their names, header padded with spaces to 8 bytes."""
        metadata = {
            "schema": SCHEMA,
            "model": dict(self.model),
            "tile": [self.tile.rows, self.tile.keys],
            "keep_sink": self.keep_sink,
            "knots": list(self.knots),
            "points": [_point_to_json(point) for point in self.points],
            "modalities": list(MODALITIES) if self.modal else None,
            "provenance": dict(self.provenance),
        }
        return container.pack("bsfa", metadata, self.modal or self.tensors)

    def write(self, path: str | os.PathLike) -> None:
        """Write the file whole or not at all; errors as `files.write_whole`."""
        write_whole(path, self.to_bytes())

    @classmethod
    def read(cls, path: str | os.PathLike) -> Thresholds:
        """Read an artifact. Raises ThresholdsError with one sentence for anything but a valid one."""
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except IsADirectoryError:
            raise ThresholdsError(f"cannot read {path}: it is a directory, not a thresholds file") from None
        except OSError as error:
            raise ThresholdsError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            return cls.from_bytes(content)
        except ThresholdsError as error:
            raise ThresholdsError(f"{path}: {error}") from None

    @classmethod
    def from_bytes(cls, content: bytes) -> Thresholds:
        """Parse an artifact. Raises ThresholdsError."""
        try:
            metadata, tensors = container.unpack(content, "bsfa", MAX_FILE_BYTES)
            _check_schema(metadata)
            if metadata["schema"] < 4:
                exact_keys("the bsfa metadata", metadata, METADATA_KEYS - {"modalities"})
                metadata["modalities"] = None
            exact_keys("the bsfa metadata", metadata, METADATA_KEYS)
            if metadata["modalities"] not in (None, list(MODALITIES)):
                raise ThresholdsError(
                    f"modalities must be null or {', '.join(MODALITIES)}, got {short(metadata['modalities'])}"
                )
            sizes = (integer("tile", size, 1, MAX_TILE) for size in sequence("tile", metadata["tile"], 2, 2))
            tile = TileShape(*sizes)
            knots = tuple(sequence("knots", metadata["knots"], 1, MAX_KNOTS))
            points = tuple(
                _point_from_json(point, metadata["schema"])
                for point in sequence("points", metadata["points"], 1, MAX_POINTS)
            )
            if not isinstance(metadata["provenance"], dict):
                raise ThresholdsError("provenance must be a JSON object")
            model = metadata["model"]
            if metadata["schema"] == 1:
                exact_keys("model", model, set(MODEL_KEYS) - {"config"})
                model = {**model, "config": None}
            rest = dict(
                model=model, tile=tile, keep_sink=metadata["keep_sink"], knots=knots, points=points,
                provenance=metadata["provenance"],
            )  # fmt: skip
            return (
                cls(tensors=tensors, **rest)
                if metadata["modalities"] is None
                else cls.by_modality(modal=tensors, **rest)
            )
        except container.Pickled as error:
            raise ThresholdsError(f"{error}; `bsfa export --from-official` converts the authors' file") from None
        except container.Malformed as error:
            raise ThresholdsError(str(error)) from None


def model_difference(ours: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    """What sets two model identities apart, as "head_dim is 64 there and 128 here" (ours there), or None.

    Compares MODEL_CHECKED; a value that is None or missing on either side is unknown and sets nothing apart.
    """
    for key in MODEL_CHECKED:
        if ours.get(key) is not None and theirs.get(key) is not None:
            found = container.difference(key, ours[key], theirs[key])
            if found:
                return found
    return None


def tile_positions(query_tiles: int, tile: TileShape) -> torch.Tensor:
    """float64 [query_tiles]: the position at which each query tile's threshold is read, its centre."""
    return torch.arange(query_tiles, dtype=torch.float64) * tile.rows + tile.rows // 2


def interpolate(values: torch.Tensor, knots: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    """values [..., knots] read at positions [n], as float32 [..., n]; see the module docstring for the rule."""
    at = torch.tensor(knots, dtype=torch.float64)
    positions = positions.to(torch.float64).clamp(at[0], at[-1])
    right = torch.searchsorted(at, positions).clamp(min=1, max=max(len(knots) - 1, 1))
    left, right = right - 1, right.clamp(max=len(knots) - 1)
    weight = ((positions - at[left]) / (at[right] - at[left]).clamp(min=1)).expand(*values.shape[:-1], -1)
    low, high = values[..., left].double(), values[..., right].double()
    mixed = torch.where((low == -torch.inf) | (high == -torch.inf), -torch.inf, low + weight * (high - low))
    return torch.where(weight == 0, low, torch.where(weight == 1, high, mixed)).float().contiguous()


def _check_schema(bsfa: dict) -> None:
    schema = bsfa.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ThresholdsError(f"schema must be a positive whole number, got {short(schema)}")
    if schema > SCHEMA:
        raise ThresholdsError(
            f"the file has schema {schema}, and this version of bsfa reads up to {SCHEMA}; upgrade it"
        )


def _check_knots(knots) -> None:
    if not 1 <= len(knots) <= MAX_KNOTS:
        raise ThresholdsError(f"there must be 1 to {MAX_KNOTS} knots, got {len(knots)}")
    for knot in knots:
        integer("knots", knot, 0, MAX_POSITION)
    if any(b <= a for a, b in zip(knots, knots[1:], strict=False)):
        raise ThresholdsError("knots must increase")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _point_to_json(point: Point) -> dict:
    result = dict(vars(point))
    result["exact_heads"] = {path: list(heads) for path, heads in point.exact_heads.items()}
    for key in ("fitted", "held_out"):
        result[key] = None if result[key] is None else dict(vars(result[key]))
    return result


def _point_from_json(value, schema: int) -> Point:
    exact_keys("a point", value, set(Point.__dataclass_fields__) - (NEW_IN_3 if schema < 3 else set()))
    reached = {}
    for key in ("fitted", "held_out"):
        if value[key] is not None:
            exact_keys(f"a point's {key}", value[key], Reached.__dataclass_fields__)
            reached[key] = Reached(**value[key])
    return Point(**{**value, **reached})
