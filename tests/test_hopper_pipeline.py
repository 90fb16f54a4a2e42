"""The order in which the Hopper kernel's producer and consumers wait for each other, as a model that is played through:
it comes to an end, nobody reads what has not landed or is overwritten, and barriers end as they began.
"""

import random
from collections import Counter
from dataclasses import replace

import pytest
from bsfa_kernels import hopper, quantise

ALL = [*hopper.SHAPES.values(), *hopper.INT8_SHAPES.values()]


def variant(shape: hopper.Shape, gate: bool):
    return hopper.variant_of(shape, 8, 32, 4, shape.v_columns, True, True, False, gate, *[False] * 9)


class Program:
    """One program on a stream of `tiles`, turns and landings in an order drawn by `seed`. A consumer lets tiles pass
    that are in its part of `passed`, as with block lists.

    Slots are (ring, number). Everyone is a generator that yields what it waits for: a function that says whether it is
    there.
    """

    def __init__(self, v, early: bool, late: bool, tiles: int, passed: list[set[int]], seed: int):
        self.early, self.late, self.tiles, self.passed = early, late, tiles, passed
        self.pieces = {"k": v.slabs, "v": v.v_parts}
        self.stages = {"k": v.k_stages, "v": v.v_stages}
        self.consumers, self.random = v.consumers, random.Random(seed)
        self.in_flight, self.holds, self.landed = [], {}, Counter()  # landed: times a slot was filled
        self.arrived = {}  # who has arrived at a slot's hardware barrier

    def ends(self) -> bool:
        """Whether everyone comes to the end."""
        people = [self.producer(), *map(self.consumer, range(self.consumers))]
        waits = {person: next(person, None) for person in people}
        while True:
            ready = [person for person, ask in waits.items() if ask is not None and ask()]
            if self.in_flight and (not ready or self.random.random() < 0.3):
                ring, piece = self.in_flight.pop(self.random.randrange(len(self.in_flight)))
                self.landed[self.slot(ring, piece)] += 1
                self.holds[self.slot(ring, piece)] = piece
            elif ready:
                person = self.random.choice(ready)
                waits[person] = next(person, None)
            else:
                return not any(waits.values()) and not any(self.arrived.values())

    def slot(self, ring: str, piece: int) -> tuple[str, int]:
        return ring, piece % self.stages[ring]

    def of_tile(self, ring: str, i: int) -> range:
        return range(i * self.pieces[ring], (i + 1) * self.pieces[ring])

    def full(self, ring: str, piece: int):
        """Waiting for an mbarrier's phase, which looks the same after two more."""
        slot, phase = self.slot(ring, piece), piece // self.stages[ring] & 1
        yield lambda: self.landed[slot] & 1 != phase
        self.read(ring, piece)

    def read(self, ring: str, piece: int) -> None:
        assert self.holds[self.slot(ring, piece)] == piece

    def give(self, ring: str, piece: int, who: int) -> None:
        self.read(ring, piece)  # a product that has just ended read it all the time
        there = self.arrived.setdefault(self.slot(ring, piece), set())
        assert who not in there  # would count for another
        there.add(who)

    def returned(self, ring: str, piece: int):
        slot = self.slot(ring, piece)
        yield lambda: len(self.arrived.get(slot, ())) == self.consumers
        self.arrived[slot].clear()
        self.holds[slot] = None

    def producer(self):
        for i in range(self.tiles):
            for ring in "kv":
                for piece in self.of_tile(ring, i):
                    if piece >= self.stages[ring]:
                        yield from self.returned(ring, piece)
                    self.in_flight.append((ring, piece))
        for ring in "kv":
            pieces = self.tiles * self.pieces[ring]
            for piece in range(max(pieces - self.stages[ring], 0), pieces):
                yield from self.returned(ring, piece)

    def consumer(self, who: int):
        """As hopper_kernel.consumer and hopper_pipeline.meanwhile."""

        def wait(ring, i):
            for piece in self.of_tile(ring, i):
                yield from self.full(ring, piece)

        def give(ring, i):
            for piece in self.of_tile(ring, i):
                self.give(ring, piece, who)
                yield lambda: True

        if self.early and self.tiles:
            yield from wait("k", 0)
        for i in range(self.tiles):
            if i in self.passed[who]:
                yield from wait("k", i)
                yield from give("k", i)
                yield from wait("v", i)
            else:
                if not self.early:
                    yield from wait("k", i)
                if self.early:
                    if self.late and i > 0:
                        yield from wait("v", i - 1)
                        yield from give("v", i - 1)
                    yield from wait("v", i)
                    if i + 1 < self.tiles:
                        yield from wait("k", i + 1)
                yield from give("k", i)
                if not self.early:
                    yield from wait("v", i)
            if not self.late:
                yield from give("v", i)
        if self.late and self.tiles:
            yield from wait("v", self.tiles - 1)
            yield from give("v", self.tiles - 1)


def ends(v, early: bool, late: bool, tiles: int = 9) -> bool:
    nothing = [set() for _ in range(v.consumers)]
    return all([Program(v, early, late, tiles, nothing, seed).ends() for seed in range(5)])


def test_a_shape_has_room_for_every_column():
    for (head_dim, v_head_dim), shape in hopper.SHAPES.items():
        assert (shape.columns * shape.slabs, shape.v_columns * shape.v_slabs) == (head_dim, v_head_dim)
    for head_dim in range(8, 264, 8):
        shape = hopper.narrowest("int8", head_dim, head_dim)
        assert shape.columns * shape.slabs >= quantise.columns(head_dim) and shape.v_columns * shape.v_slabs >= head_dim
        assert shape.parts % shape.v_parts == 0 and shape.k_stages + shape.v_stages <= 9  # of 16 barriers


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("shape", ALL, ids=str)
def test_nobody_waits_for_ever(shape, gate):
    v = variant(shape, gate)
    for tiles in (0, 1, 2, 3, 9):
        assert ends(v, v.awaits_early, v.returns_v_late, tiles)


@pytest.mark.parametrize("shape", ALL, ids=str)
def test_consumers_let_pass_what_they_have_not_listed(shape):
    v = replace(variant(shape, False), lists=True)
    assert not v.awaits_early and not v.returns_v_late
    for seed in range(8):
        tiles, draw = seed + 1, random.Random(seed)
        passed = [{i for i in range(tiles) if draw.random() < 0.5} for _ in range(v.consumers)]
        passed[seed % v.consumers] = set(range(tiles))  # one wants nothing at all
        assert Program(v, False, False, tiles, passed, seed).ends()


def test_the_next_tile_may_be_awaited_only_where_two_fit():
    wide = variant(hopper.SHAPES[256, 256], False)
    assert not wide.awaits_early and not ends(wide, True, False)
    narrow = variant(hopper.SHAPES[64, 64], True)
    assert narrow.awaits_early and not narrow.returns_v_late
    assert ends(narrow, True, True)
    assert not ends(replace(narrow, k_stages=1), True, False)


def test_the_model_sees_what_it_is_there_for():
    v = variant(hopper.SHAPES[256, 256], True)

    class Hasty(Program):  # does not wait for what the consumers still read
        def returned(self, ring, piece):
            self.holds[self.slot(ring, piece)] = None
            yield lambda: True

    class Careless(Program):  # gives a slot back that has not landed
        def full(self, ring, piece):
            yield lambda: True

    for wrong in (Hasty, Careless):
        with pytest.raises((AssertionError, KeyError)):
            for seed in range(5):
                wrong(v, False, False, 9, [set()] * v.consumers, seed).ends()
