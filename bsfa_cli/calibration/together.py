"""Calibrate with several processes: each takes the next sample that nobody has, and stores its curves by themselves.

Whoever finds that all samples before it are there merges them, in their order, into the files that one process would
have written: the run ends in the same bytes, however many processes it had and whichever of them were lost. What a lost
process was at, another one does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from bsfa_kernels.container import difference

from ..console import note
from ..errors import InputError
from .claims import MERGING, Claims
from .curves import ModuleCurves
from .group import Group
from .store import Run

POLL_SECONDS = 0.2


def join(path: Path, wanted: Mapping, group: Group, begin: Callable[[], Run]) -> tuple[Run, IO]:
    """(the run, its lock), begun by the first process of the group and held by all of them.

    Raises InputError where this process would run something else than the first.
    """
    locks = []

    def make() -> None:
        run = begin()
        with run.lock():  # against other groups and processes
            run.tidy()
            run.merge()
        locks.append(run.lock(shared=True))
        note_resumed(run)

    group.begin(make)
    run = Run.open(path)
    ours = json.loads(json.dumps({"model": wanted["model"], "samples": wanted["samples"]}))
    found = difference("run", {key: run.manifest[key] for key in ours}, ours)
    if found:
        raise InputError(f"process {group.rank + 1} does not see what the first one does: {found}")
    return run, locks[0] if locks else run.lock(shared=True)


def note_resumed(run: Run) -> None:
    finished = len(run.finished())
    if finished:
        note(f"resuming {run.path}: {finished} of {len(run.manifest['samples'])} samples are done")


def collect(run: Run, group: Group, samples: list, modules: dict, device, forward, warm_up) -> dict[str, float]:
    """Work until every sample of `run` is merged; returns {sample id: seconds} of those that this group ran.

    `forward(sample, curves)` adds a sample to {module path: ModuleCurves}, after `warm_up(curves)` once.
    """
    claims, warm = Claims(run.path), False
    try:
        while missing := _missing(run, samples):
            index = next((i for i in missing if claims.take(1 + i)), None)
            if index is None:  # others are at what is left; should they be lost, it is taken up here
                time.sleep(POLL_SECONDS)
                continue
            if index in _missing(run, samples):  # nobody finished it in the meantime
                curves = {path: ModuleCurves(run.plan, module.query_heads, device) for path, module in modules.items()}
                if not warm:
                    warm_up(curves)
                    warm = True
                _one(run, group, samples, index, curves, forward)
            claims.give_back(1 + index)
            if claims.take(MERGING):
                run.merge()
                claims.give_back(MERGING)
        claims.take(MERGING, wait=True)
        run.merge()
    except KeyboardInterrupt:
        if group.first:
            done = len(samples) - len(_missing(run, samples))
            note(f"stopped with {done} of {len(samples)} samples done; the same command resumes {run.path}")
        raise
    finally:
        claims.close()
    run.tidy()
    return group.told([sample.id for sample in samples]) if group.first else {}


def _one(run: Run, group: Group, samples: list, index: int, curves, forward) -> None:
    sample, started = samples[index], time.perf_counter()
    forward(sample, curves)
    seconds = time.perf_counter() - started
    group.tell(sample.id, seconds)
    run.save_sample(index, {path: module.tensors for path, module in curves.items()})
    done = len(samples) - len(_missing(run, samples))
    note(
        f"{sample.id}: {len(sample.tokens):,} tokens, {seconds:.1f} s by process {group.rank + 1} of {group.size}; "
        f"{done} of {len(samples)} done"
    )


def _missing(run: Run, samples: list) -> list[int]:
    finished = run.finished()
    return [i for i, sample in enumerate(samples) if sample.id not in finished]
