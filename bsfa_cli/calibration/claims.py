"""Who works on what: locks on single bytes of a file in the run directory. A process that ends, however it ends, gives
its claims back, since the system keeps them.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ..errors import UsageError

NAME = ".claims"
MERGING = 0  # the claim on the files of the roles; sample i has the claim 1 + i


class Claims:
    """The claims of this process on the run at `path`; one object a process, as locks belong to the process."""

    def __init__(self, path: Path):
        place = path / NAME
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = open(os.open(place, flags, 0o666), "r+b")
        except OSError as error:
            raise UsageError(f"cannot write {place}: {error.strerror}") from error

    def take(self, claim: int, wait: bool = False) -> bool:
        """Whether the claim is this process's now; with `wait`, once whoever has it gave it back."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, claim)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give_back(self, claim: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, claim)

    def close(self) -> None:
        """Give everything back."""
        self._file.close()
