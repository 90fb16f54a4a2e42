"""Parts of sequences on the Triton kernels; see tests/test_whole_tiles.py."""

import pytest
import torch
import whole_tiles
from bsfa_kernels import TileShape
from whole_tiles import Prompt

WIDE, TALL = TileShape(16, 32), TileShape(32, 16)


@pytest.mark.parametrize("tile, cuts", [(WIDE, [90]), (TALL, [7, 105, 107])], ids=str)
def test_chunks_differ_from_the_whole_prompt_only_in_keeping_more(tile, cuts):
    whole_tiles.chunks_keep_more(Prompt("triton", tile, length=173), cuts)


def test_a_last_tile_is_judged_only_where_the_sequence_is_known_to_end():
    whole_tiles.a_known_end_is_whole(Prompt("triton", WIDE, length=173))


def test_a_sequence_that_ends_before_a_chunk_has_no_tile_in_it():
    whole_tiles.right_padded_chunks(Prompt("triton", TALL, length=170), short=66, cut=70)


def test_nan_scores_are_kept():
    whole_tiles.nan_scores_are_kept(Prompt("triton", WIDE, length=173), whole_tiles.DROP_ALL)


@pytest.mark.parametrize("odd", ["base", "strides of axes of size 1"])
def test_tensors_that_break_the_rule_of_descriptors_are_copied(odd):
    prompt = Prompt("triton", WIDE, length=60)
    q, k, v = prompt.tensors()
    expected = prompt.attend(q, k, v).out
    if odd == "base":
        q, k, v = (torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v))
        assert q.is_contiguous() and q.data_ptr() % 16
    else:
        q, k, v = (x.as_strided(x.shape, (x.stride(0) + 3, *x.stride()[1:])) for x in (q, k, v))
    assert torch.equal(prompt.attend(q, k, v).out, expected)
