"""What can end a command, and the exit code it ends with. Anything else is a bug (70)."""

from __future__ import annotations

import re


def said(error: BaseException) -> str:
    """The first line of what an exception says; its class where it says nothing."""
    if isinstance(error, KeyError) and error.args:
        return f"there is no key '{error.args[0]}'"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def memory_wanted(error: BaseException) -> str:
    """How much was asked for when memory ran out, in brackets and behind a blank; nothing where it is not said."""
    found = re.search(r"tried to allocate ([\d.]+) ?(\w+)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    size, unit = found.groups()
    return f" (asked for {int(size) / 2**30:,.1f} GiB)" if unit == "bytes" else f" (asked for {size} {unit})"


class BsfaError(Exception):
    """One clear sentence for the user: what is wrong, where, and what was expected."""

    exit_code = 70


class GateFailed(BsfaError):
    """The work was done and the result is below what was asked for (accuracy, speed or skip rate)."""

    exit_code = 1


class OutOfReach(GateFailed):
    """An operating point that a calibration run cannot give."""


class UsageError(BsfaError):
    """Arguments or configuration that cannot be meant."""

    exit_code = 2


class MachineError(BsfaError):
    """This machine cannot do it: no GPU, not enough memory, a full disk."""

    exit_code = 3


class InputError(BsfaError):
    """An artifact, model or data file that cannot be used."""

    exit_code = 4


def unlike_its_format(path, error: Exception) -> InputError:
    """For a stored file that `error` was raised over; what Python says of its own objects is left out."""
    told = f": {said(error)}" if isinstance(error, (KeyError, ValueError, BsfaError)) else ""
    return InputError(f"{path} lacks or breaks what its format promises{told}")
