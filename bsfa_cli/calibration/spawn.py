"""Start the processes of a command with `--processes N`, see to them, and end as they end.

Each runs the same command in an environment that says who it is, as under torchrun. One that fails ends the others too;
whether one that a signal ends can be done without, the command knows: another takes up its sample of a calibration, but
nobody its questions.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

from ..console import note
from ..errors import BsfaError, MachineError

SAID = "bsfa: "  # how the last line of a command that fails begins
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1


class ProcessFailed(BsfaError):
    """A process said why it ended, and with which exit code."""

    def __init__(self, sentence: str, exit_code: int):
        super().__init__(sentence)
        self.exit_code = exit_code


class Process:
    """One process of the group. What it says for people is passed on, but for its last sentence, kept in `sentence`."""

    def __init__(self, rank: int, size: int, port: int):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        # Where the first one fails, others would show the broken connection with a stack of C++ frames.
        defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.sentence = None
        self.handle = subprocess.Popen(
            [sys.executable, "-m", "bsfa_cli", *sys.argv[1:]],
            env=defaults | dict(os.environ) | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    def _pass_on(self) -> None:
        for line in self.handle.stderr:
            if line.startswith(SAID):
                self.sentence = line.removeprefix(SAID).rstrip()
            else:
                note(line.rstrip("\n"))

    def ended(self) -> int | None:
        """Its exit code, negative for a signal, once it has ended and said what it had to say; else None."""
        code = self.handle.poll()
        if code is not None:
            self._reader.join(GRACE_SECONDS)
        return code


class Signals:
    """SIGINT and SIGTERM of this process: counted, and the first that comes while `raises` is a KeyboardInterrupt."""

    def __init__(self):
        self.count, self.raises = 0, False

    def __call__(self, *_) -> None:
        self.count += 1
        if self.raises:
            self.raises = False
            raise KeyboardInterrupt


def run(processes: int, prints: bool, replaceable: bool = True) -> None:
    """Run the command that this process was given in `processes` processes. `prints`: the first one prints a result.
    `replaceable`: what a lost process was at, another one does.

    Raises what the first one that failed says, with its exit code; MachineError where all were lost, or one that cannot
    be replaced; KeyboardInterrupt once an interrupted group has ended, or one whose parent was told to end (SIGTERM).
    A second signal kills what has not ended by then. A signal that this process was started to ignore stays ignored.
    """
    port, codes, group, signals = _free_port(), {}, [], Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    try:
        try:
            for number in heard:  # held back, or the process that is being started would go on without us
                signal.signal(number, signals)
            for rank in range(processes):
                group.append(Process(rank, processes, port))
            signals.raises = True
            if signals.count:
                raise KeyboardInterrupt
            while len(codes) < processes:
                time.sleep(POLL_SECONDS)
                for rank, process in enumerate(group):
                    if rank not in codes and (code := process.ended()) is not None:
                        codes[rank] = code
                        _judge(group, rank, code, replaceable)
        finally:
            signals.raises = False  # held back again, or nobody would end the processes
    finally:
        # Interrupts that are ignored here (in a shell's background) the processes ignore too: they have to be told.
        interrupted = signal.SIGINT in heard and isinstance(sys.exception(), KeyboardInterrupt)
        _stop(group, signals, interrupted)
        for number in heard:
            signal.signal(number, before[number])
    if 0 not in codes.values():
        raise MachineError("every process was lost; the same command resumes the run")
    if codes[0] != 0 and prints:
        raise MachineError("the process that prints the result was lost; the run is complete: repeat the command")


def _judge(group: list[Process], rank: int, code: int, replaceable: bool) -> None:
    if code == -signal.SIGINT or code == 130:
        raise KeyboardInterrupt
    if code < 0:
        lost = f"process {rank + 1} was lost ({signal.Signals(-code).name})"
        if not replaceable:
            raise MachineError(f"{lost}, and its answers with it; repeat the command")
        note(f"{lost}, and its sample in progress with it")
    if code > 0:
        # Where the first one fails, the others fail to find it, and it is the one that knows why.
        first = _end(group[0], GRACE_SECONDS / 5) if rank else None
        rank, code = (0, first) if first is not None and first > 0 else (rank, code)
        raise ProcessFailed(group[rank].sentence or f"process {rank + 1} ended with exit code {code}", code)


def _end(process: Process, seconds: float) -> int | None:
    """The exit code of a process that ends within `seconds`."""
    until = time.monotonic() + seconds
    while (code := process.ended()) is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return code


def _stop(group: list[Process], signals: Signals, interrupted: bool) -> None:
    """End the processes that still run. A terminal has interrupted them already, and they need a moment to say so; none
    once another signal has come.
    """
    patience = signals.count
    for send in (None if interrupted else signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        if signals.count > patience and send != signal.SIGKILL:
            continue
        running = [process for process in group if process.ended() is None]
        for process in running:
            if send is not None:
                with suppress(ProcessLookupError):
                    process.handle.send_signal(send)
        until = time.monotonic() + (GRACE_SECONDS if send is not None else GRACE_SECONDS / 5)
        while time.monotonic() < until and any(process.ended() is None for process in running):
            if signals.count > patience and send != signal.SIGKILL:
                break
            time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
