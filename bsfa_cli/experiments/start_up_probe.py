"""python -P start_up_probe.py FILE.json COMMAND ...: one command of bsfa, with a clock at every door it goes through;
with PACKAGES as COMMAND and a device, what no `bsfa calibrate` can do without, and nothing of bsfa.

What start_up.py runs in a fresh process. It imports nothing but the standard library before the command does, and
takes functions by their names, so that it can time any checkout on PYTHONPATH; names that are not there are listed.
Seconds are those of the main thread, each phase without those inside it. What other threads compile, as the backward
pass does on a GPU, is listed too, and the main thread's time meanwhile is a phase of its own: it waits for them.
"""

import time

BEGAN = time.perf_counter()

import gc  # noqa: E402
import importlib.machinery  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
from functools import wraps  # noqa: E402
from importlib.util import find_spec  # noqa: E402

WORK, CONTEXT, COMPILE = "the work itself", "CUDA context", "kernels compiled (Triton)"
PACKAGES = "packages"
LAUNCHERS, ELSEWHERE = "launchers compiled (C)", "compiled in other threads"
# {module: {function or method: phase}}
DOORS = {
    "torch.nn.modules.module": {"Module.to": "weights: to the device"},
    "torch.cuda": {"is_available": "GPU looked for", "_lazy_init": CONTEXT},
    "triton.runtime.jit": {"JITFunction._do_compile": COMPILE},
    "triton.runtime.build": {"compile_module_from_src": LAUNCHERS},
    "torch._dynamo.convert_frame": {"_compile": "torch.compile"},
    "subprocess": {"run": "other programs (git, nvidia-smi)"},
    "bsfa_cli.models.load": {
        "_read_config": "configuration",
        "_read_tokenizer": "tokenizer, processor",
        "_find_processor": "tokenizer, processor",
        "_read_weights": "weights: model built, read",
        "_check_finite": "weights: checked to be finite",
        "_identity": "weights: fingerprint",
    },
    "bsfa_cli.data.prompts": {"load_prompts": "texts"},
    "bsfa_cli.data.texts": {"load_texts": "texts"},
    "bsfa_cli.files": {"write_whole": "writing"},
    "bsfa_cli.calibration.store": {"Run._write": "writing"},
    "bsfa_kernels.files": {"write_whole": "writing"},
}


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Clock:
    """Seconds of the main thread by phase; `enter` and `leave` nest, and the inner phase's time is its own. Other
    threads that compile enter and leave `elsewhere`: while any does, the main thread's work counts as waiting for it.
    """

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self._stack, self._since = [WORK], began
        self._elsewhere, self._lock = 0, threading.Lock()

    def enter(self, phase: str) -> None:
        with self._lock:
            self._spend()
            self._stack.append(phase)

    def leave(self) -> None:
        with self._lock:
            self._spend()
            self._stack.pop()

    def elsewhere(self, more: int) -> None:
        """`more` threads besides the main one compile from now on; -1 where one has done."""
        with self._lock:
            self._spend()
            self._elsewhere += more

    def stop(self) -> float:
        with self._lock:
            self._spend()
            return self._since

    def timed(self, function, phase: str, after=None):
        """`function` with its time in `phase`; `after(result, seconds, *arguments)` sees what a call gave and took. In
        other threads only what compiles is timed.
        """

        @wraps(function)
        def call(*arguments, **options):
            main = in_main_thread()
            if not main and phase not in (COMPILE, LAUNCHERS):
                return function(*arguments, **options)
            if main:
                self.enter(phase)
            else:
                self.elsewhere(1)
            began = time.perf_counter()
            try:
                result = function(*arguments, **options)
                if after is not None:
                    after(result, time.perf_counter() - began, *arguments)
                return result
            finally:
                if main:
                    self.leave()
                else:
                    self.elsewhere(-1)

        return call

    def _spend(self) -> None:
        now = time.perf_counter()
        phase = self._stack[-1]
        if phase == WORK and self._elsewhere:
            phase = ELSEWHERE
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Doors:
    """Puts the clock at imports, by package, and at DOORS as soon as their modules are there."""

    def __init__(self, clock: Clock):
        self.clock, self.kernels, self.missing = clock, [], []
        self._torch_is_in = self._context_is_made = False

    def install(self) -> None:
        source, extension = importlib.machinery.SourceFileLoader, importlib.machinery.ExtensionFileLoader
        for loader, name in ((source, "exec_module"), (extension, "create_module"), (extension, "exec_module")):
            setattr(loader, name, self._import(getattr(loader, name)))
        for module in set(DOORS) & set(sys.modules):
            self._open(sys.modules[module])

    def _import(self, load):
        def loaded(loader, module):
            """`module` is a spec where a module is yet to be created."""
            name = getattr(module, "__name__", None) or module.name
            if not in_main_thread():
                found = load(loader, module)
            else:
                self.clock.enter(self._phase(name))
                try:
                    found = load(loader, module)
                finally:
                    self.clock.leave()
            self._torch_is_in |= name == "torch"
            if name in DOORS and hasattr(module, "__name__"):
                self._open(module)
            return found

        return loaded

    def _phase(self, name: str) -> str:
        top = name.partition(".")[0]
        return "import torch, more of it" if top == "torch" and self._torch_is_in else f"import {top}"

    def _open(self, module) -> None:
        for path, phase in DOORS[module.__name__].items():
            *owner, name = path.split(".")
            place = getattr(module, owner[0], None) if owner else module
            if not hasattr(place, name):
                self.missing.append(f"{module.__name__}.{path}")
                continue
            after = {COMPILE: self._compiled, CONTEXT: self._made}.get(phase)
            setattr(place, name, self.clock.timed(getattr(place, name), phase, after))

    def _compiled(self, result, seconds: float, function, *_) -> None:
        name = getattr(function, "__name__", "?")
        self.kernels.append({"name": name, "seconds": seconds, "other_thread": not in_main_thread()})

    def _made(self, *_) -> None:
        """CUDA makes its context at the first call that needs one; make it here, where its time has a name. Every call
        into CUDA comes by again.
        """
        if self._context_is_made:
            return
        self._context_is_made = True
        sys.modules["torch"].cuda.current_stream().synchronize()


def packages(device: str) -> None:
    """Import torch, Triton where it is, and the classes of the bundled model and its tokenizer, and make a CUDA
    context. As commands do: no garbage collection, and transformers does without scikit-learn and SciPy.
    """
    gc.disable()
    for name in ("sklearn", "scipy"):
        sys.modules[name] = None
    import torch

    if find_spec("triton") is not None:
        import triton  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    if torch.device(device).type == "cuda":
        torch.zeros(1, device=device)
    gc.freeze()  # nor one at the end


def bsfa(*arguments: str) -> int:
    """The exit code of a command."""
    from bsfa_cli.__main__ import main as command

    sys.argv = ["bsfa", *arguments]
    try:
        command()
    except SystemExit as done:
        return done.code
    return 0


def main() -> int:
    out, *arguments = sys.argv[1:]
    clock = Clock(BEGAN)
    doors = Doors(clock)
    doors.install()
    code = packages(*arguments[1:]) if arguments[0] == PACKAGES else bsfa(*arguments)
    ended = clock.stop()
    found = {"began": BEGAN, "ended": ended, "seconds": clock.seconds, "kernels": doors.kernels}
    with open(out, "w") as file:
        json.dump(found | {"modules": len(sys.modules), "missing": doors.missing}, file)
    return code


if __name__ == "__main__":
    sys.exit(main())
