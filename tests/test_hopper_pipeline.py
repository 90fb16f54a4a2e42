"""The order in which the Hopper kernel's producer and consumers wait for each other, as a model: it comes to an end."""

from dataclasses import replace

import pytest
from bsfa_kernels import hopper, quantise

TILES = 9
ALL = [*hopper.SHAPES.values(), *hopper.INT8_SHAPES.values()]


def variant(shape: hopper.Shape, gate: bool):
    return hopper.variant_of(shape, 8, 32, 4, shape.v_columns, True, True, False, gate, *[False] * 9)


def producer(v):
    """Waits of the producer: (ring, piece) that all consumers must have given back before the next load starts."""
    for i in range(TILES):
        for ring, pieces, stages in (("k", v.slabs, v.k_stages), ("v", v.v_parts, v.v_stages)):
            for piece in range(i * pieces, (i + 1) * pieces):
                yield (ring, piece - stages) if piece >= stages else None


def consumer(early: bool, late: bool):
    """Steps ("wait" or "give", ring, tile) of a consumer, as in hopper_kernel.consumer and `meanwhile`."""
    if early:
        yield "wait", "k", 0
    for i in range(TILES):
        if not early:
            yield "wait", "k", i
        if late and i > 0:
            yield "give", "v", i - 1
        if early:
            yield "wait", "v", i
            if i + 1 < TILES:
                yield "wait", "k", i + 1
        yield "give", "k", i
        if not early:
            yield "wait", "v", i
        if not late:
            yield "give", "v", i
    if late:
        yield "give", "v", TILES - 1


def ends(v, early: bool, late: bool) -> bool:
    """Whether everyone comes to the end. All waits are for what can only become true, so no order of turns matters."""
    pieces = {"k": v.slabs, "v": v.v_parts}
    loads, loaded = list(producer(v)), 0
    tiles = [(ring, i * pieces[ring]) for i in range(TILES) for ring in "kv"]
    order = [(ring, first + c) for ring, first in tiles for c in range(pieces[ring])]
    steps = [list(consumer(early, late)) for _ in range(v.consumers)]
    done = [0] * v.consumers
    given = [set() for _ in steps]
    moved = True
    while moved:
        moved = False
        while loaded < len(loads) and (loads[loaded] is None or all(loads[loaded] in own for own in given)):
            loaded, moved = loaded + 1, True
        landed = set(order[:loaded])
        for w, own in enumerate(steps):
            while done[w] < len(own):
                what, ring, tile = own[done[w]]
                of_tile = {(ring, n) for n in range(tile * pieces[ring], (tile + 1) * pieces[ring])}
                if what == "wait" and not of_tile <= landed:
                    break
                if what == "give":
                    given[w] |= of_tile
                done[w], moved = done[w] + 1, True
    return loaded == len(loads) and all(n == len(own) for n, own in zip(done, steps, strict=True))


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
    assert ends(v, v.awaits_early, v.returns_v_late)


def test_the_next_tile_may_be_awaited_only_where_two_fit():
    wide = variant(hopper.SHAPES[256, 256], False)
    assert not wide.awaits_early and not ends(wide, True, False)
    narrow = variant(hopper.SHAPES[64, 64], True)
    assert narrow.awaits_early and not narrow.returns_v_late
    assert ends(narrow, True, True)
    assert not ends(replace(narrow, k_stages=1), True, False)
