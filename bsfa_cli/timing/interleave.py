"""Interleaved measurement: contenders take turns, so that clocks, heat and neighbours hit all of them alike.

Each round runs every contender once, in an order shuffled anew. On a GPU a call is timed between two CUDA events
after writes larger than the L2 cache and, unless it is a whole prefill, once the host has launched it (lead.py); on a
CPU by perf_counter.
Compilation and the first calls are outside the samples.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import said
from .lead import Lead

FLUSH_BYTES = 256 * 2**20
FLUSHES = 8  # writes before each timed call: some 0.5 ms on an H200, alike for short calls and long ones
WARM_UP = 2
LONG_MS = 500.0  # a round that takes longer is warm-up enough by itself


@dataclass(frozen=True)
class Contender:
    """Something to time: `call` starts the work once and returns its output; `prepare` runs untimed before it.

    `ahead`: the host launches the call before its clock starts. Not for a whole prefill, whose launches are part of
    what a user waits for; it begins on an idle device.
    """

    name: str
    call: Callable[[], torch.Tensor]
    prepare: Callable[[], None] | None = None
    ahead: bool = True


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender, in the order they were measured."""

    samples_ms: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples_ms)

    def quantile(self, share: float) -> float:
        """Linear between samples; `share` in 0..1."""
        ordered = sorted(self.samples_ms)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    def as_dict(self) -> dict:
        return {
            "ms_median": self.median,
            "ms_p20": self.quantile(0.2),
            "ms_p80": self.quantile(0.8),
            "samples_ms": [round(sample, 6) for sample in self.samples_ms],
        }


def first_call(call: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor | None, str | None]:
    """(output, None), or (None, the reason) when the call fails. Whatever it compiles is compiled here."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            out = call()
            synchronize(device)
            return out, None
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:  # noqa: BLE001 - a baseline may fail in any way; the reason goes into the result
            notes = [str(w.message).splitlines()[0] for w in warned if issubclass(w.category, UserWarning)]
            reason = "; ".join(dict.fromkeys([said(error), *notes]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None, reason


# Told of the number of steps and what they are, gives what is called after each, with how many (1).
Begin = Callable[[int, str], Callable[[int], None]]


def unseen(total: int, what: str) -> Callable[[int], None]:
    """The Begin that shows nothing."""
    return lambda count=1: None


def measure(
    contenders: list[Contender], device: torch.device, *, seconds: float, at_least: int = 5, at_most: int = 100, seed=0,
    begin: Begin = unseen,
) -> dict[str, Timing]:  # fmt: skip
    """{contender name: Timing}; as many rounds as fit into `seconds` of device time, within the two limits."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device.type == "cuda" else None
    order, leads = list(contenders), {contender.name: Lead() for contender in contenders}
    shuffle = random.Random(seed).shuffle
    step = begin(len(order), "warm-up")
    for _ in range(WARM_UP):
        spent = sum(_round(order, leads, device, flush, step).values())
        if spent > LONG_MS:
            break
        step = unseen(0, "")
    rounds = min(at_most, max(at_least, int(seconds * 1e3 / max(spent, 1e-3))))
    samples = {contender.name: [] for contender in contenders}
    step = begin(rounds * len(order), "timing")
    for _ in range(rounds):
        shuffle(order)
        for name, ms in _round(order, leads, device, flush, step).items():
            samples[name].append(ms)
    return {name: Timing(values) for name, values in samples.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _round(
    order: list[Contender], leads: dict[str, Lead], device: torch.device, flush: torch.Tensor | None,
    step: Callable[[int], None],
) -> dict[str, float]:  # fmt: skip
    if flush is None:
        times = {}
        for contender in order:
            if contender.prepare:
                contender.prepare()
            start = time.perf_counter()
            contender.call()
            times[contender.name] = (time.perf_counter() - start) * 1e3
            step(1)
        return times
    events = {}
    for contender in order:
        if contender.prepare:
            contender.prepare()
        if not contender.ahead:
            torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(FLUSHES):
            flush.zero_()
        lead = leads[contender.name]
        if contender.ahead:
            lead.hold(device)
        start.record()
        with lead.launching():
            contender.call()
        end.record()
        events[contender.name] = (start, end)
    torch.cuda.synchronize(device)
    step(len(order))
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}
