"""The command line: start-up time, exit codes, streams, and where option values come from."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer

from bsfa_cli import app as cli
from bsfa_cli import configuration, errors
from bsfa_cli.options import Config, Device, Dtype, Json

HEAVY = ("torch", "transformers", "triton", "numpy", "rich", "yaml", "safetensors")


def bsfa(*arguments: str, **environment_variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bsfa_cli", *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | environment_variables,
    )  # fmt: skip


@pytest.fixture
def command(monkeypatch):
    """Register a function as one more subcommand for the length of a test."""
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    return lambda function: cli.app.command("trial", cls=cli.Command)(function)


def test_help_is_fast_and_imports_nothing_heavy():
    # Processor time, not wall time: on a machine that other tests keep busy, waiting says nothing about bsfa. A slow
    # machine is told by what typer alone takes there.
    def spent(start) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = start()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    alone = min(spent(lambda: subprocess.run([sys.executable, "-c", "import typer"])) for _ in range(5))
    assert min(spent(lambda: bsfa("--help")) for _ in range(5)) < max(0.2, 2.5 * alone)
    done = bsfa("--help")
    for name in cli.COMMANDS:
        assert f"\n  {name}" in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2]  # what a command is for is said whole
    probe = f"import sys, bsfa_cli.app; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(run, name):
    result = run(name, "--help")
    assert result.code == 0 and result.err == ""
    assert "--config" in result.out


def test_version_goes_to_stdout(run):
    from importlib.metadata import version

    assert run("--version").out.strip() == version("bsfa")


@pytest.mark.parametrize(
    "arguments", [(), ("no-such-command",), ("env", "--no-such-option"), ("profile", "--seed", "many"),
                  ("profile", "--device", "tpu"), ("profile", "--dtype", "int4")]
)  # fmt: skip
def test_usage_errors_exit_with_2_and_leave_stdout_empty(run, arguments):
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err


def test_env_prints_json_and_nothing_else_on_stdout(run):
    result = run("env", "--json")
    facts = json.loads(result.out)
    assert result.code == 0
    assert {"bsfa", "python", "torch", "triton", "transformers", "cuda", "cudnn", "gpu", "driver"} <= set(facts)
    for backend in facts["backends"]:
        assert backend["available"] == (backend["reason"] is None)
    assert [backend["name"] for backend in facts["backends"] if backend["available"]][-1] == "reference"


def test_env_for_people_leaves_stdout_empty(run):
    result = run("env")
    assert result.code == 0 and result.out == ""
    assert "torch" in result.err and "reference: yes" in result.err


class OutOfMemory:
    """Stands for torch.OutOfMemoryError without a GPU."""

    def __new__(cls):
        import torch

        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nmore")


def backend_unavailable():
    from bsfa_kernels import BackendUnavailable

    return BackendUnavailable("backend 'hopper' cannot serve this call")


def thresholds_error():
    from bsfa_kernels.thresholds import ThresholdsError

    return ThresholdsError("heads: expected 8, got 4")


@pytest.mark.parametrize(
    "make, code, words",
    [
        (lambda: errors.GateFailed("too slow"), 1, "too slow"),
        (lambda: errors.UsageError("no such point"), 2, "no such point"),
        (lambda: errors.MachineError("no GPU"), 3, "no GPU"),
        (lambda: errors.InputError("bad file"), 4, "bad file"),
        (thresholds_error, 4, "expected 8, got 4"),
        (backend_unavailable, 3, "cannot serve"),
        (OutOfMemory, 3, "lower --length"),
        (MemoryError, 3, "lower --length"),
        (lambda: OSError(28, "No space left on device"), 3, "no space"),
        (lambda: PermissionError(13, "Permission denied", "/x"), 2, "/x"),
        (lambda: ZeroDivisionError("1/0"), 70, "this is a bug: ZeroDivisionError: 1/0"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_exception_becomes_a_sentence_and_an_exit_code(
    run, one_sentence, command, monkeypatch, tmp_path, make, code, words
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    @command
    def trial():
        raise make()

    one_sentence(run("trial"), code, words)
    written = list(tmp_path.glob("bsfa-traceback-*.txt"))
    assert len(written) == (code == 70)
    for file in written:
        assert "ZeroDivisionError" in file.read_text()


def test_traceback_on_request(run, command, monkeypatch):
    monkeypatch.setenv("BSFA_TRACEBACK", "1")

    @command
    def trial():
        raise errors.InputError("bad file")

    result = run("trial")
    assert result.code == 4 and "Traceback" in result.err


def test_interruption_exits_with_130_in_one_line(run, one_sentence, command):
    @command
    def trial():
        raise KeyboardInterrupt

    one_sentence(run("trial"), 130, "interrupted")


def test_a_reader_that_left_is_not_an_error_message():
    script = f"{sys.executable} -m bsfa_cli env --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")


@pytest.fixture
def seen(command):
    """The option values that a trial command received."""
    values = {}

    @command
    def trial(
        model: str = "embedded",
        top_k: Annotated[int, typer.Option("--top-k", "-k")] = 1,
        data: Annotated[list[str] | None, typer.Option()] = None,
        lengths: Annotated[str | None, typer.Option()] = None,
        fast: Annotated[bool, typer.Option("--fast/--slow")] = False,
        device: Device = "auto",
        dtype: Dtype = "auto",
        json: Json = False,
        config: Config = None,
    ):
        values.update(locals())

    return values


def test_file_then_environment_then_flags(run, seen, tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("top-k: 2\nlengths: [512, 1024]\ndata: a.txt\nfast: true\ndevice: cpu\ndtype:\n")
    assert run("trial", "--config", file).code == 0
    expected = {"top_k": 2, "lengths": "512,1024", "data": ["a.txt"], "fast": True, "device": "cpu", "dtype": "auto"}
    assert expected.items() <= seen.items()
    monkeypatch.setenv("BSFA_TRIAL_TOP_K", "3")
    run("trial", "--config", file)
    assert seen["top_k"] == 3
    run("trial", "--top-k", "4", "--config", file, "--slow")
    assert (seen["top_k"], seen["fast"], seen["lengths"]) == (4, False, "512,1024")


@pytest.mark.parametrize(
    "name, words",
    [
        ("BSFA_VERIFY_MIN_TOP", ("BSFA_VERIFY_MIN_TOP,", "did you mean BSFA_VERIFY_MIN_TOP1?")),
        ("BSFA_VERFY_MIN_TOP1", ("did you mean BSFA_VERIFY_MIN_TOP1?",)),
        ("BSFA_TRIAL_TOPK", ("did you mean BSFA_TRIAL_TOP_K?",)),
        ("BSFA_TRACEBAK", ("did you mean BSFA_TRACEBACK?",)),
        ("BSFA_WWWW", ("BSFA_WWWW", "BSFA_<COMMAND>_<OPTION>")),
    ],
)
def test_a_misspelt_variable_is_refused(run, one_sentence, seen, monkeypatch, name, words):
    monkeypatch.setenv(name, "1")
    one_sentence(run("trial"), 2, *words)
    assert seen == {} and run("trial", "--help").code == 0


def test_variables_of_other_commands_are_let_alone(run, seen, monkeypatch):
    monkeypatch.setenv("BSFA_VERIFY_MIN_TOP1", "0.9")
    monkeypatch.setenv("BSFA_TRACEBACK", "")
    assert run("trial").code == 0 and seen["top_k"] == 1


def test_one_file_may_hold_a_section_per_command(run, seen, tmp_path):
    file = tmp_path / "flow.yaml"
    file.write_text("trial: {top_k: 7}\nprofile: {seed: 3}\n")
    assert run("trial", "--config", file).code == 0
    assert seen["top_k"] == 7


def test_an_option_may_be_named_as_a_command_is(run, one_sentence, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("profile: no-such-profile\n")
    one_sentence(run("profile", "--config", file), 2, "no profile 'no-such-profile'")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"tpo-k: 2\n", ("unknown key 'tpo-k'", "run.yaml", "top-k", "device")),
        (b"config: other.yaml\n", ("unknown key 'config'",)),
        (b"top-k: 2\ntop-k: 3\n", ("'top-k' stands twice",)),
        (b"top-k: {a: 1}\n", ("'top-k'", "mapping")),
        (b"top-k: many\n", ("run.yaml: key 'top-k'", "'many'")),
        (b"fast: perhaps\n", ("run.yaml: key 'fast'", "'perhaps'")),
        (b"device: tpu\n", ("run.yaml: key 'device'", "'tpu'")),
        (b"- 1\n", ("must hold a mapping", "list")),
        (b"trial: 3\n", ("section 'trial'",)),
        (b"trial: {top-k: 2}\nverfy: {seed: 1}\n", ("unknown section 'verfy'", "verify")),
        (b"a: [\n", ("is not YAML",)),
        (b"\xff\xfe\x00", ("is not YAML",)),
        (b"top-k: !!python/object/apply:os.system ['true']\n", ("is not YAML",)),
        (None, ("cannot read", "run.yaml")),
    ],
)
def test_a_bad_configuration_file_is_refused(run, one_sentence, seen, tmp_path, content, words):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    one_sentence(run("trial", "--config", file), 2, *words)
    assert seen == {}


def test_cuda_asked_for_where_none_is(run, one_sentence, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_sentence(run("profile", "--device", "cuda"), 3, "--device cuda", "use --device cpu")


def test_known_keys_are_the_longest_flags(tmp_path):
    names = configuration._parameters(_context("profile"))
    assert {"lengths", "kv-heads", "causal", "fail-under", "output"} <= set(names)
    assert "config" not in names and "help" not in names


def _context(name: str):
    command = typer.main.get_command(cli.app).commands[name]
    return SimpleNamespace(command=command)
