"""What one process of vLLM skipped, by layer: lines in its log, and a file that `metrics.py` shows to Prometheus.

Tiles are counted on the device and read from a thread of their own every `log_every` seconds, only when prefills came
since: no forward pass waits for it.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ...files import write_whole

logger = logging.getLogger("vllm.bsfa")  # a child of vLLM's logger: its handlers and format


class Counting(Protocol):
    """A module's handler: `counts` are tiles since the start, by query head (sparse.Counts)."""

    @property
    def counts(self): ...


def folder(instance: str) -> Path:
    """Where the processes of one vLLM instance, on one machine and of one user, leave their counts."""
    return Path(tempfile.gettempdir()) / f"bsfa-vllm-{os.getuid()}-{instance}"


class Counters:
    """Counts of one rank. `served` {layer: its handler}; `passed` counts prefills by (layer, reason) that vLLM's own
    kernel served.
    """

    def __init__(self, instance: str, rank: int, ranks: int, log_every: float):
        self.rank, self.ranks, self.log_every = rank, ranks, log_every
        self.served: dict[str, Counting] = {}
        self.passed: Counter[tuple[str, str]] = Counter()
        self.noted: set[str] = set()
        self._file = folder(instance) / f"rank-{rank}-{os.getpid()}.json"
        self._news, self._stop = threading.Event(), threading.Event()
        self._logged = (0, 0)

    def start(self) -> None:
        """Begin to report, until the process ends."""
        if not self.log_every:
            return
        threading.Thread(target=self._report, name="bsfa-counters", daemon=True).start()
        atexit.register(self.close)

    def close(self) -> None:
        """Log what came since the last line, and take the file away."""
        self._stop.set()
        if self._news.is_set():
            self.report()
        self._file.unlink(missing_ok=True)
        try:
            self._file.parent.rmdir()
        except OSError:
            pass  # other ranks' files, or nothing was ever written

    def came(self) -> None:
        """A prefill was served."""
        self._news.set()

    def passed_over(self, layer: str, reason: str, prefills: int) -> None:
        """vLLM's kernel served `prefills` sequences of `layer`, for `reason`: noted in the log the first time."""
        self.passed[layer, reason] += prefills
        self.note(reason, f"{layer} and layers like it")
        self._news.set()

    def note(self, reason: str, what: str) -> None:
        """One line in the log for each reason."""
        if reason not in self.noted:
            self.noted.add(reason)
            logger.warning("bsfa: vLLM's own kernel serves %s: %s", what, reason)

    def tiles(self) -> dict[str, tuple[int, int]]:
        """{layer: (kept, candidate) tiles since the start}. Waits for the device."""
        return {layer: tuple(int(x.sum()) for x in handler.counts) for layer, handler in self.served.items()}

    def report(self) -> None:
        """Write the counts, and log what came since the last line."""
        tiles = self.tiles()
        self._write(tiles)
        kept, candidates = (sum(pair[i] for pair in tiles.values()) for i in range(2))
        if candidates > self._logged[1]:
            logger.info("%s", self.line(tiles))
            self._logged = kept, candidates

    def line(self, tiles: Mapping[str, tuple[int, int]]) -> str:
        """The line for the log: the skip rate since the last line, and by layer since the start."""
        kept, candidates = (sum(pair[i] for pair in tiles.values()) for i in range(2))
        kept, new = kept - self._logged[0], candidates - self._logged[1]
        names = _short(list(tiles))
        layers = ", ".join(f"{name}: {1 - k / c:.1%}" for name, (k, c) in zip(names, tiles.values(), strict=True) if c)
        rank = f" (heads of rank {self.rank} of {self.ranks})" if self.ranks > 1 else ""
        return (
            f"bsfa{rank}: skipped {1 - kept / new:.1%} of {new:,} tiles that gates may drop; by layer since the start "
            f"{layers}; prefills left to vLLM's kernel {sum(self.passed.values()):,}"
        )

    def _write(self, tiles) -> None:
        self._file.parent.mkdir(mode=0o700, exist_ok=True)
        if self._file.parent.stat().st_uid != os.getuid():
            raise PermissionError(f"{self._file.parent} belongs to another user")
        passed = [[layer, reason, count] for (layer, reason), count in sorted(self.passed.items())]
        write_whole(self._file, json.dumps({"rank": self.rank, "tiles": tiles, "passed": passed}).encode())

    def _report(self) -> None:
        while not self._stop.wait(self.log_every):
            if self._news.is_set():
                self._news.clear()
                try:
                    self.report()
                except Exception:  # counting must not end a server, and must not go quiet
                    logger.exception("bsfa: counters cannot be reported any more")
                    return


def _short(names: list[str]) -> list[str]:
    """The names without the parts that all of them begin and end with."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]
