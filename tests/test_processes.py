"""bsfa calibrate with several processes: the bytes of one process, whatever is lost on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from bsfa_cli import app
from bsfa_cli.calibration import group
from bsfa_cli.calibration.claims import Claims
from bsfa_cli.calibration.curves import ModuleCurves
from bsfa_cli.calibration.group import Group
from bsfa_cli.calibration.store import Run

pytestmark = pytest.mark.long

RUN_FILES = ("run.json", "fit.safetensors", "heldout.safetensors")
SMALL = ["--samples", "5", "--length", "512", "--top-k", "1,2", "--device", "cpu"]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bsfa_cli")


def start(*arguments, launcher=("-m", "bsfa_cli")):
    return subprocess.Popen(
        [sys.executable, *launcher, "calibrate", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, random_model):
    """A run of one process."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bsfa", "calibrate", str(random_model), "-o", str(path), *SMALL])
        assert app.run() == 0
    return path


def contents(path):
    return {name: (path / name).read_bytes() for name in RUN_FILES}


def names(path):
    return {entry.name for entry in path.iterdir()}


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_lost_process_loses_its_sample_in_progress_and_another_does_it(finished, random_model, tmp_path):
    process = start(random_model, "-o", tmp_path / "run", *SMALL, "--processes", 2, "--json")
    lines = []
    for line in process.stderr:
        lines.append(line)
        if sum(" by process " in line for line in lines) == 1:
            os.kill(children(process)[-1], signal.SIGKILL)
            lines.append(" by process ")  # once
    assert process.wait() == 0, lines
    assert "process 2 was lost (SIGKILL), and its sample in progress with it\n" in lines
    assert contents(tmp_path / "run") == contents(finished) and names(tmp_path / "run") == {*RUN_FILES, ".lock"}
    told = json.loads(process.stdout.read())
    assert len(told["seconds"]) == 5 and sum(map(len, told["samples"].values())) == 5


def test_what_torchrun_began_and_a_signal_ended_one_process_goes_on_with(finished, random_model, tmp_path, run):
    path = tmp_path / "run"
    process = start(random_model, "-o", path, *SMALL, launcher=TORCHRUN)
    while not list(path.glob("*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    workers = children(process)
    assert len(workers) == 2
    for pid in [process.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    done = len(Run.open(path).finished())
    assert 1 <= done < 5
    result = run("calibrate", random_model, "-o", path, *SMALL)
    assert result.code == 0 and f"{done} of 5 samples are done" in result.err
    assert contents(path) == contents(finished) and names(path) == {*RUN_FILES, ".lock"}


def test_what_a_lost_process_was_writing_goes(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run")
    (path / ".sample-2.safetensors.67510604fad6f6dd.part").write_bytes(b"half a sam")
    Run.open(path).tidy()
    assert contents(path) == contents(finished) and names(path) == names(finished)


@pytest.fixture(scope="module")
def parts(finished, random_model, tmp_path_factory):
    """The run with its second and fourth samples stored by themselves, and the others missing."""
    from bsfa_cli.calibration.run import chosen_modules, forward
    from bsfa_cli.data.texts import load_texts
    from bsfa_cli.models.load import load_model

    path = tmp_path_factory.mktemp("parts") / "run"
    path.mkdir()
    shutil.copy(finished / "run.json", path)
    torn, loaded, device = Run.open(path), load_model(random_model, device="cpu"), torch.device("cpu")
    data = torn.manifest["options"]["data"]
    samples = load_texts(data, samples=5, length=512, tokenizer=loaded.tokenizer, shortest=256)
    modules = chosen_modules(loaded.model, None)[0]
    for index in (1, 3):
        curves = {name: ModuleCurves(torn.plan, module.query_heads, device) for name, module in modules.items()}
        forward(loaded.model, samples[index], curves, device)
        torn.save_sample(index, {name: module.tensors for name, module in curves.items()})
    return path


@pytest.fixture
def torn(parts, tmp_path):
    return Run.open(shutil.copytree(parts, tmp_path / "torn"))


def test_samples_stored_by_themselves_are_merged_in_their_order(torn, finished, random_model, run):
    ids = [sample["id"] for sample in torn.manifest["samples"]]
    assert torn.finished() == {ids[1], ids[3]}
    assert [sample["done"] for sample in json.loads(run("inspect", torn.path, "--json").out)["samples"]] == [
        False, True, False, True, False]  # fmt: skip
    torn.merge()  # sample 3 is the first that is held out, and 1 waits for 0
    assert torn.merged("heldout") == [ids[3]] and torn.loose() == [ids[1]] and torn.merged("fit") == []
    result = run("calibrate", random_model, "-o", torn.path, *SMALL, "--json")
    assert result.code == 0 and "2 of 5 samples are done" in result.err
    assert set(json.loads(result.out)["seconds"]) == {ids[0], ids[2], ids[4]}
    assert contents(torn.path) == contents(finished) and names(torn.path) == {*RUN_FILES, ".lock"}


def test_a_sample_that_was_merged_before_its_file_went_is_not_merged_twice(torn, finished):
    index = 3
    content = (torn.path / f"sample-{index}.safetensors").read_bytes()
    torn.merge()
    before = (torn.path / "heldout.safetensors").read_bytes()
    (torn.path / f"sample-{index}.safetensors").write_bytes(content)
    torn.merge()
    assert (torn.path / "heldout.safetensors").read_bytes() == before
    assert not (torn.path / f"sample-{index}.safetensors").exists()


def test_a_damaged_sample_is_refused(torn, random_model, run, one_sentence):
    file = torn.path / "sample-1.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    one_sentence(run("calibrate", random_model, "-o", torn.path, *SMALL), 4, "sample-1.safetensors is damaged")


def test_claims_keep_other_processes_out_and_end_with_their_process(tmp_path):
    code = (
        "import sys, pathlib\nfrom bsfa_cli.calibration.claims import Claims\n"
        "claims = Claims(pathlib.Path(sys.argv[1]))\nassert claims.take(2)\nprint('taken', flush=True)\ninput()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"taken\n"
    claims = Claims(tmp_path)
    assert claims.take(1) and not claims.take(2)
    other.kill()
    other.wait()
    assert claims.take(2)
    claims.close()


def test_a_group_keeps_others_from_its_run(finished, random_model, run, one_sentence):
    with Run.open(finished).lock(shared=True), Run.open(finished).lock(shared=True):
        one_sentence(run("calibrate", random_model, "-o", finished, *SMALL), 2, "another bsfa calibrate")


@pytest.mark.parametrize(
    "variables, arguments, said",
    [
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "2"},
         ["--processes", "3"], "--processes 3, but 2 processes were started"),
        (dict.fromkeys(("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "2", "RANK": "2"}, [],
         "RANK is 2, not a number below 2; start the processes by torchrun"),
        (dict.fromkeys(("RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": "2", "LOCAL_RANK": "one"}, [],
         "LOCAL_RANK is one, not a number below 2"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_model")
def test_an_environment_that_cannot_be_meant_is_refused(variables, arguments, said, tmp_path, run, monkeypatch,
                                                        one_sentence):  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    one_sentence(run("calibrate", "-o", tmp_path / "run", *SMALL, *arguments), 2, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_an_address_where_nobody_answers_is_given_up(tmp_path, run, monkeypatch, one_sentence):
    monkeypatch.setattr(group, "MEETING", timedelta(seconds=0.6))
    with socket.socket() as silent:  # bound, but nobody listens
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        place = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        said = f"nothing answers at MASTER_ADDR 127.0.0.1, MASTER_PORT {port} within 0.01 minutes"
        one_sentence(run("calibrate", "-o", tmp_path / "run", *SMALL), 3, said)
    monkeypatch.setenv("MASTER_ADDR", "a" * 80 + ".example")
    one_sentence(run("calibrate", "-o", tmp_path / "run", *SMALL), 3, "nothing answers at MASTER_ADDR aaa")
    assert not (tmp_path / "run").exists()


STUBBORN = """
import signal, subprocess, sys
from bsfa_cli.calibration import spawn

CHILD = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(flush=True); time.sleep(100)"

class Stubborn:
    def __init__(self, *_):
        self.handle = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        self.handle.stdout.readline()
        print(self.handle.pid, flush=True)

    def ended(self):
        return self.handle.poll()

spawn.Process = Stubborn
try:
    spawn.run(2, prints=False)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_no_process_behind(again):
    """Those that hear neither an interrupt nor a request to end: the first signal is patient, the second is not."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and all(Path(f"/proc/{pid}").exists() for pid in pids)
    told = time.monotonic()
    process.send_signal(again)
    assert process.communicate(timeout=30)[0] == "interrupted\n" and process.returncode == 0
    assert time.monotonic() - told < 5 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_interrupts_that_are_ignored_from_the_start_stay_so_and_a_request_to_end_is_passed_on():
    """As a shell without job control starts what runs in its background: its processes inherit that."""
    patient = STUBBORN.replace("[signal.signal(n, signal.SIG_IGN) for n in (2, 15)]", "None")
    assert patient != STUBBORN
    process = subprocess.Popen(
        [sys.executable, "-c", patient], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    pids = [int(process.stdout.readline()) for _ in range(2)]
    for pid in (*pids, process.pid):
        os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and all(Path(f"/proc/{pid}").exists() for pid in pids)
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "interrupted\n" and process.returncode == 0
    assert time.monotonic() - told < 5 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_nobody_goes_on_before_all_are_here():
    store, passed = torch.distributed.HashStore(), []

    def come(rank):
        Group(rank, 3, rank, store).meet("here")
        passed.append(rank)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    time.sleep(0.3)
    assert passed == []
    threads[2].start()
    for thread in threads:
        thread.join(30)
    assert sorted(passed) == [0, 1, 2]


@pytest.mark.usefixtures("no_model")
def test_a_gpu_for_each_process(monkeypatch):
    from bsfa_cli import environment
    from bsfa_cli.calibration.group import place_of
    from bsfa_cli.errors import MachineError, UsageError

    chosen = []
    monkeypatch.setattr(environment, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = torch.device("cuda", 1)
    assert place_of("auto", Group(1, 3, 1, None)) == second and chosen == [second]
    with pytest.raises(MachineError, match="process 3 of this machine has no GPU of its own: there are 2"):
        place_of("cuda", Group(2, 3, 2, None))
    with pytest.raises(UsageError, match="give --device cuda"):
        place_of("cuda:1", Group(0, 3, 0, None))
