"""Block-mask selection against literal transcriptions of each formula, one token pair at a time where it can be."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.selection import METHODS, density, select
from bsfa_kernels.selection.blocks import cover, diagonal, largest
from bsfa_kernels.tiles import visit
from torch.utils._python_dispatch import TorchDispatchMode

TILES = (TileShape(8, 16), TileShape(16, 8), TileShape(32, 32))
SETTINGS = {
    "sliding_window": [dict(sinks=3, window=9), dict(sinks=0, window=1), dict(sinks=17, window=40)],
    "tri_shape": [dict(sinks=3, window=9, last=10), dict(sinks=3, window=9, last=12)],
    "strided": [dict(window=5, stride=41), dict(window=1, stride=53)],
    "dilated": [dict(window=5, stride=41), dict(window=1, stride=53)],
    "vertical_slash": [
        dict(columns=6, diagonals=5, last=7, forced_columns=2, forced_diagonals=3),
        dict(columns=10, diagonals=12, last=7, forced_columns=0, forced_diagonals=0, budget=0.5),
    ],
    "flexprefill": [
        dict(gamma=0.6, min_budget=16, block=16, tau=0.0),
        dict(gamma=0.6, min_budget=16, block=16, tau=1.0),
        dict(gamma=0.9, min_budget=32, block=16, tau=0.15),
    ],
    "xattention": [dict(coverage=0.7, stride=4, block=16, chunk=2), dict(coverage=0.9, stride=8, block=16, chunk=1)],
    "spargeattention": [
        dict(coverage=0.8, similarity=0.3, block_rows=16, block_keys=8),
        dict(coverage=0.9, similarity=0.5, block_rows=16, block_keys=8, smooth_keys=False),
        dict(coverage=0.5, similarity=1.0, block_rows=16, block_keys=8),
    ],
    "pooled_top_k": [dict(count=2, block=16), dict(count=1, block=16)],
    "pooled_top_p": [dict(coverage=0.6, block=16)],
    "flashprefill": [
        dict(alpha=0.3, sinks=16, window=32, last=16, block=16, chunk=2),
        dict(alpha=0.5, sinks=0, window=0, last=0, block=16, chunk=1),
    ],
    "global_attention": [
        dict(coverage=0.6, sparse_ratio=0.9, special=2, frame=27, block_rows=16, block_keys=8),
        dict(coverage=0.1, sparse_ratio=0.5, special=0, frame=5, block_rows=16, block_keys=8),
    ],
}


def make(length, dim=8, heads=(4, 2), batch=2, keys=None, seed=0):
    """q, k float64 with blocks that are alike, blocks that are not, and a few keys that draw every query."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count, rows):
        drift = torch.randn(batch, count, rows // 16 + 1, dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(batch, count, rows, dim, generator=generator, dtype=torch.float64)
        loudness = torch.linspace(0.1, 1.2, rows, dtype=torch.float64)[:, None]
        return drift.repeat_interleave(16, dim=2)[:, :, :rows] + noise * loudness

    q, k = tokens(heads[0], length), tokens(heads[1], keys or length)
    k[:, :, ::23] += q.mean((1, 2), keepdim=True) * 2
    return q, k


# -- transcriptions: q [Tq, D], k [Tk, D] of one head, numpy float64; allowed[i, j] over tokens ----------------------


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def greedy(weights, share, forced=()):
    """Indices taken from the largest on until their sum reaches the share."""
    kept, total, running = set(forced), sum(weights), sum(weights[i] for i in forced)
    for i in sorted((i for i in range(len(weights)) if i not in kept), key=lambda i: -weights[i]):
        if running >= share * total:
            break
        kept.add(i)
        running += weights[i]
    return kept


def tops(values, count):
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def from_blocks(keep, rows, keys, shape):
    return np.array([[keep(i // rows, j // keys) for j in range(shape[1])] for i in range(shape[0])])


def pieces(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def sees(I, J, rows, keys, causal):  # noqa: E741
    return not causal or J * keys < (I + 1) * rows


def pooled_rows(q, k, scale, rows, keys, causal):
    """For every query block {key block: pooled score}, visible key blocks only."""
    means = [b.mean(0) for b in pieces(k, keys)]
    return [
        {J: scale * (b.mean(0) @ m) for J, m in enumerate(means) if sees(I, J, rows, keys, causal)}
        for I, b in enumerate(pieces(q, rows))  # noqa: E741
    ]


def window_rule(q, k, s, scale, causal, extra):
    return np.array([[abs(i - j) < s.window or extra(i, j) for j in range(len(k))] for i in range(len(q))])


def sliding_window(q, k, s, scale, causal):
    return window_rule(q, k, s, scale, causal, lambda i, j: j < s.sinks)


def tri_shape(q, k, s, scale, causal):
    return window_rule(q, k, s, scale, causal, lambda i, j: j < s.sinks or i >= len(q) - s.last)


def strided(q, k, s, scale, causal):
    return window_rule(q, k, s, scale, causal, lambda i, j: (i - j) % s.stride == 0)


def dilated(q, k, s, scale, causal):
    return window_rule(q, k, s, scale, causal, lambda i, j: j % s.stride == 0)


def last_rows(q, k, scale, rows):
    """{position: attention over positions 0 .. position} of the last rows."""
    return {i: softmax(scale * (k[: i + 1] @ q[i])) for i in range(max(0, len(q) - rows), len(q))}


def lines(attention, length):
    columns, diagonals = [0.0] * length, [0.0] * length
    for i, row in attention.items():
        for j, weight in enumerate(row):
            columns[j] += weight
            diagonals[i - j] += weight
    return columns, diagonals


def vertical_slash(q, k, s, scale, causal):
    columns, diagonals = lines(last_rows(q, k, scale, s.last), len(q))
    for j in range(min(s.forced_columns, len(q))):
        columns[j] = math.inf
    for o in range(min(s.forced_diagonals, len(q))):
        diagonals[o] = math.inf
    keep_columns = set(tops(columns, round(s.columns * s.budget)))
    keep_diagonals = set(tops(diagonals, round(s.diagonals * s.budget)))
    return np.array([[j in keep_columns or i - j in keep_diagonals for j in range(len(q))] for i in range(len(q))])


def flexprefill(q, k, s, scale, causal):
    length = len(q)
    attention = last_rows(q, k, scale, s.block)
    columns, diagonals = ([x / len(attention) for x in line] for line in lines(attention, length))
    true = np.array([sum(b) for b in pieces(columns, s.block)])
    estimate = softmax(np.array([scale * (q[-s.block :].mean(0) @ b.mean(0)) for b in pieces(k, s.block)]))
    middle = (true + estimate) / 2
    divergence = sum(p * math.log(p / m) for p, m in zip(true, middle, strict=True)) / 2
    divergence += sum(p * math.log(p / m) for p, m in zip(estimate, middle, strict=True)) / 2
    trusted = math.sqrt(max(divergence, 0)) < s.tau
    least = -(-s.min_budget // s.block)

    def line_blocks(mass):
        count = least if trusted else max(least, len(greedy(mass, s.gamma)) // s.block + 1)
        sums = [sum(b) for b in pieces(mass, s.block)]
        return set(tops([math.inf, *sums[1:]], count))

    vertical, slash, chosen = line_blocks(columns), line_blocks(diagonals), set()
    if trusted:
        entries = {}
        for row, scores in enumerate(pooled_rows(q, k, scale, s.block, s.block, True)):
            for column, weight in zip(scores, softmax(np.array(list(scores.values()))), strict=True):
                entries[row, column] = weight
        names = list(entries)
        chosen = {names[i] for i in greedy([entries[n] for n in names], s.gamma)}
    return from_blocks(
        lambda a, b: b in vertical or a - b in slash or (a, b) in chosen, s.block, s.block, (length,) * 2
    )


def xattention(q, k, s, scale, causal):
    S, per_block = s.stride, s.block // s.stride

    def product(i, j):
        return float(q[i] @ k[j]) if i < len(q) and j < len(k) else 0.0

    reduced_rows, reduced_keys = -(-len(q) // S), -(-len(k) // S)
    scores = np.zeros((-(-len(q) // s.block), -(-len(k) // s.block)))
    for t in range(reduced_rows):
        end = t + 1 if causal else reduced_keys
        sums = [sum(product(t * S + S - 1 - x, u * S + x) for x in range(S)) for u in range(end)]
        for u, weight in enumerate(softmax(scale / S * np.array(sums))):
            scores[t // per_block, u // per_block] += weight
    kept = [greedy(list(row), s.coverage, {0, I} if causal else ()) for I, row in enumerate(scores)]  # noqa: E741
    return from_blocks(lambda a, b: b in kept[a], s.block, s.block, (len(q), len(k)))


def spargeattention(q, k, s, scale, causal):
    if s.smooth_keys:
        k = k - k.mean(0)

    def alike(block):
        lengths = [np.linalg.norm(x) or 1.0 for x in block]
        cosines = [
            x @ y / a / b for x, a in zip(block, lengths, strict=True) for y, b in zip(block, lengths, strict=True)
        ]
        return sum(cosines) / len(cosines) > s.similarity

    good_rows = [alike(b) for b in pieces(q, s.block_rows)]
    good_keys = [alike(b) for b in pieces(k, s.block_keys)]
    kept = []
    for scores in pooled_rows(q, k, scale, s.block_rows, s.block_keys, causal):
        names = [J for J in scores if good_keys[J]]
        row = set()
        if names:
            running = 0.0
            weights = dict(zip(names, softmax(np.array([scores[J] for J in names])), strict=True))
            for J in sorted(names, key=lambda J: -weights[J]):
                running += weights[J]
                if running <= s.coverage or not row:
                    row.add(J)
        kept.append(row)
    return from_blocks(
        lambda a, b: not good_rows[a] or not good_keys[b] or b in kept[a], s.block_rows, s.block_keys, (len(q), len(k))
    )


def pooled_top_k(q, k, s, scale, causal):
    rows = pooled_rows(q, k, scale, s.block, s.block, causal)
    last = -(-len(k) // s.block) - 1
    for I, scores in enumerate(rows):  # noqa: E741
        scores[min(I, last)] = math.inf
    kept = [set(sorted(scores, key=lambda J: -scores[J])[: s.count]) for scores in rows]
    return from_blocks(lambda a, b: b in kept[a], s.block, s.block, (len(q), len(k)))


def pooled_top_p(q, k, s, scale, causal):
    rows = pooled_rows(q, k, scale, s.block, s.block, causal)
    kept = [greedy(list(softmax(np.array(list(scores.values())))), s.coverage) for scores in rows]
    return from_blocks(lambda a, b: b in kept[a], s.block, s.block, (len(q), len(k)))


def flashprefill(q, k, s, scale, causal):
    means, blocks, kept = [b.mean(0) for b in pieces(k, s.block)], -(-len(q) // s.block), set()
    for I in range(blocks):  # noqa: E741
        energy = {}
        for J, mean in enumerate(means):
            for i in range(I * s.block, min((I + 1) * s.block, len(q))):
                if i >= (J + 1) * s.block - 1:
                    energy[J] = energy.get(J, 0) + math.exp(scale * (q[i] @ mean))
        for J in range(len(means)):
            chosen = J in energy and energy[J] >= s.alpha * max(energy.values())
            near = I - J < s.window / s.block
            if chosen or near or J * s.block < s.sinks or (blocks - I - 1) * s.block < s.last:
                kept.add((I, J))
    return from_blocks(lambda a, b: (a, b) in kept, s.block, s.block, (len(q), len(k)))


def global_attention(q, k, s, scale, causal):
    patches_q, patches_k = ([i for i in range(len(x)) if i % s.frame >= s.special] for x in (q, k))
    allowed = np.ones((len(q), len(k)), dtype=bool)
    if not patches_q or not patches_k:
        return allowed
    kept = []
    for scores in pooled_rows(q[patches_q], k[patches_k], scale, s.block_rows, s.block_keys, False):
        weights = softmax(np.array(list(scores.values())))
        count = max(len(greedy(list(weights), s.coverage)), round(len(weights) * (1 - s.sparse_ratio)))
        kept.append(set(tops(list(weights), count)))
    for a, i in enumerate(patches_q):
        for b, j in enumerate(patches_k):
            allowed[i, j] = b // s.block_keys in kept[a // s.block_rows]
    return allowed


def expected(name, q, k, settings, scale, causal, tile):
    """The transcription on the tile grid: a tile is kept when it holds an allowed, visible pair, or its diagonal."""
    groups = q.shape[1] // k.shape[1]
    visible = np.tril(np.ones((q.shape[2], k.shape[2]), dtype=bool)) if causal else True
    own = np.eye(q.shape[2], k.shape[2], dtype=bool)
    own[k.shape[2] :, -1] = True
    masks = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            allowed = globals()[name](q[b, h].numpy(), k[b, h // groups].numpy(), settings, scale, causal)
            rows = [np.logical_or.reduce(x, 0) for x in pieces(allowed & visible | own, tile.rows)]
            masks.append([[bool(x.any()) for x in pieces(row, tile.keys)] for row in rows])
    return torch.tensor(masks).unflatten(0, q.shape[:2])


def cases():
    for name, settings in SETTINGS.items():
        for index in range(len(settings)):
            for causal in METHODS[name].directions:
                yield pytest.param(name, index, causal, id=f"{name}-{index}-{'causal' if causal else 'full'}")


@pytest.mark.parametrize("name,index,causal", list(cases()))
def test_literal(name, index, causal):
    settings = METHODS[name](**SETTINGS[name][index])
    kept = 0
    for tile, length in ((TILES[0], 107), (TILES[1], 64), (TILES[2], 91), (TILES[0], 13), (TILES[2], 1)):
        q, k = make(length, seed=length)
        mask = settings.select(q, k, scale=0.5, causal=causal, tile=tile)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected(name, q, k, settings, 0.5, causal, tile)), (tile, length)
        kept += float(density(mask, causal=causal, tile=tile).mean()) if length == 107 else 0
    all_dense = name == "spargeattention" and settings.similarity == 1.0
    assert (kept == 1) if all_dense else (0.05 < kept < 0.99), "a mask that keeps everything tests nothing"


@pytest.mark.parametrize("keys", (40, 90))
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if False in method.directions])
def test_literal_with_other_keys_than_queries(name, keys):
    q, k = make(61, keys=keys, batch=1)
    settings = METHODS[name](**SETTINGS[name][0])
    mask = settings.select(q, k, scale=0.5, causal=False, tile=TILES[0])
    assert torch.equal(mask, expected(name, q, k, settings, 0.5, False, TILES[0]))


@pytest.mark.parametrize("name", ("xattention", "flashprefill"))
def test_chunks_do_not_change_the_mask(name):
    q, k = make(333)
    base = METHODS[name](**SETTINGS[name][0])
    masks = [
        replace(base, chunk=chunk).select(q, k, scale=0.5, causal=True, tile=TILES[0]) for chunk in (1, 2, 3, 5, 1000)
    ]
    assert all(torch.equal(mask, masks[-1]) for mask in masks)
    assert 0 < density(masks[0], causal=True, tile=TILES[0]).mean() < 1


def test_forced_tiles():
    q, k = make(300, batch=1)
    first_column = {"sliding_window": 3, "tri_shape": 3, "vertical_slash": 2, "flexprefill": 16, "xattention": 16}
    for name, method in METHODS.items():
        causal = method.directions[0]
        for tile in TILES:
            mask = select(name, q, k, scale=0.5, causal=causal, tile=tile, **SETTINGS[name][0])
            for t in range(mask.shape[2]):
                plan = visit(t, 300, causal, False, tile)
                assert mask[:, :, t, plan.first_diagonal : plan.end_diagonal].all(), name
                assert not mask[:, :, t, plan.end_keys :].any(), name
            if name in first_column:
                assert mask[..., 0].all(), name


def test_rows_past_the_end_have_no_energy():
    """9 of 16 queries in the last block, logits 2 and -2: exp(-4) lies below alpha, zero rows would lift it above."""
    q, k = torch.ones(1, 1, 41, 4), torch.ones(1, 1, 41, 4)
    k[:, :, 16:32] = -1
    settings = dict(alpha=0.08, sinks=0, window=0, last=0, block=16)
    mask = select("flashprefill", q, k, scale=0.5, causal=True, tile=TileShape(16, 16), **settings)
    assert mask[0, 0, 2].tolist() == [True, False, True]


def test_special_tokens_stay_dense():
    q, k = make(270, batch=1)
    mask = select("global_attention", q, k, scale=0.5, causal=False, tile=TILES[0], **SETTINGS["global_attention"][0])
    for position in range(270):
        if position % 27 < 2:
            assert mask[:, :, position // 8].all() and mask[..., position // 16].all()
    assert not mask.all()


@pytest.mark.parametrize("share", (0.0, 0.3, 0.9, 1.0))
def test_cover_is_enough_and_no_more(share):
    scores = torch.rand(7, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = cover(scores, share)
    target = share * scores.sum(-1)
    kept = (scores * keep).sum(-1)
    smallest = scores.masked_fill(~keep, torch.inf).amin(-1)
    assert (kept >= target - 1e-12).all()
    if share:
        assert (kept - smallest < target).all()
    else:
        assert not keep.any()


def test_cover_counts_forced_entries_first():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    forced = torch.tensor([[False, False, True, False]])
    assert cover(scores, 0.6, forced).tolist() == [[True, False, True, False]]
    assert cover(scores, 0.1, forced).tolist() == [[False, False, True, False]]


def test_cover_keeps_everything_where_the_sum_falls_short():
    assert cover(torch.full((1, 1000), 0.1), 1.0).all()
    assert not cover(torch.zeros(2, 5), 0.9).any()


def test_largest_takes_earlier_entries_on_ties():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert largest(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert largest(scores, torch.tensor([[0], [9]])).sum(-1).tolist() == [0, 4]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_diagonal_is_that_of_the_kernels(tile):
    for keys in (1, 30, 100, 170):
        q_tiles, k_tiles = -(-100 // tile.rows), -(-keys // tile.keys)
        mask = diagonal(q_tiles, k_tiles, tile, "cpu")
        for t in range(q_tiles):
            plan = visit(t, keys, False, False, tile)
            assert mask[t].nonzero().flatten().tolist() == list(range(plan.first_diagonal, plan.end_diagonal))


def slow_drift(length=8192):
    """float32 q, k whose neighbours are alike (so that blocks pool well), with loud first keys."""
    generator = torch.Generator().manual_seed(3)
    anchors = torch.randn(1, 4, length // 256 + 2, 32, generator=generator)
    smooth = torch.nn.functional.interpolate(anchors.flatten(0, 1).transpose(1, 2), size=length, mode="linear")
    smooth = smooth.transpose(1, 2).unflatten(0, (1, 4)) * 2.5
    smooth += torch.randn(smooth.shape, generator=generator) * 0.2
    q, k = smooth.contiguous(), smooth[:, ::2].contiguous()
    k[:, :, :4] += q.mean((1, 2), keepdim=True) * 8
    return q, k


@pytest.mark.parametrize("name", list(METHODS))
def test_the_sweep_goes_from_sparse_to_dense(name):
    q, k = slow_drift()
    method, tile = METHODS[name], TileShape()
    causal = method.directions[0]
    assert len(method.sweep) >= 5
    assert method.knob in method.__dataclass_fields__
    found = []
    for value in method.sweep:
        mask = select(name, q, k, scale=32**-0.5, causal=causal, tile=tile, **{method.knob: value})
        found.append(float(density(mask, causal=causal, tile=tile).mean()))
    assert found == sorted(found), found
    assert found[-1] > found[0], found


def test_density_counts_only_tiles_causality_leaves():
    tile = TileShape(2, 4)
    mask = torch.zeros(1, 2, 4, 2, dtype=torch.bool)
    mask[0, 0] = True
    mask[0, 1, 3] = True
    assert density(mask, causal=True, tile=tile).tolist() == [[1.0, pytest.approx(2 / 6)]]
    assert density(mask, causal=False, tile=tile).tolist() == [[1.0, 0.25]]


class Watch(TorchDispatchMode):
    """Remembers the largest tensor made and the operators that were called."""

    def __init__(self):
        super().__init__()
        self.largest, self.called = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called.add(func.overloadpacket.__name__)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", list(METHODS))
def test_no_square_buffer_and_no_wait_for_the_device(name):
    """On meta tensors reading a value back is impossible; sizes are those of published settings at 64k."""
    length, heads = 65536, 8
    q = torch.empty(1, heads, length, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 2, length, 128, device="meta", dtype=torch.bfloat16)
    with Watch() as watch:
        mask = select(name, q, k, scale=0.1, causal=METHODS[name].directions[0], tile=TileShape())
    assert mask.shape == (1, heads, 1024, 512)
    assert watch.largest <= heads * length * length // 128
    assert not watch.called & {"nonzero", "_local_scalar_dense", "masked_select", "unique_dim", "_unique2"}


@pytest.mark.parametrize("name", list(METHODS))
def test_half_precision(name):
    q, k = (x.to(torch.bfloat16) for x in make(107, batch=1))
    causal = METHODS[name].directions[0]
    mask = select(name, q, k, scale=0.5, causal=causal, tile=TILES[0], **SETTINGS[name][0])
    exact = select(name, q.double(), k.double(), scale=0.5, causal=causal, tile=TILES[0], **SETTINGS[name][0])
    assert (mask != exact).float().mean() < 0.1


def test_errors():
    q, k = make(40)
    good = dict(scale=0.5, causal=True, tile=TILES[0])
    with pytest.raises(ValueError, match=r"pbs permutes keys.*use PBS\(...\).arrange"):
        select("pbs", q, k, **good)
    with pytest.raises(ValueError, match="unknown method 'dense'"):
        select("dense", q, k, **good)
    with pytest.raises(ValueError, match="pooled_top_k has no setting 'name'"):
        select("pooled_top_k", q, k, **good, name=3)
    with pytest.raises(ValueError, match=r"xattention: coverage must lie in \[0, 1\], got 1.5"):
        METHODS["xattention"](coverage=1.5)
    with pytest.raises(ValueError, match="stride must lie in"):
        METHODS["strided"](stride=0)
    with pytest.raises(ValueError, match="multiple of stride"):
        METHODS["xattention"](block=20)
    with pytest.raises(ValueError, match="below frame"):
        METHODS["global_attention"](frame=4)
    with pytest.raises(ValueError, match="as many queries as keys"):
        select("sliding_window", q, k[:, :, :30], **good)
    with pytest.raises(ValueError, match="not defined for non-causal"):
        select("vertical_slash", q, k, **(good | dict(causal=False)))
    with pytest.raises(ValueError, match="not defined for causal"):
        select("global_attention", q, k, **good)
    with pytest.raises(ValueError, match="must divide one another"):
        select("pooled_top_k", q, k, **good, block=12)
    with pytest.raises(ValueError, match="multiple of key heads"):
        select("pooled_top_k", q[:, :3], k, **good)
    with pytest.raises(ValueError, match="agree in batch size"):
        select("pooled_top_k", q[:1], k, **good)
    with pytest.raises(ValueError, match="4 axes"):
        select("pooled_top_k", q[0], k, **good)
