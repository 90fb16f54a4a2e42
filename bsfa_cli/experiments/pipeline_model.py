"""python -m bsfa_cli.experiments.pipeline_model [--keep 1,0.5,0.25,0.1] [--set "k_stages=4 v_stages=4"] [NAME ...]

One multiprocessor running the Hopper kernel, as a model: what a change of its slots, or of a consumer's chain, is worth
before it is written. No GPU is asked. It prints how much of the time the tensor pipe is busy, without a gate and where
a gate keeps a share of the tiles, at random; kernels/NOTES.md ("What the power limit leaves") has that beside what was
measured. NAME: of SHAPES. --set replaces fields of Chain.

A consumer's chain (hopper_pipeline.py): wait for K, QK^T, give K back, maximum, vote and, of a tile that is kept, wait
for V, exponentials in parts with each part's product behind the next part's exponentials, give V back. All consumers'
products share the tensor pipe and their arithmetic one unit, each use of which has a share of it that it can take by
itself. Slabs are loaded in order, one behind the other at `bandwidth`, `latency` cycles after their slot is free.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

from bsfa_kernels import hopper

from ..errors import UsageError
from . import end

EPSILON = 1e-6


@dataclass(frozen=True)
class Chain:
    """Cycles of a consumer's tile of 64 x 128 and what holds it up; those of arithmetic are fitted, all at one time, to
    the three shapes that ncu saw (81473fd).
    """

    consumers: int
    qk: float  # of the tensor pipe
    pv: float
    slabs: int  # of K's tile
    k_stages: int
    k_bytes: int  # of a slab
    v_slabs: int
    v_stages: int
    v_bytes: int
    parts: int
    early: bool = False  # V and the next K are awaited behind QK^T's start
    slab_by_slab: bool = True  # K's slots go back as soon as their own products are done
    loop: float = 120
    maximum: float = 300
    vote: float = 150  # of a gate
    rescale: float = 250
    exponentials: float = 600
    rest: float = 40
    latency: float = 1000
    bandwidth: float = 55  # bytes a cycle
    first_come: float = 0.3  # share of the tensor pipe that who came first has for itself; all share the rest


SET_HELP = 'such as "k_stages=6 slabs=4"; may be given again'
CYCLES_OF_BYTE = 2  # of the tensor pipe: 64 x 128 sums of products of 32 bytes take 64


def chain_of(shape: hopper.Shape, itemsize: int = 2, **cycles: float) -> Chain:
    """What the kernel does with heads of a shape, Q and K of so many bytes an element."""
    keys = hopper.KEYS.value
    columns, v_columns = shape.columns * shape.slabs, shape.v_columns * shape.v_slabs
    return Chain(
        shape.consumers, CYCLES_OF_BYTE * columns * itemsize, CYCLES_OF_BYTE * v_columns * 2, shape.slabs,
        shape.k_stages, keys * shape.columns * itemsize, shape.v_parts, shape.v_stages,
        keys // shape.v_parts * v_columns * 2, shape.parts, early=shape.early, **cycles,
    )  # fmt: skip


SHAPES = {
    "d128": chain_of(hopper.SHAPES[128, 128]),
    "d128-int8": chain_of(hopper.INT8_SHAPES[128, 128], 1, maximum=360, exponentials=690),
    "mla": chain_of(hopper.SHAPES[192, 128]),
    "d192": chain_of(hopper.SHAPES[192, 192]),
    "d256": chain_of(hopper.SHAPES[256, 256]),
}
ALONE = {"maximum": 0.5, "rescale": 0.5, "exponentials": 0.9}  # share of the arithmetic that one warpgroup can use
JITTER = 0.1  # of arithmetic, so that consumers do not stay in step for ever


class Clock:
    """Processes are generators that yield cycles to sleep, or the name of what they wait for, once for all."""

    def __init__(self):
        self.now, self._queue, self._number = 0.0, [], 0
        self._waiting, self._happened = defaultdict(list), set()

    def after(self, cycles: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._queue, (self.now + cycles, self._number, act))

    def happen(self, name) -> None:
        if name not in self._happened:
            self._happened.add(name)
            for process in self._waiting.pop(name, ()):
                self.after(0, lambda process=process: self.resume(process))

    def resume(self, process: Iterator) -> None:
        for wanted in process:
            if isinstance(wanted, (int, float)):
                self.after(wanted, lambda: self.resume(process))
                return
            if wanted not in self._happened:
                self._waiting[wanted].append(process)
                return

    def run(self) -> float:
        while self._queue:
            self.now, _, act = heapq.heappop(self._queue)
            act()
        if self._waiting:
            raise RuntimeError(f"the model hangs: somebody waits for {next(iter(self._waiting))}")
        return self.now


class Unit:
    """What jobs share: `rates(jobs)` says how fast each of them, in the order they came, runs at the moment."""

    def __init__(self, clock: Clock, rates: Callable[[list], list[float]]):
        self.clock, self.rates, self.jobs, self._since, self._version = clock, rates, [], 0.0, 0

    def start(self, work: float, done, share: float = 1.0) -> None:
        self._advance()
        self.jobs.append([work, share, done])
        self._plan()

    def _advance(self) -> None:
        for job, rate in zip(self.jobs, self.rates(self.jobs), strict=True):
            job[0] -= (self.clock.now - self._since) * rate
        self._since = self.clock.now

    def _plan(self) -> None:
        self._version += 1
        version = self._version
        if self.jobs:
            soonest = min(max(job[0], 0) / rate for job, rate in zip(self.jobs, self.rates(self.jobs), strict=True))
            self.clock.after(soonest, lambda: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        for job in [job for job in self.jobs if job[0] <= EPSILON]:
            self.jobs.remove(job)
            self.clock.happen(job[2])
        self._plan()


def _arithmetic_rates(jobs: list) -> list[float]:
    return [1 / max(1.0, sum(job[1] for job in jobs))] * len(jobs)


class Multiprocessor:
    def __init__(self, chain: Chain, keep: float | None, tiles: int, seed: int):
        self.chain, self.gated, self.tiles = chain, keep is not None, tiles
        self.random, self.clock = random.Random(seed), Clock()
        self.kept = [
            [self.random.random() < (1 if keep is None else keep) for _ in range(tiles)] for _ in range(chain.consumers)
        ]
        self.tensor = Unit(self.clock, self._tensor_rates)
        self.arithmetic = Unit(self.clock, _arithmetic_rates)
        self._returned, self._loading = defaultdict(int), 0.0

    def _tensor_rates(self, jobs: list) -> list[float]:
        """Products of one consumer, whose number is its jobs' share, run one after the other."""
        first = {}
        for i, job in enumerate(jobs):
            first.setdefault(job[1], i)
        own, rest = self.chain.first_come, (1 - self.chain.first_come) / max(len(first), 1)
        return [(rest + (own if i == 0 else 0) if first[job[1]] == i else EPSILON**2) for i, job in enumerate(jobs)]

    def busy(self) -> float:
        """Share of the time that the tensor pipe works."""
        chain = self.chain
        for consumer in range(chain.consumers):
            self.clock.resume(self._consume(consumer))
        self.clock.resume(self._produce())
        work = sum(chain.qk * self.tiles + chain.pv * sum(kept) for kept in self.kept)
        return work / self.clock.run()

    def _produce(self) -> Iterator:
        chain = self.chain
        for i in range(self.tiles):
            for ring, pieces, stages, size in (
                ("k", chain.slabs, chain.k_stages, chain.k_bytes), ("v", chain.v_slabs, chain.v_stages, chain.v_bytes)
            ):  # fmt: skip
                for piece in range(i * pieces, (i + 1) * pieces):
                    if piece >= stages:
                        yield "returned", ring, piece - stages
                    self._loading = max(self.clock.now, self._loading) + size / chain.bandwidth
                    landed = self._loading - self.clock.now + chain.latency
                    self.clock.after(landed, lambda name=("full", ring, piece): self.clock.happen(name))

    def _give_back(self, ring: str, piece: int) -> None:
        self._returned[ring, piece] += 1
        if self._returned[ring, piece] == self.chain.consumers:
            self.clock.happen(("returned", ring, piece))

    def _compute(self, kind: str, share_of_it: float, name):
        cycles = getattr(self.chain, kind) * share_of_it * (1 + JITTER * (2 * self.random.random() - 1))
        self.arithmetic.start(cycles, name, ALONE[kind])
        return name

    def _consume(self, own: int) -> Iterator:
        chain = self.chain

        def full(ring: str, i: int, pieces: int):
            return [("full", ring, piece) for piece in range(i * pieces, (i + 1) * pieces)]

        yield own * 200.0
        for i in range(self.tiles):
            yield chain.loop
            if not chain.early or i == 0:
                yield from full("k", i, chain.slabs)
            for slab in range(chain.slabs):
                self.tensor.start(chain.qk / chain.slabs, ("scores", own, i, slab), own)
            if chain.early:
                yield from full("v", i, chain.v_slabs)
                if i + 1 < self.tiles:
                    yield from full("k", i + 1, chain.slabs)
            for slab in range(chain.slabs):
                yield "scores", own, i, slab if chain.slab_by_slab else chain.slabs - 1
                self._give_back("k", i * chain.slabs + slab)
            yield self._compute("maximum", 1, ("maximum", own, i))
            if self.gated:
                yield chain.vote
            if not self.kept[own][i]:
                yield from full("v", i, chain.v_slabs)
            else:
                yield self._compute("rescale", 1, ("rescale", own, i))
                yield from full("v", i, chain.v_slabs)
                for part in range(chain.parts):
                    yield self._compute("exponentials", 1 / chain.parts, ("exponentials", own, i, part))
                    self.tensor.start(chain.pv / chain.parts, ("product", own, i, part), own)
                yield "product", own, i, chain.parts - 1
                yield chain.rest
            for part in range(chain.v_slabs):
                self._give_back("v", i * chain.v_slabs + part)


def busy(chain: Chain, keep: float | None, tiles: int = 400, seeds: int = 2) -> float:
    """Share of the time that the tensor pipe works, `keep` of the tiles kept; None without a gate."""
    return sum(Multiprocessor(chain, keep, tiles, seed).busy() for seed in range(seeds)) / seeds


def changed(chain: Chain, text: str) -> Chain:
    """`chain` with "name=value name=value" in place. Raises UsageError for what is no field, or no such value."""
    kinds = {field.name: type(getattr(chain, field.name)) for field in fields(Chain)}
    given = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in kinds:
            raise UsageError(f"--set knows {', '.join(kinds)}, got {word!r}")
        if name in given:
            raise UsageError(f"--set gives {name} more than once")
        try:
            given[name] = {"True": True, "False": False}[value] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError):
            raise UsageError(f"--set {name} takes a value like {getattr(chain, name)}, got {value!r}") from None
    chain = replace(chain, **given)
    room = chain.k_stages >= chain.slabs * (1 + chain.early) and chain.v_stages >= chain.v_slabs
    if not room or min(chain.slabs, chain.v_slabs, chain.parts, chain.consumers) < 1 or chain.bandwidth <= 0:
        raise UsageError("--set: K's slots must hold a tile of slabs, two where it is awaited early, V's a tile")
    return chain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--keep", default="1,0.5,0.25,0.1", help="shares of the tiles that a gate keeps")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="FIELDS", help=SET_HELP)
    options = parser.parse_args()
    if unknown := set(options.shapes) - SHAPES.keys():
        raise UsageError(f"NAME must be of {', '.join(SHAPES)}, got {sorted(unknown)[0]}")
    try:
        keeps = [float(text) for text in options.keep.split(",")]
    except ValueError:
        keeps = [-1.0]
    if not all(0 <= keep <= 1 for keep in keeps):
        raise UsageError(f"--keep takes numbers from 0 to 1 with commas between them, got {options.keep!r}")
    titles = ("no gate", *(f"{keep:.0%} kept" for keep in keeps))
    print(f"{'tensor pipe busy, %':20}" + "".join(f"{title:>11}" for title in titles))
    for name in options.shapes or SHAPES:
        chain = changed(SHAPES[name], " ".join(options.changes))
        print(f"{name:20}" + "".join(f"{100 * busy(chain, keep):11.1f}" for keep in (None, *keeps)), flush=True)
    return 0


if __name__ == "__main__":
    end("pipeline_model", main)
