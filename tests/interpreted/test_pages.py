"""gather_pages' Triton kernel; see tests/test_pages.py."""

import paged_cases
import pytest
from bsfa_kernels import pages


@pytest.mark.parametrize("case", paged_cases.CASES)
def test_positions_come_from_their_pages(case):
    launched = []

    def gather(keys, values, block_table, length, dtype=None, key_scale=None, value_scale=None):
        launched.append(length)
        return pages.launch(keys, values, block_table, length, dtype or keys.dtype, key_scale, value_scale)

    paged_cases.check(case, "cpu", gather)
    assert launched
