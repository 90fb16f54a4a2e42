"""What to measure: a sweep of lengths x skip rates x head shapes, from a YAML profile and flags."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from bsfa_kernels.words import quoted

from ..errors import UsageError

GATES = ("gap", "absolute")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DATA = ("normal", "structured")
EXACT, INT8 = "exact", "int8"  # of our kernel's scores
OURS = {EXACT: "bsfa", INT8: "bsfa, int8 scores"}  # {scores: kind of a contender}, never one for the other
FA3 = "FlashAttention-3"
BASELINES = (
    "cuDNN", "FlashAttention-2", FA3, "FlashAttention-4", "efficient", "FlexAttention",
    "PyTorch's CPU flash attention", "math", "FlashAttention-3 FP8", "skip-softmax",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One attention call's heads. `lengths` and `data` override the plan's for this shape; `v_head_dim` where V's heads
    are narrower than those of Q and K.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool = True
    batch: int = 1
    lengths: tuple[int, ...] | None = None
    data: str | None = None
    v_head_dim: int | None = None

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise UsageError(f"a shape's name must be text, got {quoted(self.name)}")
        for name in ("heads", "kv_heads", "head_dim", "batch"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UsageError(f"{name} must be a positive whole number, got {quoted(getattr(self, name))}")
        if self.v_head_dim is not None and (
            not isinstance(self.v_head_dim, int) or not 1 <= self.v_head_dim <= self.head_dim
        ):
            raise UsageError(f"v_head_dim must be from 1 to head_dim ({self.head_dim}), got {quoted(self.v_head_dim)}")
        if self.heads % self.kv_heads:
            raise UsageError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not isinstance(self.causal, bool):
            raise UsageError(f"causal must be true or false, got {quoted(self.causal)}")
        if self.data is not None and self.data not in DATA:
            raise UsageError(f"data must be one of {', '.join(DATA)}, got {quoted(self.data)}")

    @property
    def values(self) -> int:
        """V's head dim."""
        return self.v_head_dim or self.head_dim

    def describe(self) -> dict:
        left_out = ("lengths", "data", *(["v_head_dim"] if self.v_head_dim is None else []))
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True)
class Plan:
    """A whole sweep. Lengths in tokens, skip rates as shares of the candidate tiles, tile as rows x keys; the baselines
    and rivals to time, all where none is named; the scores of our kernel.
    """

    name: str
    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    skip: tuple[float, ...]
    gate: str = "gap"
    tile: str = "64x128"
    dtype: str = "auto"
    backend: str = "auto"
    data: str = "normal"
    baselines: tuple[str, ...] = ()
    scores: tuple[str, ...] = (EXACT,)
    seed: int = 0

    def __post_init__(self):
        if not self.shapes:
            raise UsageError(f"profile {self.name} has no shapes")
        for lengths in (self.lengths, *(shape.lengths for shape in self.shapes if shape.lengths)):
            if not lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in lengths):
                raise UsageError(f"lengths must be positive whole numbers, got {quoted(lengths)}")
        if any(not isinstance(rate, (int, float)) or not 0 < rate < 1 for rate in self.skip):
            raise UsageError(f"skip rates must lie between 0 and 1, got {quoted(self.skip)}; 0 is always timed")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must be a whole number from 0 on, below 2^63, got {quoted(self.seed)}")
        for name in self.baselines:
            if name not in BASELINES:
                raise UsageError(f"baselines must be among {', '.join(BASELINES)}, got {name!r}")
        if not self.scores or any(scores not in OURS for scores in self.scores):
            raise UsageError(
                f"scores must be among {', '.join(OURS)}, got {', '.join(map(str, self.scores)) or 'none'}"
            )
        for name, allowed in (("gate", GATES), ("dtype", DTYPES), ("data", DATA)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}, got {quoted(getattr(self, name))}")
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", str(self.tile)):
            raise UsageError(f"tile must be ROWSxKEYS, such as 64x128, got {quoted(self.tile)}")

    def data_of(self, shape: Shape) -> str:
        return shape.data or self.data

    def cells(self) -> list[tuple[Shape, int]]:
        """Every (shape, length), shortest first within a shape."""
        return [(shape, n) for shape in self.shapes for n in sorted(shape.lengths or self.lengths)]

    def with_flags(self, heads=None, kv_heads=None, head_dim=None, causal=None, **changes) -> Plan:
        """This plan with what is not None replaced. Any head flag leaves one shape, made from the first."""
        head_flags = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "causal": causal}
        head_flags = {key: value for key, value in head_flags.items() if value is not None}
        if "heads" in head_flags:
            head_flags.setdefault("kv_heads", heads)
        if "head_dim" in head_flags:
            head_flags["v_head_dim"] = None
        changes = {key: value for key, value in changes.items() if value is not None}
        if head_flags:
            changes["shapes"] = (replace(self.shapes[0], name="custom", lengths=None, **head_flags),)
            changes["name"] = "custom"
        elif "lengths" in changes:
            changes["shapes"] = tuple(replace(shape, lengths=None) for shape in self.shapes)
        if "data" in changes:
            changes["shapes"] = tuple(replace(shape, data=None) for shape in changes.get("shapes", self.shapes))
        return replace(self, **changes)


def with_scores(name: str, scores: str) -> str:
    """A contender's name, which says what is no exact score: "bsfa int8, 50 % skipped"."""
    return name if scores == EXACT else f"bsfa {scores}{name.removeprefix('bsfa')}"


def available() -> list[str]:
    """Names of the profiles that come with bsfa."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load(profile: str) -> Plan:
    """The plan in a bundled profile or a YAML file. Raises UsageError for what cannot be read or meant."""
    import yaml

    path, known = Path(profile), available()
    if profile in known:
        text = (_folder() / f"{profile}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            bundled = f"; the bundled one is '{path.stem}', without a suffix" if path.stem in known else ""
            raise UsageError(f"cannot read profile {profile}: {reason}{bundled}") from error
    else:
        raise UsageError(f"no profile '{profile}': give a .yaml file or one of {', '.join(known)}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"profile {profile} is not YAML: {' '.join(str(error).split())}") from error
    content = _known(content, Plan, profile, exclude="name")
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise UsageError(f"profile {profile}: 'shapes' must be a list of head shapes")
    content["shapes"] = tuple(_make(Shape, _known(shape, Shape, profile), profile) for shape in shapes)
    return _make(Plan, {"name": profile if profile in known else path.stem, **content}, profile)


def _known(content, kind: type, profile: str, exclude: str = "") -> dict:
    known = [field.name for field in fields(kind) if field.name != exclude]
    if not isinstance(content, dict):
        raise UsageError(f"profile {profile}: expected a mapping with {', '.join(known)}")
    for key in content:
        if key not in known:
            raise UsageError(f"profile {profile}: unknown key '{key}'; known keys: {', '.join(known)}")
    return {
        key: tuple(value) if isinstance(value, list) and key != "shapes" else value for key, value in content.items()
    }


def _make(kind: type, content: dict, profile: str):
    for key in ("lengths", "skip", "baselines", "scores"):
        if not isinstance(content.get(key) or (), tuple):
            raise UsageError(f"profile {profile}: '{key}' must be a list, got {quoted(content[key])}")
    try:
        return kind(**content)
    except TypeError as error:
        missing = re.findall(r"'(\w+)'", str(error))
        raise UsageError(f"profile {profile}: missing {', '.join(missing)}") from error
    except UsageError as error:
        raise UsageError(f"profile {profile}: {error}") from error


def _folder() -> Path:
    """The installed profiles. importlib.resources cannot read a folder without __init__.py from an editable install."""
    import bsfa_profiles

    return next(folder for folder in map(Path, bsfa_profiles.__path__) if folder.is_dir())
