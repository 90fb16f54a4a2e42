"""The Typer app and the one place where an exception becomes a sentence and an exit code.

Nothing heavy is imported before a command runs: command modules import torch inside their functions.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand
from typer.models import CommandInfo

from .errors import BsfaError, UsageError, memory_wanted, said
from .streams import open_closed_streams, write

TRACEBACK = "BSFA_TRACEBACK"
ELSEWHERE = ("BSFA_VERSION", "BSFA_THRESHOLDS", "BSFA_POINT")  # read by bsfa_kernels.integrations and others
COMMANDS = (
    "fetch", "calibrate", "export", "verify", "profile", "capture", "compare", "report", "inspect", "env",
)  # fmt: skip
BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
EPILOG = (
    "Every option can also come from --config FILE.yaml or from the environment (BSFA_<COMMAND>_<OPTION>): flags win "
    "over the environment, the environment over the file. Exit codes: 0 done, 1 a gate failed, 2 usage or "
    "configuration, 3 this machine cannot do it, 4 bad artifact or input file, 70 a bug, 130 interrupted, 141 whoever "
    "read the output is gone."
)


class _Stopped(BaseException):
    """Carries an exception past Typer, which would turn it into an exit code of its own."""


class Command(TyperCommand):
    """A subcommand whose interruptions reach `run` unchanged, and whose help names the variables' pattern once."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.epilog = f"Options also come from --config or the environment (BSFA_{self.name.upper()}_<OPTION>)."
        for parameter in self.params:
            parameter.show_envvar = False

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if not set(args) & set(ctx.help_option_names):
            _check_environment(ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context):
        try:
            result = super().invoke(ctx)
            write(sys.stdout)
            return result
        except (KeyboardInterrupt, BrokenPipeError) as stop:
            raise _Stopped() from stop


def _check_environment(ctx: typer.Context) -> None:
    """Raise UsageError for a BSFA_ variable that no command reads: a gate that is misspelt would never be judged."""
    known = {TRACEBACK, *ELSEWHERE} | _variables(ctx.info_name, ctx.command)
    unknown = sorted(name for name in os.environ if name.startswith("BSFA_") and name not in known)
    if not unknown:
        return
    for name, command in typer.main.get_command(app).commands.items():
        known |= _variables(name, command)
    for name in unknown:
        if name not in known:
            from difflib import get_close_matches

            nearest = get_close_matches(name, sorted(known), 1)
            raise UsageError(
                f"the environment sets {name}, which bsfa does not know"
                + (f"; did you mean {nearest[0]}?" if nearest else "; it is BSFA_<COMMAND>_<OPTION>")
            )


def _variables(name: str, command: TyperCommand) -> set[str]:
    return {f"BSFA_{name}_{parameter.name}".upper() for parameter in command.params}


SETTINGS = dict(
    name="bsfa",
    help="Block-Sparse FlashAttention: calibrate, export, verify and profile training-free sparse attention.",
    epilog=EPILOG,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "BSFA", "help_option_names": ["-h", "--help"]},
)
app = typer.Typer(**SETTINGS)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("bsfa"))
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True, show_envvar=False
        ),
    ] = False,
) -> None:
    pass


for _name in COMMANDS:
    _module = importlib.import_module(f".commands.{_name}", __package__)
    app.command(_name, cls=Command)(getattr(_module, _name))


def _needed(arguments: list[str]) -> typer.Typer:
    """The app with the options of only the command that is run: to read all signatures takes longer than to start."""
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    slim = typer.Typer(**SETTINGS)
    slim.registered_callback = app.registered_callback
    for command in app.registered_commands:

        def named():
            pass

        named.__doc__ = command.callback.__doc__
        name = command.name or command.callback.__name__
        slim.registered_commands.append(
            command if name == wanted else CommandInfo(name=name, cls=Command, callback=named)
        )
    return slim


def run() -> int:
    """Run the command line in sys.argv; returns the exit code. An error is one sentence on stderr."""
    open_closed_streams()
    try:
        _needed(sys.argv[1:])(prog_name="bsfa")
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # in Typer's own output, as of --help
            return _stopped(done.__context__)
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except (KeyboardInterrupt, _Stopped) as stop:
        return _stopped(stop.__cause__ or stop)
    except Exception as error:
        message, code = explain(error)
        if not message.isprintable():
            from bsfa_kernels.words import one_line

            message = one_line(message)
        if code == BUG or os.environ.get(TRACEBACK):
            message = _with_traceback(error, message)
        _say(f"bsfa: {message}")
        return code
    return 0


def explain(error: Exception) -> tuple[str, int]:
    """(one sentence, exit code) for an exception that ended a command."""
    if isinstance(error, BsfaError):
        return str(error), error.exit_code
    if _is_a(error, "bsfa_kernels.container", "Malformed"):
        return str(error), 4
    if _is_a(error, "bsfa_kernels.backends", "BackendUnavailable"):
        return str(error), 3
    if _out_of_memory(error):
        return f"out of memory{memory_wanted(error)}; lower {_memory_option()}", 3
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on the disk" + (f" of {error.filename}" if error.filename else ""), 3
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}" if error.filename else f"no permission: {said(error)}", 2
    return f"this is a bug: {type(error).__name__}: {said(error)}", BUG


def _is_a(error: Exception, module: str, name: str) -> bool:
    """isinstance without importing the module: when it was never imported, it raised nothing."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(error, kind)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or _is_a(error, "torch", "OutOfMemoryError"):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _memory_option() -> str:
    command = next((argument for argument in sys.argv[1:] if argument in COMMANDS), None)
    return {
        "profile": "--lengths or --heads",
        "compare": "--length or --heads",
        "export": "the number of operating points in one call",
    }.get(command, "--length, or choose a 16-bit --dtype")


def _stopped(stop: BaseException) -> int:
    if isinstance(stop, BrokenPipeError):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(UsageError, BrokenPipeError):
                write(stream)
        return BROKEN_PIPE
    _say("bsfa: interrupted")
    return INTERRUPTED


def _say(message: str) -> None:
    """The last line on stderr; a reader that is gone cannot be told."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _with_traceback(error: Exception, message: str) -> str:
    import tempfile
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK):
        return f"{text}bsfa: {message}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="bsfa-traceback-", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError:
        return f"{message} (set BSFA_TRACEBACK=1 to see the traceback)"
    return f"{message} (traceback in {file.name}; BSFA_TRACEBACK=1 prints it here)"
