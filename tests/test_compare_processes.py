"""bsfa compare with several processes, each one really there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

SMALL = (
    "--tasks", "multi-key", "--questions", "2", "--samples", "1", "--methods", "sliding_window", "--setting",
    "sliding_window=128", "--seconds", "0.001", "--device", "cpu", "--processes", "2",
)  # fmt: skip


def start(model, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "bsfa_cli", "compare", str(model), *SMALL, *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_two_processes_ask_and_one_writes_to_a_new_folder(tmp_path):
    process = start("bundled", "--length", "640,700", "--json", "-o", tmp_path / "new" / "deep" / "out.json")
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result == json.loads((tmp_path / "new" / "deep" / "out.json").read_text()) and result["complete"]
    for cell in result["cells"]:
        assert cell["processes"] == 2 and cell["dense_accuracy"]["tasks"]["multi-key"]["questions"] == 2
    assert err.splitlines().count(f"created the folder {tmp_path / 'new' / 'deep'}") == 1


@pytest.mark.parametrize("sent, victim, code, said", [
    (signal.SIGTERM, "parent", 130, "bsfa: interrupted"),
    (signal.SIGKILL, "second", 3, "bsfa: process 2 was lost (SIGKILL), and its answers with it; repeat the command"),
])  # fmt: skip
def test_one_that_ends_takes_the_others_along(sent, victim, code, said, random_model, tmp_path):
    process = start(random_model, "--length", "512", "--json", "-o", tmp_path / "out.json")
    while len(started := children(process)) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid if victim == "parent" else started[1], sent)
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "") and err.rstrip().splitlines()[-1] == said
    assert not any(Path(f"/proc/{pid}").exists() for pid in started) and not list(tmp_path.iterdir())
