"""The processes of one calibration: which of them this is, as torchrun or `--processes` started it.

    group = Group.joined()      # None where this process is alone
    group.begin(make)           # the first process makes the run, the others wait until it stands

Samples are shared out through the run directory (claims.py); the store, a server in the first process or in torchrun's
agent, only carries the start and how long each sample took.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from ..errors import MachineError, UsageError, said

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
BEGUN = "bsfa/begun"
PATIENCE = timedelta(hours=2)  # for the first process to load a model and its texts


@dataclass(frozen=True)
class Group:
    rank: int
    size: int
    local_rank: int
    store: object  # torch.distributed.Store

    @classmethod
    def joined(cls, processes: int | None) -> Group | None:
        """The group that the environment names, None where there is none. Raises UsageError where `processes`, which
        the user asked for, are not as many, MachineError where the group's store cannot be reached.
        """
        size = started()
        if size < 2:
            return None
        if processes is not None and processes != size:
            raise UsageError(f"--processes {processes}, but {size} processes were started; leave it out under torchrun")
        from torch.distributed.rendezvous import rendezvous

        try:
            store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        except (RuntimeError, ValueError, OSError) as error:
            raise MachineError(f"the processes do not find each other: {said(error)}") from error
        return cls(rank, size, int(os.environ["LOCAL_RANK"]), store)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def begin(self, make: Callable[[], object]) -> None:
        """Run `make` in the first process; the others return once it is through. Raises MachineError in these where
        the first process ended before.
        """
        if self.first:
            make()
            self.store.set(BEGUN, "1")
            return
        try:
            self.store.wait([BEGUN], PATIENCE)
        except RuntimeError as error:
            raise MachineError("the first process ended before it began the run") from error

    def tell(self, sample: str, seconds: float) -> None:
        """Leave a sample's seconds for `told`; nothing where the first process is gone."""
        with suppress(RuntimeError):
            self.store.set(f"bsfa/seconds/{sample}", repr(seconds))

    def told(self, samples: list[str]) -> dict[str, float]:
        """{sample: seconds} of those that processes of this group ran."""
        keys = {sample: f"bsfa/seconds/{sample}" for sample in samples}
        return {name: float(self.store.get(key)) for name, key in keys.items() if self.store.check([key])}


def started() -> int:
    """How many processes were started together, with this one. Raises UsageError where only half of that is said."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 2:
        return 1
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes by torchrun")
    return int(size)
