"""What start-up costs and imports that no command needs, and the experiment that says where it goes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bsfa_cli.imports
from bsfa_cli import environment
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.experiments import start_up, start_up_probe
from bsfa_cli.imports import PUT_OFF, importing

FAKE = """
import pathlib
with open(pathlib.Path(__file__).with_name("imported.txt"), "a") as file:
    file.write(__name__ + "\\n")
def double(x):
    return 2 * x
roc_curve = linear_sum_assignment = double
"""


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """Folder of an sklearn and a scipy that note their import, before others on sys.path."""
    for name in PUT_OFF:
        package, module = name.split(".")
        (tmp_path / package).mkdir()
        for file in ("__init__", module):
            (tmp_path / package / f"{file}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in list(sys.modules):
        if name.split(".")[0] in ("sklearn", "scipy"):
            monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in list(sys.modules):
        if name.split(".")[0] in ("sklearn", "scipy") and str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]


def test_functions_that_are_put_off_import_when_they_are_called(fake_packages):
    with importing():
        from scipy.optimize import linear_sum_assignment as late
        from sklearn.metrics import roc_curve as later
    assert not list(fake_packages.glob("*/imported.txt")) and not set(PUT_OFF) & set(sys.modules)
    assert late(3) == later(3) == 6 and set(PUT_OFF) <= set(sys.modules)
    with importing():  # now it is there, and is taken as it is
        from scipy.optimize import linear_sum_assignment as now
    assert now is sys.modules["scipy.optimize"].linear_sum_assignment and late(1) == 2


@pytest.mark.parametrize(
    "script",
    [
        "from sklearn.metrics import double as found",
        "import sklearn.metrics.inside; found = sklearn.metrics.inside.double",
        "from sklearn.metrics import roc_curve; roc_curve(1); from sklearn.metrics import double as found",
    ],
)
def test_whoever_wants_more_has_it_imported_at_once(fake_packages, script):
    file = fake_packages / "sklearn" / "metrics.py"
    (fake_packages / "sklearn" / "metrics").mkdir()
    for name in ("__init__", "inside"):
        (fake_packages / "sklearn" / "metrics" / f"{name}.py").write_text(FAKE)
    file.unlink()
    names = {}
    with importing():
        exec(script, names)
    assert names["found"](3) == 6 and sys.modules["sklearn.metrics"].__spec__ is not None


def test_what_is_not_installed_is_not_there(monkeypatch):
    for name in ("sklearn", *PUT_OFF):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(bsfa_cli.imports, "find_spec", lambda name: None)
    with importing():
        assert not set(PUT_OFF) & set(sys.modules)


def test_collection_is_as_before_whatever_an_import_does():
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
        from bsfa_cli.imports import nothing  # noqa: F401
    assert gc.isenabled() and not any(name in sys.modules and not sys.modules[name].__spec__ for name in PUT_OFF)
    gc.unfreeze()


def test_nothing_is_kept_from_collection_where_nothing_new_came(monkeypatch):
    frozen = gc.get_freeze_count()
    with importing():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen
    try:
        with importing():
            for i in range(100):
                monkeypatch.setitem(sys.modules, f"bsfa_made_up_{i}", sys)
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def loaded(script: str, names: tuple[str, ...], path: str = "") -> str:
    """Which of the modules `names` a fresh Python has after `script`."""
    script = f"import sys\n{script}\nprint(*[name for name in {names!r} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([path, *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tensors_are_timed_and_compared_without_transformers_and_dynamo():
    imports = "from bsfa_cli.timing import run, compare\nfrom bsfa_cli.comparison import run"
    assert loaded(imports, ("transformers", "torch._dynamo", "sympy")) == ""


def test_models_are_loaded_without_what_transformers_takes_one_function_of(fake_packages):
    imports = (
        "from bsfa_cli.imports import importing\nwith importing():\n    from transformers import AutoModelForCausalLM"
    )
    names = "sklearn", "scipy", "transformers.generation.candidate_generator"
    assert loaded(imports, names, str(fake_packages)) == names[2]
    assert not list(fake_packages.glob("*/imported.txt"))


def test_the_driver_is_read_and_else_asked_for(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(environment, "DRIVER", str(file))
    monkeypatch.setattr(environment, "_output", lambda *command: "570.1\n570.1")
    driver = environment._driver.__wrapped__
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue Sep  9 10:00:00 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build  (dvs-builder@U22)",
    ):
        file.write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
        assert driver() == "580.159.03"
    file.write_text("something else")
    assert driver() == "570.1"
    file.unlink()
    assert driver() == "570.1"


def test_waking_a_gpu_never_fails(monkeypatch):
    started = []
    thread = SimpleNamespace(Thread=lambda target, name: SimpleNamespace(start=lambda: started.append(target)))
    monkeypatch.setattr(environment, "threading", thread)
    environment.wake(torch.device("cpu"))
    assert not started
    environment.wake(torch.device("cuda", 99))
    started[0]()


def test_phases_are_those_of_the_command(tmp_path, monkeypatch, capsys):
    """One real command, `export` of a run that is none: what it imports is timed, and its failure is a sentence."""
    tree = start_up.Tree("this", start_up.HERE)
    found = start_up.run_once(tree, ["env", "--json"], tmp_path)
    phases = found["phases"]
    assert found["missing"] == [] and found["kernels"] == []
    assert {"import: torch", "import: ours", "interpreter: end", "the work itself"} <= set(phases)
    assert abs(sum(phases.values()) - found["wall_s"]) < 1e-6 and min(phases.values()) >= 0
    assert 0 < phases["import: torch"] < found["wall_s"] and found["cpu_s"] > 0 and "numpy" in found["packages"]
    with pytest.raises(InputError, match="this: bsfa inspect ended with 4: bsfa: .*nothing"):
        start_up.run_once(tree, ["inspect", str(tmp_path / "nothing")], tmp_path)


def test_packages_alone_are_timed_with_nothing_of_ours(tmp_path):
    tree = start_up.Tree("this", start_up.HERE)
    found = start_up.run_once(tree, start_up.lines(tmp_path, "cpu", 1024)["packages"], tmp_path)
    phases, packages = found["phases"], found["packages"]
    assert {"torch", "transformers"} <= set(packages) and ("triton" in packages) == (find_spec("triton") is not None)
    assert not any("bsfa" in name for name in packages) and "import: ours" not in phases
    assert abs(sum(phases.values()) - found["wall_s"]) < 1e-6 and phases["import: transformers"] > 0


def test_the_context_is_made_once_and_has_its_time(monkeypatch):
    """On a made-up torch.cuda: on the real one every call begins with _lazy_init too."""
    calls = []
    cuda = ModuleType("torch.cuda")

    def made():
        calls.append("synchronize")
        time.sleep(0.05)

    def current_stream():
        cuda._lazy_init()
        return SimpleNamespace(synchronize=made)

    cuda._lazy_init, cuda.is_available, cuda.current_stream = lambda: calls.append("init"), lambda: True, current_stream
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    clock = start_up_probe.Clock(time.perf_counter())
    doors = start_up_probe.Doors(clock)
    doors._open(cuda)
    assert cuda.is_available()
    cuda._lazy_init()
    cuda._lazy_init()
    clock.stop()
    assert calls == ["init", "init", "synchronize", "init"] and doors.missing == []
    assert clock.seconds[start_up_probe.CONTEXT] >= 0.05 > clock.seconds[start_up_probe.WORK]


def test_compiled_kernels_are_listed_by_name(monkeypatch):
    jit = ModuleType("triton.runtime.jit")

    class JITFunction:
        __name__ = "attend"

        def _do_compile(self, key):
            return key

    jit.JITFunction = JITFunction
    doors = start_up_probe.Doors(start_up_probe.Clock(time.perf_counter()))
    doors._open(jit)
    assert JITFunction()._do_compile("key") == "key"
    assert [(kernel["name"], kernel["other_thread"]) for kernel in doors.kernels] == [("attend", False)]
    doors._open(ModuleType("triton.runtime.build"))
    assert doors.missing == ["triton.runtime.build.compile_module_from_src"]


def test_what_other_threads_compile_is_no_work_of_the_main_thread():
    """As autograd's backward pass does on a GPU; here two threads at once, and what they compile fails once."""
    jit = ModuleType("triton.runtime.jit")
    both = threading.Barrier(2)

    class JITFunction:
        __name__ = "costs"

        def _do_compile(self, fails):
            both.wait()
            time.sleep(0.1)
            if fails:
                raise ValueError("does not compile")

    jit.JITFunction = JITFunction
    clock = start_up_probe.Clock(time.perf_counter())
    doors = start_up_probe.Doors(clock)
    doors._open(jit)

    def compiles(fails):
        with suppress(ValueError):
            JITFunction()._do_compile(fails)

    threads = [threading.Thread(target=compiles, args=[fails]) for fails in (False, True)]
    began = clock._since
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.05)
    clock.enter("writing")
    clock.leave()
    taken = clock.stop() - began
    (kernel,) = doors.kernels
    assert kernel["name"] == "costs" and kernel["other_thread"] and kernel["seconds"] >= 0.1
    assert clock.seconds[start_up_probe.ELSEWHERE] >= 0.1 and clock.seconds[start_up_probe.WORK] >= 0.05
    assert start_up_probe.COMPILE not in clock.seconds and abs(sum(clock.seconds.values()) - taken) < 1e-9


def test_other_phases_are_not_timed_in_other_threads():
    clock = start_up_probe.Clock(time.perf_counter())
    thread = threading.Thread(target=clock.timed(time.sleep, "writing"), args=[0.01])
    thread.start()
    thread.join()
    clock.stop()
    assert set(clock.seconds) == {start_up_probe.WORK}


def test_checkouts_take_turns_and_the_table_has_the_fastest(tmp_path, monkeypatch, capsys):
    asked = []

    def pretended(tree, arguments, folder):
        asked.append((tree.name, arguments[0], (folder / "run").exists()))
        if arguments[0] == "calibrate":
            (folder / "run").mkdir()
            (folder / "run" / "run.json").write_text("{}")
        wall = 2.0 + len(asked)
        return {"wall_s": wall, "cpu_s": 1.0, "modules": 9, "phases": {"import: torch": wall}, "packages": {},
                "kernels": [{"name": "k", "seconds": 0.25, "other_thread": True}], "missing": []}  # fmt: skip

    monkeypatch.setattr(start_up, "run_once", pretended)
    out = tmp_path / "out.json"
    argv = ["start_up", "--out", str(out), "--tree", f"a={start_up.HERE}", "--tree", f"b={start_up.HERE}",
            "--commands", "calibrate,export", "--warm", "2", "--device", "cpu"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    assert start_up.main() == 0
    names = [(tree, command) for tree, command, _ in asked]
    assert names.pop(0) == ("a", "calibrate")  # ahead, for the disk's sake
    one = [("a", "calibrate"), ("b", "calibrate"), ("a", "export"), ("b", "export")]
    other = [("b", "calibrate"), ("a", "calibrate"), ("b", "export"), ("a", "export")]
    assert names == one + other + one
    assert not any(there for _, command, there in asked if command == "calibrate")
    result = json.loads(out.read_text())
    assert [run["cache"] for run in result["runs"]] == ["first"] + ["cold"] * 4 + ["warm"] * 8
    assert result["trees"] == dict.fromkeys("ab", environment.commit())
    table = capsys.readouterr().out
    assert "1 kernels in 0.25 s, 1 of them in other threads" in table and "together" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tree", "here"], "NAME=CHECKOUT"),
        (["--tree", "../x=."], "NAME=CHECKOUT"),
        (["--tree", "a=/nowhere"], "no checkout of bsfa"),
        (["--tree", f"a={start_up.HERE}", "--tree", f"a={start_up.HERE}"], "twice"),
        (["--commands", "calibrate,fly"], "got 'fly'"),
        (["--commands", "verify"], "verify reads what export writes"),
        (["--warm", "-1"], "--warm must be"),
        (["--length", "8", "--device", "cpu"], "--length must be at least 1024"),
    ],
)
def test_bad_arguments_are_refused(monkeypatch, tmp_path, arguments, words):
    monkeypatch.setattr(sys, "argv", ["start_up", "--out", str(tmp_path / "out.json"), *arguments])
    with pytest.raises(UsageError, match=words):
        start_up.main()
    assert not list(tmp_path.iterdir())
