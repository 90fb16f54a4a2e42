"""What takes part in one cell of a profile: contenders run once; those that fail or are wrong leave a reason."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..metrics.distance import relative, squares
from .interleave import Contender, first_call


class Entrants:
    """`contenders` to time, `rows` with what is known of each before that, and the `unavailable` with their reasons."""

    def __init__(self, device: torch.device, tolerance: float):
        self.device, self.tolerance = device, tolerance
        self.contenders: list[Contender] = []
        self.rows: list[dict] = []
        self.unavailable: list[dict] = []
        self.exact: torch.Tensor | None = None  # the first dense output, [B, H, T, D]

    def enter(self, name: str, call: Callable | str, **facts) -> torch.Tensor | None:
        """The output of `call`, which is then to be timed; None where it is a reason or fails. Its `library`, if it has
        one, goes into its row.
        """
        out, reason = (None, call) if isinstance(call, str) else first_call(call, self.device)
        if reason:
            self.leave_out(name, reason)
            return None
        self.contenders.append(Contender(name, call))
        library = getattr(call, "library", None)
        self.rows.append({"name": name, **facts} | ({"library": library} if library else {}))
        return out

    def enter_dense(self, name: str, call: Callable | str) -> None:
        """As `enter`; one that is far from the first is out, since a fast wrong kernel is no baseline."""
        out = self.enter(name, call, kind="dense", skip_target=None)
        if out is None or self.exact is None:
            self.exact = self.exact if out is None else out
            return
        error = self.error(out)
        if error is None or error > self.tolerance:
            self.contenders.pop()
            self.rows.pop()
            far = "not finite" if error is None else f"{error:.1e} away from dense attention"
            self.leave_out(name, f"its output is {far}")

    def enter_inexact(self, name: str, call: Callable | str, **facts) -> bool:
        """As `enter`, with the `error` of its output; whether it takes part."""
        out = self.enter(name, call, **facts)
        if out is None:
            return False
        if self.exact is not None:
            self.rows[-1]["error"] = self.error(out)
        return True

    def leave_out(self, name: str, reason: str) -> None:
        self.unavailable.append({"name": name, "reason": reason})

    def error(self, out: torch.Tensor) -> float | None:
        """Relative L2 distance of `out` [B, H, T, D] from dense attention; None without it, and when not finite."""
        return None if self.exact is None else relative(*squares(out, self.exact))
