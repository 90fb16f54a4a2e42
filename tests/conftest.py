"""Shared by all tests. Tests marked `gpu` are deselected unless asked for (`-m gpu`, make gpu-test)."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

# Two pytest workers share two cores; more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
gc.disable()  # until all tests are collected: a third of the time, and hardly any garbage
# A shell's background jobs ignore interrupts, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _own_gpu_first() -> None:
    """Workers of pytest-xdist take a machine's GPUs in turns: each sees all of them, another one first."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker.isdigit() and "CUDA_VISIBLE_DEVICES" not in os.environ and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        gpus = [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]
        first = int(worker) % max(1, len(gpus))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])


_own_gpu_first()


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A folder with a small random model, which takes the place of the bundled one for the tests of a module."""
    import random_llama

    from bsfa_cli.models import bundled

    folder = tmp_path_factory.mktemp("random") / "model"
    random_llama.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled, "MODELS", (bundled.MODELS[0]._replace(folder=folder), *bundled.MODELS[1:]))
        yield folder


@pytest.fixture(name="one_round")
def timed_once():
    from one_round import one_round

    with one_round():
        yield


@pytest.fixture
def no_model(monkeypatch):
    """No weights may be loaded."""
    from bsfa_cli.models import load

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "_read_weights", loads)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process: run("env", "--json") has .code, .out and .err."""
    from bsfa_cli import app
    from bsfa_cli.console import console

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bsfa", *map(str, arguments)])
        console.cache_clear()
        code = app.run()
        console.cache_clear()
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def one_sentence():
    """The contract for every refusal: its exit code, one last line on stderr with these words, nothing on stdout."""

    def check(result, code: int, *words: str) -> None:
        assert result.code == code, result.err
        assert result.out == ""
        assert "Traceback" not in result.err
        lines = [line for line in result.err.splitlines() if line.startswith("bsfa: ")]
        assert len(lines) == 1 and result.err.rstrip().endswith(lines[0]), result.err
        for word in words:
            assert word in lines[0]

    return check


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that no worker begins one when the other has no more to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish():
    """What was imported is there to stay."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter):
    """The table of `make sweep`: which architectures agree, and what the others do."""
    if "SWEEP" not in os.environ:
        return
    rows = {}
    for report in terminalreporter.getreports("passed"):
        for case, found, reason in dict(report.user_properties).values():
            rows.setdefault((found, reason), []).append(case)
    for (found, reason), cases in sorted(rows.items()):
        terminalreporter.write_line(f"{found:10} {len(cases):4}  {reason}{reason and ': '}{', '.join(sorted(cases))}")
