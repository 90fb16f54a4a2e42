"""What counts as clean in a report of compute-sanitizer."""

from pathlib import Path

import pytest
import sanitize
import torch
from bsfa_kernels import hopper_kernel

from bsfa_cli.errors import MachineError
from bsfa_cli.experiments import end

STORED = Path(__file__).parents[1] / "profiles" / "results" / "checks" / "sanitize-hopper.nvidia-h200.txt"
RACE = """========= Error: Race reported between Read access at _forward+0x260 in hopper.py:321
=========     and Write access at _forward+0xa230 in hopper.py:{line} [26 hazards]
=========
"""


def test_only_races_between_dispatch_lines_are_let_pass():
    dispatch = {"hopper.py:321", "hopper.py:395"}
    assert sanitize.faults(RACE.format(line=395), dispatch) == []
    assert len(sanitize.faults(RACE.format(line=165), dispatch)) == 2
    assert len(sanitize.faults(RACE.format(line=395), set())) == 2


def test_memory_errors_count_and_a_clean_summary_does_not():
    invalid = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
    assert sanitize.faults(invalid, {"hopper.py:321"})
    assert sanitize.faults("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", set()) == []


def test_the_stored_report_is_clean_by_these_rules():
    assert sanitize.faults(STORED.read_text(), {"hopper.py:321", "hopper.py:395"}) == []


def test_the_report_on_todays_kernel_is_clean_where_its_dispatch_is_known():
    said = (STORED.parent / "racecheck.nvidia-h200.txt").read_text().partition("racecheck: =")[0]
    assert said.count("Race reported") > 40 and said.count(": right, ") == 18
    lines = {f"hopper_kernel.py:{line}" for line in (398, 416, 417, 428)}  # as of commit e196b36
    assert sanitize.faults(said, lines) == [] and sanitize.faults(said, lines - {"hopper_kernel.py:416"})


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_portable_kernel_is_clean_without_exceptions(tool):
    said = (STORED.parent / f"{tool}-triton.nvidia-h200.txt").read_text()
    assert sanitize.faults(said, set()) == [] and f"{tool}: clean" in said
    assert said.count(": right, ") == 18 and "statistics: right" in said


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_hopper_and_split_kv_are_clean_but_for_dispatch(tool):
    said = (STORED.parent / f"{tool}-hopper.nvidia-h200.txt").read_text()
    lines = {f"hopper_kernel.py:{line}" for line in (427, 445)}  # as of commit 1688eba
    assert sanitize.faults(said, lines) == [] and f"{tool}: clean" in said
    assert bool(sanitize.faults(said, lines - {"hopper_kernel.py:445"})) == (tool == "racecheck")
    assert said.count("\nhopper ") == 18 and said.count("\nsplit_kv ") == 5 and said.count(": right") == 23


def test_dispatch_lines_are_found():
    source = Path(hopper_kernel.__file__).read_text().splitlines()
    lines = sorted(int(line.rpartition(":")[2]) for line in sanitize.dispatch_lines())
    found = [source[line - 1].strip() for line in lines]
    assert found == ["def forward(", "if VARIANT.consumers == 3:", *["gl.warp_specialize("] * 2]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "sanitize: give memcheck or racecheck"),
        (["initcheck"], 2, "sanitize: give memcheck or racecheck, got 'initcheck'"),
        (["memcheck", "torch"], 2, "sanitize: backends are hopper, triton, split_kv; got 'torch'"),
        (["racecheck"], 3, "sanitize: compute-sanitizer is not on PATH; it comes with the CUDA toolkit"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(arguments, code, said, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as ended:
        end("sanitize", lambda: sanitize.main(arguments))
    assert ended.value.code == code and capsys.readouterr().err.strip() == said


def test_without_a_gpu_nothing_is_called_clean_or_failed(monkeypatch, tmp_path, capfd):
    """Under a compute-sanitizer that watches nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="no CUDA here"):
        sanitize.calls(sanitize.BACKENDS)
    pretended = tmp_path / "compute-sanitizer"
    pretended.write_text("#!/bin/sh\necho 'calls: no CUDA here'\nexit 3\n")
    pretended.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sanitize.main(["memcheck"]) == 3
    said = capfd.readouterr()
    assert said.out == "calls: no CUDA here\n" and said.err == ""
