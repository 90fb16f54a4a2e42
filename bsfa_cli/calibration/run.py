"""Calibrate: one dense forward pass per sample, its curves added to the run directory after each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.dropping import SCORES_AT_ONCE
from bsfa_kernels.integrations.transformers import AttentionModule, attach, attention_modules
from bsfa_kernels.integrations.visual_tokens import VisualTokens
from bsfa_kernels.modality import MODALITIES

from .. import environment
from ..console import console, duration, note, progress
from ..data.texts import Sample, data_hash, is_generated
from ..environment import free_memory
from ..errors import InputError, MachineError, UsageError
from ..metrics.logits import LOGITS_PER_CHUNK, Head
from ..models.load import LoadedModel, explain_memory
from ..models.prompts import Prompt
from ..options import parse_layers
from . import divergence, together
from .collector import Collector
from .curves import TILES_AT_ONCE, ModuleCurves, Plan, int8_errors, int8_score_errors
from .group import Group
from .store import ROLES, SCHEMA, Run

HELD_OUT_EVERY = 4
TOWER = "it belongs to a vision tower (bsfa calibrate --include-vision)"
PROGRAMS = 160  # of attention's backward pass that run at once: the multiprocessors of the largest GPUs
# The k of the top-k recipe that a run collects, and the share of a row's tiles that the largest may be. Those between
# two of them come from both.
RANKS, LARGEST_RANK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128), 3 / 4


@dataclass(frozen=True)
class Options:
    """What defines a run besides model and data; a change of any but more `samples` refuses to resume."""

    data: str
    samples: int
    length: int
    seed: int
    tile: tuple[int, int]
    top_k: tuple[int, ...]
    layers: str | None
    device: str  # its type: rounding differs between CPU and GPU
    dtype: str
    scores: str = "exact"
    gradients: bool = False


def default_ranks(longest: int, keys: int) -> tuple[int, ...]:
    """Those of RANKS that drop tiles of `keys` keys in the longest sample."""
    most = max(1, int(LARGEST_RANK * -(-longest // keys)))
    return tuple(k for k in RANKS if k <= most)


def roles(lengths: Sequence[int]) -> list[str]:
    """fit or heldout for each sample: every fourth is held out, at least one of two; the first longest is fitted."""
    count = len(lengths)
    held_out = set(range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY)) or ({count - 1} if count > 1 else set())
    longest = lengths.index(max(lengths))
    if longest in held_out and all(lengths[i] < lengths[longest] for i in range(count) if i not in held_out):
        held_out.remove(longest)
        held_out.add(next(i for i in range(count - 1, -1, -1) if i != longest and i not in held_out))
    return ["heldout" if i in held_out else "fit" for i in range(count)]


def chosen_modules(
    model, layers: str | None, plain: bool = False, towers: bool = False
) -> tuple[dict[str, AttentionModule], dict[str, str]]:
    """(modules to calibrate, {path of a dense one: why}). `layers` such as "0-3,8" picks by layer index, `towers` takes
    those of a vision tower too; `plain` leaves out modules with a window, softcap or attention sinks.

    Raises UsageError for layers that do not exist, InputError where no module may skip tiles.
    """
    modules = attention_modules(model)
    if layers is not None:
        wanted = parse_layers(layers)
        known = {module.layer for module in modules.values() if module.layer is not None}
        if wanted - known:
            raise UsageError(
                f"--layers {layers}: the model has no layer {min(wanted - known)}; it has {min(known)} to {max(known)}"
            )
        modules = {
            path: module for path, module in modules.items() if (towers if module.tower else module.layer in wanted)
        }
    reasons = {
        path: module.dense_reason or (module.tower and not towers and TOWER) or (plain and module.scoring)
        for path, module in modules.items()
    }
    dense = {path: reason for path, reason in reasons.items() if reason}
    able = {path: module for path, module in modules.items() if path not in dense}
    if not able:
        raise InputError(f"no attention module of this model may skip tiles: {'; '.join(sorted(set(dense.values())))}")
    return able, dense


def manifest(loaded: LoadedModel, samples: list[Sample], modules: dict[str, AttentionModule], options: Options) -> dict:
    """run.json of this calibration."""
    software = environment.describe()
    planned = zip(samples, roles([len(sample.tokens) for sample in samples]), strict=True)
    return {
        "schema": SCHEMA,
        "model": loaded.identity,
        "data": {
            "hash": data_hash(samples),
            "spec": options.data,
            "generated": is_generated(options.data),
            "modalities": list(MODALITIES) if has_images(samples) and not options.gradients else None,
        },  # fmt: skip
        # A run of exact scores is as runs were before there were others.
        "options": {key: value for key, value in asdict(options).items() if (key, value) != ("scores", "exact")},
        "modules": {path: module.query_heads for path, module in modules.items()},
        "samples": [
            {"id": sample.id, "tokens": len(sample.tokens), "role": role, "source": sample.source}
            for sample, role in planned
        ],
        "software": {key: software[key] for key in ("bsfa", "torch", "transformers", "triton")},
    }


def check_towers(modules: dict[str, AttentionModule], samples: list[Sample]) -> None:
    """Raise UsageError where a vision tower was asked for and there is none, or nothing for it to see."""
    if not any(module.tower for module in modules.values()):
        raise UsageError("--include-vision: this model has no vision tower that attends through bsfa")
    if not has_images(samples):
        raise UsageError("--include-vision needs samples with images")


def has_images(samples: list[Sample]) -> bool:
    return any(sample.extra for sample in samples)


def memory(loaded: LoadedModel, modules: dict[str, AttentionModule], plan: Plan) -> dict[str, int]:
    """Bytes by purpose: upper bounds for the curves, an estimate for the forward pass."""
    heads = sum(module.query_heads for module in modules.values())
    widest = max(module.query_heads for module in modules.values())
    tiles = plan.query_tiles * -(-plan.longest // plan.tile.keys)
    config = loaded.model.config.get_text_config()
    width = 8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    found = {
        "weights": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "forward pass": plan.longest * width * next(loaded.model.parameters()).element_size(),
        "tile statistics of one module": 16 * widest * tiles + 96 * min(widest * tiles, max(TILES_AT_ONCE, tiles)),
        "curves in memory": len(ROLES) * heads * plan.bytes_per_head(),
        "files on disk": len(ROLES) * heads * plan.bytes_per_head(),
    }
    if plan.gradients:
        found["backward pass"] = _backward_bytes(loaded, list(modules.values()), plan, width)
    return found


def _backward_bytes(loaded: LoadedModel, modules: list[AttentionModule], plan: Plan, width: int) -> int:
    """What comes into every layer is kept, and one layer at a time, of `width` numbers a token, is computed again."""
    config, size = loaded.model.config.get_text_config(), next(loaded.model.parameters()).element_size()
    layers = plan.longest * (config.num_hidden_layers * config.hidden_size + 2 * width) * size
    logits = 24 * max(SCORES_AT_ONCE, min(LOGITS_PER_CHUNK, plan.longest * config.vocab_size))
    # To add up in the same order each time, attention keeps every program's part of Q's gradient.
    parts = 4 * plan.longest * max((PROGRAMS + module.query_heads) * module.head_dim for module in modules)
    # Where no library has a kernel, all weights are kept.
    explicit = 5 * plan.longest**2 * max(0 if module.plain else module.query_heads for module in modules)
    return layers + logits + parts + explicit


def check_memory(needs: dict[str, int], device: torch.device, processes: int = 1) -> None:
    """Raise MachineError when a sample cannot fit in what the device has free. Weights are there already. Processes
    share the memory of the host, and each has a GPU of its own.
    """
    passes = max(needs["forward pass"], needs.get("backward pass", 0))
    need = passes + needs["tile statistics of one module"] + needs["curves in memory"]
    need *= processes if device.type == "cpu" else 1
    free = free_memory(device)
    if free is not None and need > free:
        raise MachineError(
            f"the longest sample needs about {need / 2**30:.1f} GiB beside the weights and {free / 2**30:.1f} GiB are "
            "free; lower --length"
        )


def calibrate(
    loaded: LoadedModel,
    samples: list[Sample],
    modules: dict[str, AttentionModule],
    options: Options,
    path: Path,
    group: Group | None = None,
) -> dict:
    """Collect what is missing of the run at `path`, with the other processes of `group`; returns a summary for --json.

    Raises UsageError where `path` holds another run, MachineError when memory or disk run out, InputError when the
    model's output is not finite. KeyboardInterrupt passes through, after a note that says how to resume.
    """
    wanted = manifest(loaded, samples, modules, options)
    begun = partial(Run.begin, path, wanted, lambda count: data_hash(samples[:count]))
    if group is None:
        run = begun()
        seconds = _alone(run, loaded, samples, modules)
    else:
        run, lock = together.join(path, wanted, group, begun)
        with lock:
            seconds = _together(run, loaded, samples, modules, group)
    errors = run.load("fit")[1] if options.scores == "int8" else {}
    return {
        "run": str(path),
        "samples": {role: run.merged(role) for role in ROLES},
        "tokens": sum(len(sample.tokens) for sample in samples),
        "seconds": seconds,
        "modules": len(modules),
        "data_hash": run.manifest["data"]["hash"],
        "int8_error": int8_errors(errors) or None,
        "int8_score_error": int8_score_errors(errors) or None,
        "bytes": {f"{role}.safetensors": _size(path / f"{role}.safetensors") for role in ROLES},
    }


def _alone(run: Run, loaded, samples: list[Sample], modules: dict[str, AttentionModule]) -> dict[str, float]:
    """Run the samples that are not done, in this process; returns {sample id: seconds of its forward pass}."""
    with run.lock():
        run.tidy()
        run.merge()
        plan, device = run.plan, next(loaded.model.parameters()).device
        curves, done = {}, {}
        for role in ROLES:
            done[role], stored = run.load(role)
            curves[role] = {name: ModuleCurves(plan, module.query_heads, device) for name, module in modules.items()}
            for name, tensors in stored.items():
                curves[role][name].load(tensors)
        together.note_resumed(run)
        try:
            return _collect(loaded, samples, run, curves, done, device)
        except Exception:
            if not run.finished():
                run.discard()
            raise


def _together(run: Run, loaded, samples: list[Sample], modules, group: Group) -> dict[str, float]:
    """As `_alone`, with the other processes of the group."""
    device = next(loaded.model.parameters()).device

    head = _head(loaded.model, run.plan)

    def run_one(sample: Sample, curves: dict[str, ModuleCurves]) -> None:
        with explain_memory(_smaller(head)):
            forward(loaded.model, sample, curves, device)
            if head is not None:
                divergence.backward(loaded.model, sample, curves, head)

    def warm_up(curves: dict[str, ModuleCurves]) -> None:
        _warm_up(loaded.model, samples[0], run.plan, curves, device, head)

    return together.collect(run, group, samples, modules, device, run_one, warm_up)


def _collect(loaded, samples, run: Run, curves, done, device) -> dict[str, float]:
    """Run the samples that are not done; returns {sample id: seconds of its forward pass}."""
    by_id = {planned["id"]: planned["role"] for planned in run.manifest["samples"]}
    finished = {*done["fit"], *done["heldout"]}
    seconds: dict[str, float] = {}
    if len(finished) < len(samples):
        head = _head(loaded.model, run.plan)
        _warm_up(loaded.model, samples[0], run.plan, curves["fit"], device, head)
    bar = progress()
    with bar:
        task = bar.add_task("calibrating", total=len(samples), completed=len(finished))
        for sample in samples:
            if sample.id in finished:
                continue
            role = by_id[sample.id]
            try:
                stored = run.load_sample(sample.id)  # by one of several processes, before an earlier one was done
                started = time.perf_counter()
                if stored is None:
                    with explain_memory(_smaller(head)):
                        forward(loaded.model, sample, curves[role], device)
                        if head is not None:
                            divergence.backward(loaded.model, sample, curves[role], head)
                    seconds[sample.id] = time.perf_counter() - started
                else:
                    for path, tensors in stored.items():
                        curves[role][path].merge(tensors)
                done[role].append(sample.id)
                run.save(role, done[role], {path: module.tensors for path, module in curves[role].items()})
                run.forget_sample(sample.id)
            except KeyboardInterrupt:
                count = len(run.finished())
                note(f"stopped with {count} of {len(samples)} samples done; the same command resumes {run.path}")
                raise
            bar.advance(task)
            if stored is None and not console().is_terminal:
                left = sum(seconds.values()) / len(seconds) * (len(samples) - len(finished) - len(seconds))
                note(
                    f"{sample.id}: {len(sample.tokens):,} tokens, {role}, {seconds[sample.id]:.1f} s"
                    + (f"; about {duration(left)} left" if left else "")
                )
    return seconds


@torch.no_grad()
def _head(model, plan: Plan) -> Head | None:
    """What gradients begin at; None for a run without them."""
    return Head(model) if plan.gradients else None


def _smaller(head: Head | None) -> str:
    """What to lower where memory runs out."""
    return "--length" if head is None else "--length, or begin another run with --no-gradients"


def _warm_up(
    model, sample: Sample, plan: Plan, curves: dict[str, ModuleCurves], device: torch.device, head: Head | None
) -> None:  # fmt: skip
    """Compile the GPU's kernels on a few tiles of a sample, so that no sample's seconds hold it."""
    if device.type == "cuda":
        path, module = next((path, module) for path, module in curves.items())
        text, unused = short_text(model, sample, plan.tile), {path: ModuleCurves(plan, module.heads, device)}
        forward(model, text, unused, device)
        if head is not None:
            divergence.backward(model, text, unused, head)


def short_text(model, sample: Sample, tile: TileShape) -> Sample:
    """A few tiles of the words of `sample`."""
    visual = Prompt.of(sample, model).visual
    words = [token for i, token in enumerate(sample.tokens) if visual is None or not visual[i]]
    length = 4 * max(tile.rows, tile.keys)
    return replace(sample, tokens=tuple((words * length)[:length]), extra=None)


@torch.inference_mode()
def forward(model, sample: Sample, curves: dict[str, ModuleCurves], device: torch.device) -> None:
    """One dense prefill of the model without its output head, collecting into `curves`."""
    modules, visual = attention_modules(model), VisualTokens()
    collectors = {
        path: Collector(module, visual=visual, tower=True)
        if modules[path].tower
        else Collector(module, model.get_submodule(path), model.get_submodule(path.rpartition(".")[0]), visual)
        for path, module in curves.items()
    }
    with ExitStack() as stack:
        for collector in collectors.values():
            stack.enter_context(collector)
        stack.enter_context(attach(model, collectors))
        hidden = model.base_model(**Prompt.of(sample, model).inputs, use_cache=False).last_hidden_state
    if not bool(hidden.isfinite().all()):
        raise InputError(
            f"the model's output is not finite on sample {sample.id}, although its weights are ({hidden.dtype})"
            + ("; try --dtype float32 or bfloat16" if hidden.dtype == torch.float16 else "")
        )


def plan_of(samples: list[Sample], options: Options) -> Plan:
    """What the run would count, before it begins."""
    longest = max(len(sample.tokens) for sample in samples)
    modal = has_images(samples) and not options.gradients
    return Plan(TileShape(*options.tile), longest, options.top_k, options.scores, options.gradients, modal)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
