"""Gate: a number, a value per head or a value per head and query tile; anything else is refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from bsfa_kernels import Gate


def test_numbers_and_values_per_head_become_what_kernels_see():
    values = torch.tensor([-1.0, -2.0, -torch.inf])
    gate = Gate(absolute=2, gap=values).expanded(3, "cpu")
    assert gate.absolute.dtype == torch.float32 and gate.absolute.tolist() == [[2.0]] * 3
    assert gate.gap.dtype == torch.float32 and gate.gap.tolist() == [[-1.0], [-2.0], [-torch.inf]]
    whole = torch.zeros(3, 5)
    assert Gate(gap=whole).expanded(3, "cpu").gap is whole
    assert Gate().expanded(3, "cpu").open and not Gate(gap=-2.0).open
    assert Gate(gap=float("-inf")).expanded(2, "cpu").gap.tolist() == [[-torch.inf]] * 2
    assert Gate(gap=-2.0).to("cpu").expanded(1, "meta").gap.device.type == "meta"


@pytest.mark.parametrize(
    "value, kind, said",
    [
        ([-1.0, -2.0], TypeError, "got list"),
        ("-2", TypeError, "got str"),
        (True, TypeError, "got bool"),
        (float("nan"), ValueError, "got nan"),
        (torch.tensor(-2.0), ValueError, r"got torch.float32 \[\]"),
        (torch.zeros(2, 3, 4), ValueError, r"got torch.float32 \[2, 3, 4\]"),
        (torch.zeros(2, 0), ValueError, r"got torch.float32 \[2, 0\]"),
        (torch.zeros(4).double(), ValueError, r"got torch.float64 \[4\]"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"got torch.int64 \[4\]"),
    ],
    ids=str,
)
def test_what_is_no_threshold_is_refused_with_the_shapes_that_are(value, kind, said):
    wanted = r"^gate 'gap' must be a number or a float32 tensor \[query heads\] or \[query heads, query tiles\], "
    with pytest.raises(kind, match=wanted + said + "$"):
        Gate(gap=value)
