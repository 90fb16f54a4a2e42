"""Operating points: fit each that was asked for, check it on the held-out samples, and put all into one artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from bsfa_kernels.thresholds import MODEL_KEYS, Point, Reached, Thresholds

from ..data.texts import is_generated, names
from ..errors import OutOfReach, UsageError
from . import fit
from .curves import int8_errors, octave
from .store import Curves, Run

FITTED, HELD_OUT = "fitted", "held-out"
AIMED = 1e-3  # how near to the rate asked for a search for it stops
NEAR = 0.02  # of a rate asked for, from which on a point says nothing
CHOICES = {
    "target-skip": fit.target_skip, "mass-skip": fit.mass_skip, "effect-skip": fit.effect_skip, "kl-skip": fit.kl_skip,
    "even-skip": fit.even_skip, "one-threshold": fit.one_threshold,
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One point: a recipe and what is asked of it.

    "top-k" K; "max-dropped-mass" E; and for a skip rate R, shared out over heads and positions, "kl-skip" (so that
    predictions change least; of a run with gradients), "mass-skip" (so that the softmax mass dropped is least),
    "target-skip" (the first where the run can, else the second), "effect-skip" (so that the residual stream moves
    least), "even-skip" (the same in every head) or "one-threshold" (for the whole model). `dense` layers keep every
    tile, or so many, in which a dropped tile costs most; the others skip more for them.
    """

    recipe: str
    argument: float
    gate: str
    label: str | None = None  # the point's name, where it is not the recipe's
    dense: frozenset[int] | int = frozenset()

    @property
    def name(self) -> str:
        if self.label is not None:
            return self.label
        if self.recipe == "top-k":
            return f"topk-{self.argument:g}"
        if self.recipe in CHOICES:
            return f"{self.recipe.removeprefix('target-')}-{100 * self.argument:.10g}"
        return f"mass-{self.argument:.10g}"


@dataclass(frozen=True)
class ModuleReport:
    """One attention module at one point."""

    path: str
    least: float | None  # smallest and largest finite threshold; None where every tile is kept
    most: float | None
    kept_whole: float  # share of the (head, knot) thresholds that keep every tile although there are some to drop
    fitted: Reached | None
    held_out: Reached | None


@dataclass(frozen=True)
class Report:
    point: Point
    modules: tuple[ModuleReport, ...]
    # {"fitted" or "held_out": as fit.skip_by_modality}, of runs on images
    modalities: Mapping[str, Mapping] = field(default_factory=dict)
    between: tuple[tuple[int, float], ...] = ()  # of a k that was not collected: its neighbours, and what they skip
    dense: tuple[str, ...] = ()  # modules that keep every tile because they were asked to
    kl: tuple[float | None, ...] = ()  # nats a position that skipping costs, predicted for fitted, held-out samples


def make_requests(
    top_k: Sequence[int], target_skip: Sequence[float], mass_skip: Sequence[float], effect_skip: Sequence[float],
    kl_skip: Sequence[float], one_threshold: Sequence[float], max_dropped_mass: Sequence[float], gate: str,
    dense: frozenset[int] | int = frozenset(),
) -> list[Request]:  # fmt: skip
    """The points that were asked for. Raises UsageError for values that cannot be meant, or none at all."""
    if not (top_k or target_skip or mass_skip or effect_skip or kl_skip or one_threshold or max_dropped_mass):
        raise UsageError(
            "which operating points? give --target-skip R, --kl-skip R, --mass-skip R, --effect-skip R, "
            "--one-threshold R, --top-k K or --max-dropped-mass E, repeatedly"
        )
    if isinstance(dense, int) and (top_k or max_dropped_mass):
        raise UsageError("--keep-dense auto shares a skip rate out again; name layers for --top-k, --max-dropped-mass")
    for k in top_k:
        if k < 1:
            raise UsageError(f"--top-k must be at least 1, got {k}")
    for option, values in (
        ("--target-skip", target_skip), ("--mass-skip", mass_skip), ("--effect-skip", effect_skip),
        ("--kl-skip", kl_skip), ("--one-threshold", one_threshold), ("--max-dropped-mass", max_dropped_mass),
    ):  # fmt: skip
        for value in values:
            if not 0 < value < 1:
                raise UsageError(f"{option} must lie between 0 and 1, both excluded; got {value:g}")
    requests = [Request("top-k", k, "absolute") for k in top_k]
    requests += [Request("target-skip", rate, gate) for rate in target_skip]
    requests += [Request("mass-skip", rate, gate) for rate in mass_skip]
    requests += [Request("effect-skip", rate, gate) for rate in effect_skip]
    requests += [Request("kl-skip", rate, gate) for rate in kl_skip]
    requests += [Request("one-threshold", rate, gate) for rate in one_threshold]
    requests += [Request("max-dropped-mass", most, gate) for most in max_dropped_mass]
    requests = [replace(request, dense=dense) for request in requests]
    names = [request.name for request in requests]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"operating point {name} was asked for twice")
    return requests


def export(
    run: Run,
    requests: Sequence[Request],
    quantile: float,
    searched: Mapping[str, object] | None = None,
    aim: str = FITTED,
    scores: str | None = None,
    max_int8_error: float | None = None,
    by_modality: bool = False,
) -> tuple[Thresholds, list[Report], dict[str, str]]:
    """The artifact, what to show of it, and {point: why it is not in it} of those that this run cannot give.

    `searched` says of points, by name, what was measured to find them. `aim`: which samples are to reach the skip rates
    asked for, FITTED or HELD_OUT; the latter then check everything but that rate. `scores` that the points are to run
    with, the run's own by default; heads whose output int8 ones move by more than `max_int8_error` stay exact.
    `by_modality`: thresholds of their own for query tiles of text, of images and of both. Raises InputError for a run
    that is damaged or not finished, OutOfReach where it gives none of the points.
    """
    plan = run.plan
    if by_modality and not plan.modal:
        raise UsageError(f"--by-modality needs a run on images without --gradients, and {run.path} is none")
    curves = {role: run.complete(role) for role in ("fit", "heldout")}
    if aim == HELD_OUT and not curves["heldout"]:
        raise UsageError("--aim held-out needs held-out samples, and this run has none: calibrate with more --samples")
    reports, rows, left_out = [], [], {}
    tables: dict[tuple[str, str], fit.Table] = {}
    for request in requests:
        if request.recipe == "target-skip" and plan.gradients:
            request = replace(request, recipe="kl-skip", label=request.name)  # what the artifact then says
        for role in ("fit", "heldout"):
            if curves[role] and (role, request.gate) not in tables:
                tables[role, request.gate] = fit.Table.of(curves[role], request.gate, by_modality)
        fitted, held_out = tables["fit", request.gate], tables.get(("heldout", request.gate))
        try:
            thresholds, report = _point(request, plan, curves, fitted, held_out, quantile, aim, by_modality)
        except OutOfReach as error:
            left_out[request.name] = str(error)
            continue
        rows.append(thresholds)
        reports.append(report)
    if not rows:
        raise OutOfReach("; ".join(left_out.values()))
    scores = scores or plan.scores
    exact = exact_heads(run, curves["fit"], max_int8_error) if scores == "int8" else {}
    reports = [replace(each, point=replace(each.point, scores=scores, exact_heads=exact)) for each in reports]
    kept_dense = {report.point.name: report.dense for report in reports if report.dense}
    modalities = {report.point.name: dict(report.modalities) for report in reports if report.modalities}
    more = {
        **({"searched": dict(searched)} if searched else {}),
        **({"aim": aim} if aim != FITTED else {}),
        **({"scores": plan.scores} if plan.scores != "exact" else {}),
        **({"max_int8_error": max_int8_error} if max_int8_error is not None else {}),
        **({"kept_dense": kept_dense} if kept_dense else {}),
        **({"modalities": modalities} if modalities else {}),
    }
    return artifact(run, rows, [report.point for report in reports], fitted.modules, more), reports, left_out


def artifact(
    run: Run,
    rows: Sequence[torch.Tensor],
    points: Sequence[Point],
    modules: Mapping[str, slice],
    more: Mapping[str, object],
) -> Thresholds:
    """Thresholds [N, knots] of each point, or [N, modalities, knots], as an artifact for the model of `run`; `more`
    goes into its provenance.
    """
    values = torch.stack(rows).float()
    make, tensors = Thresholds, {path: values[:, heads].contiguous() for path, heads in modules.items()}
    named = {"tensors": tensors}
    if values.dim() == 4:
        make = Thresholds.by_modality
        named = {"modal": {path: each.transpose(1, 2).contiguous() for path, each in tensors.items()}}
    plan = run.plan
    data, options = run.manifest["data"], run.manifest["options"]
    return make(
        model={key: run.manifest["model"].get(key) for key in MODEL_KEYS},
        tile=plan.tile,
        keep_sink=True,
        knots=tuple(tile * plan.tile.rows + plan.tile.rows // 2 for tile in plan.knot_tiles),
        points=tuple(points),
        **named,
        provenance={
            "data": {
                "hash": data["hash"],
                "spec": ",".join(names(data["spec"])),
                "generated": is_generated(data["spec"]),
            },
            "samples": {role: run.planned(role) for role in ("fit", "heldout")},
            "longest": plan.longest,
            "seed": options["seed"],
            "device": options["device"],
            "dtype": options["dtype"],
            "software": run.manifest["software"],
            **more,
        },
    )


def exact_heads(run: Run, curves: Curves, limit: float | None) -> dict[str, list[int]]:
    """{module path: query heads whose output int8 scores move by more than `limit`}. Raises UsageError for a run that
    has not measured it.
    """
    if limit is None:
        return {}
    errors = int8_errors(curves)
    if not errors:
        raise UsageError(f"--max-int8-error: {run.path} has not measured it; calibrate anew with --scores int8")
    over = {path: [head for head, error in enumerate(found) if error > limit] for path, found in errors.items()}
    return {path: heads for path, heads in over.items() if heads}


def _point(
    request: Request, plan, curves: Mapping[str, Curves], fitted: fit.Table, held_out: fit.Table | None,
    quantile: float, aim: str, by_modality: bool,
):  # fmt: skip
    """(thresholds float64 [N, knots], or [N, modalities, knots], and Report) of one point."""
    dense, modalities = _dense(request, fitted), {}
    fitted, held_out = (table and table.keeping(dense) for table in (fitted, held_out))
    kept = fitted.heads(dense)
    if request.recipe == "top-k":
        if by_modality:
            raise UsageError("--top-k has thresholds by position alone; --by-modality goes with the other recipes")
        thresholds = fit.top_k(curves["fit"], plan, int(request.argument))
        thresholds[kept] = -torch.inf

        def reached(table, heads=slice(None)):
            return table and fit.evaluate_positions(table, plan, thresholds, quantile, heads)
    else:
        if request.recipe in CHOICES:
            choice = _choice(request, fitted, held_out, aim)
        else:
            choice = fit.max_dropped_mass(fitted, request.argument, quantile)
        choice[kept] = 0
        thresholds = fit.at_knots(fitted, plan, choice)
        if plan.modal:
            modalities = {
                name: fit.skip_by_modality(curves[role], request.gate, choice)
                for name, role in (("fitted", "fit"), ("held_out", "heldout"))
                if curves[role]
            }

        def reached(table, heads=slice(None)):
            return table and fit.evaluate(table, choice, quantile, heads)

    between = []
    if request.recipe == "top-k" and request.argument not in plan.ranks:
        for k in fit.neighbours(plan, int(request.argument)):
            at = fit.evaluate_positions(fitted, plan, fit.top_k(curves["fit"], plan, k), quantile)
            between.append((k, at.skip if at else 0.0))
    modules = []
    for path, heads in fitted.modules.items():
        finite = thresholds[heads][thresholds[heads].isfinite()]
        least, most = (float(finite.min()), float(finite.max())) if len(finite) else (None, None)
        octaves = [octave(tile) for tile in plan.knot_tiles]
        may_drop = (
            fitted.candidates[heads].unflatten(1, (-1, plan.octaves))[..., octaves].view_as(thresholds[heads]) > 0
        )
        kept_whole = float((~thresholds[heads].isfinite())[may_drop].double().mean()) if may_drop.any() else 1.0
        modules.append(ModuleReport(path, least, most, kept_whole, reached(fitted, heads), reached(held_out, heads)))
    point = Point(
        request.name, request.gate, request.recipe, request.argument, quantile, reached(fitted), reached(held_out)
    )
    kl = ()
    if request.recipe == "kl-skip":
        kl = tuple(table and fit.predicted_kl(table, choice, plan.tile.rows) for table in (fitted, held_out))
    return thresholds, Report(point, tuple(modules), modalities, tuple(between), dense, kl)


def layer_of(path: str) -> int | None:
    """The layer of a module's path: the last number in it."""
    numbers = [int(part) for part in path.split(".") if part.isdecimal()]
    return numbers[-1] if numbers else None


def _dense(request: Request, table: fit.Table) -> tuple[str, ...]:
    """The modules that keep every tile. Raises UsageError for layers that there are not, and for all of them."""
    if isinstance(request.dense, int):
        dense = _dearest(request, table, request.dense)
    else:
        layers = {layer_of(path) for path in table.modules}
        if request.dense - layers:
            raise UsageError(f"--keep-dense: the run has no layer {min(request.dense - layers)}")
        dense = tuple(path for path in table.modules if layer_of(path) in request.dense)
    if len(dense) >= len(table.modules):
        raise UsageError(f"--keep-dense would keep all {len(table.modules)} modules dense: nothing would be skipped")
    return dense


def _dearest(request: Request, table: fit.Table, count: int) -> tuple[str, ...]:
    """The modules in which a dropped tile costs most, by what the recipe goes by, at the skip rate asked for."""
    cost = {"effect-skip": table.effect, "kl-skip": table.kl}.get(request.recipe, table.mass)
    choice = _choice(request, table, None, FITTED)[..., None]

    def price(path: str) -> float:
        of, at = table.modules[path], choice[table.modules[path]]
        return float(cost[of].gather(-1, at).sum()) / max(1, int(table.dropped[of].gather(-1, at).sum()))

    dearest = set(sorted(table.modules, key=price, reverse=True)[:count])
    return tuple(path for path in table.modules if path in dearest)


def _choice(request: Request, fitted: fit.Table, held_out: fit.Table | None, aim: str) -> torch.Tensor:
    """The choice for a skip rate of the samples to aim at. Raises OutOfReach where it cannot be reached."""
    choose = CHOICES[request.recipe]
    choice = choose(fitted, request.argument)
    if aim == FITTED:
        return choice

    def skips(choice: torch.Tensor) -> bool:
        return fit.evaluate(held_out, choice, 1.0).skip >= request.argument

    if skips(choice):
        return choice
    below, above = request.argument, fitted.reach
    choice = choose(fitted, above)
    if not skips(choice):
        raise OutOfReach(
            f"held-out samples cannot skip {request.argument:g}: with the highest threshold they skip "
            f"{fit.evaluate(held_out, choice, 1.0).skip:.4f}"
        )
    while above - below > AIMED:
        middle = (below + above) / 2
        found = choose(fitted, middle)
        below, above, choice = (below, middle, found) if skips(found) else (middle, above, choice)
    return choice


def remarks(report: Report, lengths: Sequence[int]) -> list[str]:
    """What the user should know about a point fitted to samples of so many tokens, in sentences."""
    point, found = report.point, []
    if report.dense:
        found.append(f"{point.name} keeps every tile of {', '.join(report.dense)}")
    if report.kl:
        there = "" if len(report.kl) < 2 or report.kl[1] is None else f", {report.kl[1]:.2g} on held-out samples"
        found.append(
            f"{point.name} costs predictions about {report.kl[0]:.2g} nats a position by gradients{there}; verify "
            "measures it"
        )
    if report.between:
        ends = " and ".join(f"{skip:.1%} (top-k {k})" for k, skip in report.between)
        found.append(
            f"{point.name} was not collected: its thresholds lie between those of its neighbours, which skip {ends} of "
            "the fitted samples' tiles"
        )
    if point.fitted is None or point.fitted.skip == 0:
        found.append(f"{point.name} drops nothing at these lengths")
    if point.held_out is None:
        found.append(f"{point.name} is not checked: no sample was held out")
        return found
    if point.recipe == "max-dropped-mass" and point.held_out.dropped_mass_bound > point.argument * (1 + 1e-9):
        found.append(
            f"{point.name}: on held-out samples the bound at quantile {point.quantile:g} is "
            f"{point.held_out.dropped_mass_bound:.3g}, above the {point.argument:g} asked for"
        )
    if point.recipe in CHOICES and point.held_out.skip < point.argument - NEAR:
        short = point.argument - point.held_out.skip
        found.append(
            f"{point.name}: held-out samples skip {point.held_out.skip:.3f}, below the {point.argument:g} asked for"
        )
        enough = math.ceil(len(lengths) * short / NEAR)
        tokens = sum(lengths)
        found.append(
            f"{point.name}: fitted to {len(lengths)} texts, {tokens:,} tokens; about {enough} such texts, "
            f"{tokens // len(lengths) * enough:,} tokens, bring it within {NEAR:g}, and --aim held-out reaches it now"
        )
    return found


def score_remarks(run: Run, artifact: Thresholds) -> list[str]:
    """What the user should know about the scores of the points, in sentences."""
    point, made_for = artifact.points[0], run.plan.scores
    if point.scores == made_for == "exact":
        return []
    if point.scores != made_for:
        return [
            f"points run {point.scores} scores, with thresholds made for {made_for} ones: bsfa verify says what changes"
        ]
    kept, heads = sum(map(len, point.exact_heads.values())), sum(x.shape[1] for x in artifact.tensors.values())
    if not kept:
        return [f"points run int8 scores in all {heads} heads"]
    return [f"points run int8 scores; {kept} of {heads} heads stay exact, and those that share their KV heads"]
