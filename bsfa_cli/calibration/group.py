"""The processes of one calibration or comparison: which of them this is, as torchrun or `--processes` started it.

    group = Group.joined()      # None where this process is alone
    group.begin(make)           # the first process makes the run, the others wait until it stands
    group.gather(name, value)   # every process's value, in the first one
    group.meet(name)            # nobody goes on before all are here

Samples are shared out through the run directory (claims.py); the store, a server in the first process or in torchrun's
agent, carries the start, how long each sample took, and answers to questions.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import MachineError, UsageError, said

if TYPE_CHECKING:
    import torch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
BEGUN = "bsfa/begun"
POLL_SECONDS = 0.1
PATIENCE = timedelta(hours=2)  # for the first process to load a model and its texts
MEETING = timedelta(minutes=5)  # for all processes to be there
ATTEMPT_SECONDS = 10.0


@dataclass(frozen=True)
class Group:
    rank: int
    size: int
    local_rank: int
    store: object  # torch.distributed.Store

    @classmethod
    def joined(cls, processes: int | None) -> Group | None:
        """The group that the environment names, None where there is none. Raises UsageError where `processes`, which
        the user asked for, are not as many, MachineError where the group's store cannot be reached within MEETING.
        """
        size = started()
        if size < 2:
            return None
        if processes is not None and processes != size:
            raise UsageError(f"--processes {processes}, but {size} processes were started; leave it out under torchrun")
        from torch.distributed.rendezvous import rendezvous

        if int(os.environ["RANK"]):  # the first process makes the store, unless torchrun did
            _await_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        try:
            store, rank, size = next(rendezvous("env://", timeout=MEETING))
            store.set_timeout(PATIENCE)
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

    def gather(self, name: str, value) -> list | None:
        """In the first process the JSON values that all processes give under this name, by rank; None in the others.

        Raises MachineError where the first process is gone, or another gives nothing.
        """
        with _lost():
            keys = self._give(name, json.dumps(value))
            if not self.first:
                return None
            self._await(keys)
            return [json.loads(self.store.get(key)) for key in keys]

    def meet(self, name: str) -> None:
        """Return once all processes have come here; the first has to stay for a while. Raises MachineError where one of
        them does not come.
        """
        with _lost():
            self._await(self._give(name, ""))

    def _await(self, keys: list[str]) -> None:
        """`store.wait` would hold an interrupt back until it is through. Raises RuntimeError."""
        until = time.monotonic() + PATIENCE.total_seconds()
        while not self.store.check(keys):
            if time.monotonic() > until:
                raise RuntimeError(f"nothing came within {PATIENCE}")
            time.sleep(POLL_SECONDS)

    def _give(self, name: str, value: str) -> list[str]:
        """Set this process's value of a name; returns the keys of all."""
        keys = [f"bsfa/{name}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], value)
        return keys


def _await_store(host: str, port: int) -> None:
    """Return once something listens there. torch would wait too, but hold an interrupt back and show C++ frames."""
    until = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), ATTEMPT_SECONDS).close()
            return
        except (OSError, UnicodeError) as error:  # the latter for what can be no name of a machine
            if time.monotonic() > until or isinstance(error, UnicodeError):
                waited = f" within {MEETING.total_seconds() / 60:g} minutes" if isinstance(error, OSError) else ""
                raise MachineError(
                    f"the processes do not find each other: nothing answers at MASTER_ADDR {host}, MASTER_PORT {port}"
                    f"{waited} ({said(error)})"
                ) from error
            time.sleep(POLL_SECONDS)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise MachineError(f"the processes lost each other: {said(error)}") from error


def check_shared(device: str) -> None:
    """Raise UsageError for one GPU that several processes would share."""
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: each of several processes takes a GPU of its own; give --device cuda")


def place_of(device: str, group: Group | None) -> torch.device:
    """The device of this process, made current. Raises UsageError for one device that several processes would share,
    MachineError where there are fewer GPUs than processes.
    """
    from ..environment import resolve_device

    place = resolve_device(device)
    if place.type == "cpu":
        return place
    import torch

    if group is not None:
        check_shared(device)
        if group.local_rank >= torch.cuda.device_count():
            raise MachineError(
                f"process {group.local_rank + 1} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start as many processes"
            )
        place = torch.device("cuda", group.local_rank)
    if place.index is not None:
        torch.cuda.set_device(place)
    return place


def started() -> int:
    """How many processes were started together, with this one. Raises UsageError where only half of that is said."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 2:
        return 1
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start the processes by torchrun")
    for name, end in (("RANK", int(size)), ("LOCAL_RANK", int(size)), ("MASTER_PORT", 1 << 16)):
        value = os.environ[name]
        if not value.isdecimal() or int(value) >= end:
            raise UsageError(f"{name} is {value}, not a number below {end}; start the processes by torchrun")
    return int(size)
