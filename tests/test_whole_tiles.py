"""Parts of sequences on the torch backend and in the reference; the interpreter's and the GPU's tests do the same."""

import pytest
import torch
import whole_tiles
from bsfa_kernels import TileShape
from whole_tiles import Prompt

pytestmark = pytest.mark.parametrize("backend", ["reference", "torch"])
TILES = (TileShape(16, 32), TileShape(32, 16))


@pytest.mark.parametrize("cuts", [[160], [101, 230], [7, 150, 152], list(range(10, 333, 10))], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_chunks_differ_from_the_whole_prompt_only_in_keeping_more(backend, tile, cuts):
    whole_tiles.chunks_keep_more(Prompt(backend, tile), cuts)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_last_tile_is_judged_only_where_the_sequence_is_known_to_end(backend, tile):
    whole_tiles.a_known_end_is_whole(Prompt(backend, tile))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_sequence_that_ends_before_a_chunk_has_no_tile_in_it(backend, tile):
    whole_tiles.right_padded_chunks(Prompt(backend, tile, length=170), short=66, cut=70)


def test_nan_scores_are_kept(backend):
    whole_tiles.nan_scores_are_kept(Prompt(backend, TILES[0]), whole_tiles.DROP_ALL)


def test_half_precision_keeps_the_same(backend):
    whole_tiles.chunks_keep_more(Prompt(backend, TILES[0], dtype=torch.bfloat16), [101, 230])
