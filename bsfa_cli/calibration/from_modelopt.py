"""A skip-softmax configuration of Model-Optimizer or TensorRT-LLM, in a checkpoint's config.json, as thresholds.

    given = read(Path("config.json"))
    thresholds, reached = convert(run, given, rate=None, length=None, quantile=0.99)

Their lambda depends on the length of the prompt and ours on the position of the query, so that the thresholds are those
of prompts of one length. What the configuration says beyond a formula known here is refused.
"""

from __future__ import annotations

import fnmatch
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from bsfa_kernels.thresholds import Point, Reached, Thresholds
from bsfa_kernels.words import short

from ..errors import InputError, UsageError
from . import fit, points
from .handover import FORMULA
from .store import Run

KEYS = frozenset({"algorithm", "sparse_algo", "targets", "ignore", "threshold_scale_factor", "target_sparsity"})
TARGET = "Attention"  # how the classes are named that the engines replace
# Of the configuration, what must agree with the run's model where both say it.
IDENTITY = {
    "num_hidden_layers": "layers", "num_attention_heads": "query_heads", "num_key_value_heads": "key_value_heads",
    "head_dim": "head_dim",
}  # fmt: skip


@dataclass(frozen=True)
class Given:
    """factor = a * exp(b * target_sparsity) for prefill; `ignore` patterns name modules that stay dense."""

    path: Path
    a: float
    b: float
    target: float | None
    ignore: tuple[str, ...]
    decode: bool  # it has coefficients for decoding too, which bsfa leaves dense
    config: dict


def read(path: Path) -> Given:
    """Raises InputError, naming the field, for a file without such a configuration or one that says more."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    try:
        return _given(path, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _given(path: Path, config) -> Given:
    sparse = _object("the file", config).get("sparse_attention_config", config)
    groups = _object("sparse_attention_config", sparse).get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError("it has no sparse_attention_config with config_groups, as Model-Optimizer exports it")
    if set(sparse) - {"config_groups", "producer"}:
        raise InputError(f"sparse_attention_config has {_first(set(sparse) - {'config_groups', 'producer'})}, unknown")
    if len(groups) > 1:
        raise InputError(f"config_groups holds {len(groups)} groups, and bsfa knows one of skip_softmax")
    name, group = next(iter(groups.items()))
    group = _object(short(name), group)
    algorithm = group.get("algorithm", group.get("sparse_algo"))
    if algorithm not in ("skip_softmax", "softmax_skip"):
        raise InputError(f"the algorithm is {short(algorithm)}, and bsfa knows skip_softmax")
    if set(group) - KEYS:
        raise InputError(f"{short(name)} has {_first(set(group) - KEYS)}, which bsfa does not know")
    targets = group.get("targets", [TARGET])
    if not isinstance(targets, list) or not targets or not all(str(each).endswith(TARGET) for each in targets):
        raise InputError(f"targets must be a list of attention classes, such as {TARGET}, got {short(targets)}")
    factor = _object("threshold_scale_factor", group.get("threshold_scale_factor"))
    formula = factor.get("formula")
    if not isinstance(formula, str) or formula.replace(" ", "") != FORMULA.replace(" ", ""):
        raise InputError(f"its formula is {short(formula)}, and bsfa knows {FORMULA!r}")
    unknown = set(factor) - {"formula", "prefill", "decode", "coefficients"}
    if unknown or ("prefill" in factor) == ("coefficients" in factor):
        raise InputError("threshold_scale_factor must hold a formula and coefficients a and b, for prefill")
    numbers = _object("its coefficients", factor.get("prefill", factor.get("coefficients")))
    if set(numbers) != {"a", "b"}:
        raise InputError(f"its coefficients must be a and b, got {short(', '.join(map(str, numbers)))}")
    a, b = (_number(key, numbers[key]) for key in ("a", "b"))
    if a <= 0:
        raise InputError(f"a must be above 0, got {a:g}")
    target = group.get("target_sparsity")
    if isinstance(target, dict):
        target = target.get("prefill")
    if target is not None and not 0 <= (target := _number("target_sparsity", target)) <= 1:
        raise InputError(f"target_sparsity must lie in [0, 1], got {target:g}")
    ignore = group.get("ignore", [])
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise InputError(f"ignore must be a list of names, got {short(ignore)}")
    return Given(path, a, b, target, tuple(ignore), "decode" in factor, config)


def convert(
    run: Run, given: Given, rate: float | None, length: int | None, quantile: float
) -> tuple[Thresholds, list[points.Report]]:
    """(an artifact of one point, what it reaches on the run's samples) for prompts of `length` tokens, the run's
    longest by default, at `rate`, the configuration's own by default.

    Raises UsageError where no rate is given or lambda is 1 or more, InputError for a configuration of another model.
    """
    check_model(run, given.path, given.config)
    rate = given.target if rate is None else rate
    if rate is None:
        raise UsageError(f"{given.path} has no target_sparsity; give --target-skip")
    length = length or run.plan.longest
    gap = math.log(given.a) + given.b * rate - math.log(length)
    if gap >= 0:
        raise UsageError(
            f"{given.path}: for {length:,} tokens and a target of {rate:g} lambda is {math.exp(min(gap, 99)):.3g}; the "
            "engines skip nothing from 1 on"
        )
    tables = {role: fit.Table.of(curves, "gap") for role in ("fit", "heldout") if (curves := run.complete(role))}
    table, plan = tables["fit"], run.plan
    thresholds = torch.full((len(table.candidates), len(plan.knot_tiles)), gap, dtype=torch.float64)
    for path, heads in table.modules.items():
        # By the name or, as Model-Optimizer's own reader has it, by a part of it: what may be meant stays dense.
        if any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"*{pattern}*") for pattern in given.ignore):
            thresholds[heads] = -math.inf

    def reached(role: str, heads: slice = slice(None)) -> Reached | None:
        found = tables.get(role)
        return found and fit.evaluate_positions(found, plan, thresholds, quantile, heads)

    name = f"modelopt-{100 * rate:.10g}"
    point = Point(name, "gap", "modelopt", rate, quantile, reached("fit"), reached("heldout"))
    reports = []
    for path, heads in table.modules.items():
        kept = not bool(thresholds[heads].isfinite().any())
        least = None if kept else gap
        both = reached("fit", heads), reached("heldout", heads)
        reports.append(points.ModuleReport(path, least, least, float(kept), *both))
    more = {"modelopt": {"a": given.a, "b": given.b, "length": length, "ignore": list(given.ignore)}}
    return points.artifact(run, [thresholds], [point], table.modules, more), [points.Report(point, tuple(reports))]


def check_model(run: Run, path: Path, config: dict) -> None:
    """Raise InputError where a checkpoint's configuration is, as far as it says, not of the run's model."""
    ours, theirs = run.manifest["model"], config
    if isinstance(theirs.get("text_config"), dict):
        theirs = {**theirs, **theirs["text_config"]}
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and ours["architecture"] not in (None, *architectures):
        raise InputError(f"{path} is of {architectures[0]}, and the run of {ours['architecture']}")
    for key, name in IDENTITY.items():
        if theirs.get(key) is not None and isinstance(ours[name], int) and theirs[key] != ours[name]:
            raise InputError(f"{path}: {key} is {short(theirs[key])}, and {ours[name]} in the run's model")


def _object(what: str, value) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{what} must be a JSON object, got {short(value)}")
    return value


def _number(what: str, value) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number that no float holds
        pass
    raise InputError(f"{what} must be a finite number, got {short(value)}")


def _first(names: set) -> str:
    return short(sorted(map(str, names))[0])
