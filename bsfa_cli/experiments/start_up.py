"""python -m bsfa_cli.experiments.start_up --out FILE.json [--tree NAME=CHECKOUT ...]

Where the time of a command goes before and beside its work: `bsfa calibrate`, `export`, `verify`, `profile` and
`compare` on the bundled model, each in a fresh process, first with empty caches of Triton and of torch.compile
("cold"), then with what this left in them ("warm"). Before them `packages`, which has nothing of bsfa: a process that
imports torch, Triton and the classes of a model and its tokenizer, makes a CUDA context and ends. With --tree, which
can be repeated, other checkouts take turns with one another; without it, this one. The first process on a machine also
reads all packages from its disk: `calibrate` of the first checkout goes ahead of the others, once ("first").
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..environment import commit, describe, resolve_device
from ..errors import InputError, UsageError
from ..files import check_writable, write_json
from . import end
from .start_up_probe import PACKAGES

PROBE = Path(__file__).with_name("start_up_probe.py")
HERE = Path(__file__).resolve().parents[2]
COMMANDS = (PACKAGES, "calibrate", "export", "verify", "profile", "compare")
SMALLEST = {"cuda": 4096, "cpu": 1024}  # a target of skipped tiles can be met from here on
IMPORTS = {
    "import bsfa_cli": "import: ours", "import bsfa_kernels": "import: ours", "import torch": "import: torch",
    "import torch, more of it": "import: torch, more of it", "import transformers": "import: transformers",
    "import triton": "import: triton",
}  # fmt: skip


class Tree(NamedTuple):
    """A checkout to time, and what it is called."""

    name: str
    folder: Path

    def path(self, site: Path) -> str:
        """PYTHONPATH of a process that is to run it, installed or not; its profiles are found by a link in `site`."""
        link = site / "bsfa_profiles"
        if not link.is_symlink():
            site.mkdir(exist_ok=True)
            link.symlink_to(self.folder / "profiles")
        own = [site, self.folder / "kernels", self.folder]
        return os.pathsep.join([*map(str, own), *filter(None, [os.environ.get("PYTHONPATH")])])


def lines(folder: Path, device: str, length: int) -> dict[str, list[str]]:
    """{command: its arguments for the probe}; each reads what those before it left in `folder`."""
    run, artifact = folder / "run", folder / "thresholds.safetensors"
    on, tokens = ["--device", device], ["--length", str(length)]
    return {
        PACKAGES: [PACKAGES, device],
        "calibrate": ["calibrate", "-o", str(run), "--samples", "2", *tokens, *on],
        "export": ["export", str(run), "-o", str(artifact), "--target-skip", "0.5"],
        "verify": ["verify", "--thresholds", str(artifact), "--samples", "1", "--max-kl-over-floor", "100", *tokens,
                   *on, "-o", str(folder / "verify.json")],
        "profile": ["profile", "--lengths", str(length), "--skip", "0.5", "--seconds", "0.05", *on,
                    "-o", str(folder / "profile.json")],
        "compare": ["compare", "--methods", "bsfa,pooled_top_p", "--length", str(length), "--heads", "8", "--seconds",
                    "0.05", *on, "-o", str(folder / "compare.json")],
    }  # fmt: skip


def run_once(tree: Tree, arguments: list[str], folder: Path) -> dict:
    """What one process took: {"wall_s", "cpu_s", "modules", "phases": {phase: s}, "packages", "kernels", "missing"}.
    `kernels` has {"name", "seconds", "other_thread"} of each that Triton compiled or read from its cache.

    Raises InputError, with the last line that it printed, for a command that fails.
    """
    found = folder / "probe.json"
    environment = os.environ | {"PYTHONPATH": tree.path(folder / "site"), "TRITON_CACHE_DIR": str(folder / "triton"),
                                "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", str(PROBE), str(found), *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        what = arguments[0] if arguments[0] == PACKAGES else f"bsfa {arguments[0]}"
        raise InputError(f"{tree.name}: {what} ended with {done.returncode}: {said}")
    probe = json.loads(found.read_text())
    phases, packages = _grouped(probe["seconds"])
    # The clock is the machine's own, the same in all processes.
    phases["interpreter: start"] = probe["began"] - began
    phases["interpreter: end"] = wall - (probe["ended"] - began)
    return {
        "wall_s": wall,
        "cpu_s": after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime,
        "modules": probe["modules"],
        "phases": phases,
        "packages": packages,
        "kernels": probe["kernels"],
        "missing": probe["missing"],
    }


def _grouped(seconds: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """(phases with small packages as one, {package: its import})."""
    phases, packages = {}, {}
    for phase, spent in seconds.items():
        if phase.startswith("import "):
            packages[phase.removeprefix("import ")] = spent
            phase = IMPORTS.get(phase, "import: other packages")
        phases[phase] = phases.get(phase, 0.0) + spent
    return phases, packages


def measure(
    trees: list[Tree], wanted: list[str], device: str, length: int, warm: int, folder: Path,
    save: Callable[[list[dict]], None],
) -> list[dict]:  # fmt: skip
    """Rows {"tree", "command", "cache": "first", "cold" or "warm"} with what `run_once` says, printed and saved as they
    come.
    """
    rows = []

    def add(tree: Tree, command: str, cache: str, place: Path) -> None:
        row = run_once(tree, lines(place, device, length)[command], place)
        rows.append({"tree": tree.name, "command": command, "cache": cache, **row})
        save(rows)
        compiled = sum(kernel["seconds"] for kernel in row["kernels"])
        others = sum(kernel["other_thread"] for kernel in row["kernels"])
        print(
            f"{tree.name:12} {command:10} {cache:5}  {row['wall_s']:6.2f} s, {row['cpu_s']:6.2f} s of CPU time, "
            f"{row['modules']:5} modules, {len(row['kernels']):3} kernels in {compiled:.2f} s"
            + (f", {others} of them in other threads" if others else ""),
            flush=True,
        )

    if "calibrate" in wanted:
        (folder / "first").mkdir()
        add(trees[0], "calibrate", "first", folder / "first")
    for turn in range(1 + warm):
        for command in COMMANDS:
            for tree in trees if turn % 2 == 0 else trees[::-1]:
                place = folder / f"of-{tree.name}"
                place.mkdir(exist_ok=True)
                if command == "calibrate":
                    _remove(place / "run")
                if command in wanted:
                    add(tree, command, "warm" if turn else "cold", place)
    return rows


def _remove(run: Path) -> None:
    """A run that was finished would not be calibrated again."""
    if run.exists():
        for file in run.iterdir():
            file.unlink()
        run.rmdir()


def show(rows: list[dict]) -> None:
    """Seconds of each phase, the fastest of the runs alike, a column for each."""
    best = {}
    for row in rows:
        key = row["tree"], row["command"], row["cache"]
        if key not in best or row["wall_s"] < best[key]["wall_s"]:
            best[key] = row
    phases = sorted({phase for row in best.values() for phase in row["phases"]})
    for tree in dict.fromkeys(key[0] for key in best):
        columns = [row for key, row in best.items() if key[0] == tree]
        print(f"\n{tree}: wall-clock seconds\n{'':36}" + "".join(f"{row['command']:>10}" for row in columns))
        print(f"{'':36}" + "".join(f"{row['cache']:>10}" for row in columns))
        for phase in phases:
            print(f"{phase:36}" + "".join(f"{row['phases'].get(phase, 0.0):10.2f}" for row in columns))
        print(f"{'together':36}" + "".join(f"{row['wall_s']:10.2f}" for row in columns))


def _trees(given: list[str]) -> list[Tree]:
    """Raises UsageError for what is no NAME=CHECKOUT."""
    trees = []
    for text in given:
        name, equals, folder = text.partition("=")
        folder = Path(folder)
        if not equals or not name.replace("-", "").isalnum():
            raise UsageError(f"--tree takes NAME=CHECKOUT, NAME of letters and digits, got {text!r}")
        for needed in ("bsfa_cli/__main__.py", "kernels/bsfa_kernels/api.py", "profiles/tiny.yaml"):
            if not (folder / needed).is_file():
                raise UsageError(f"--tree {text}: {folder} is no checkout of bsfa (it has no {needed})")
        if any(name == tree.name for tree in trees):
            raise UsageError(f"--tree {name} is given twice")
        trees.append(Tree(name, folder.resolve()))
    return trees or [Tree("this", HERE)]


def _commands(text: str) -> list[str]:
    """Raises UsageError for what is no list of COMMANDS, or one without what it reads."""
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in COMMANDS]
    if unknown:
        raise UsageError(f"--commands takes {', '.join(COMMANDS)}; got {unknown[0]!r}")
    for name, needed in (("export", "calibrate"), ("verify", "export")):
        if name in wanted and needed not in wanted:
            raise UsageError(f"--commands: {name} reads what {needed} writes; name that too")
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bsfa_cli.experiments.start_up", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=CHECKOUT", help="to time; repeatable")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="separated by commas; all by default")
    parser.add_argument("--warm", type=int, default=1, help="times that the filled cache is used")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, help="tokens; 4096 on a GPU and 1024 on a CPU by default")
    options = parser.parse_args()
    trees, wanted = _trees(options.tree), _commands(options.commands)
    if not 0 <= options.warm <= 100:
        raise UsageError(f"--warm must be from 0 to 100, got {options.warm}")
    check_writable(options.out)
    device = resolve_device(options.device)
    length = SMALLEST[device.type] if options.length is None else options.length
    if length < SMALLEST[device.type]:
        raise UsageError(f"--length must be at least {SMALLEST[device.type]}, got {length}")
    about = {"environment": describe(device), "device": str(device), "length": length}
    about |= {"trees": {tree.name: commit(tree.folder) for tree in trees}}

    def save(rows: list[dict]) -> None:
        write_json(options.out, about | {"runs": rows})

    with tempfile.TemporaryDirectory(prefix="bsfa-start-up-") as folder:
        rows = measure(trees, wanted, str(device), length, options.warm, Path(folder), save)
    show(rows)
    return 0


if __name__ == "__main__":
    end("start_up", main)
