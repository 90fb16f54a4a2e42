"""Timing without repetition, for tests that look at no median."""

from contextlib import contextmanager

import pytest


@contextmanager
def one_round():
    """While entered, whatever bsfa times is timed once, after one call to warm up."""
    from bsfa_cli.timing import interleave

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "WARM_UP", 1)
        patch.setitem(interleave.measure.__kwdefaults__, "at_least", 1)
        patch.setitem(interleave.measure.__kwdefaults__, "at_most", 1)
        yield
