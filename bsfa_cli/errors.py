"""What can end a command, and the exit code it ends with. Anything else is a bug (70)."""

from __future__ import annotations


class BsfaError(Exception):
    """One clear sentence for the user: what is wrong, where, and what was expected."""

    exit_code = 70


class GateFailed(BsfaError):
    """The work was done and the result is below what was asked for (accuracy, speed or skip rate)."""

    exit_code = 1


class UsageError(BsfaError):
    """Arguments or configuration that cannot be meant."""

    exit_code = 2


class MachineError(BsfaError):
    """This machine cannot do it: no GPU, not enough memory, a full disk."""

    exit_code = 3


class InputError(BsfaError):
    """An artifact, model or data file that cannot be used."""

    exit_code = 4
