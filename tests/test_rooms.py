"""The tool's rooms, lowest first: what a room imports lies below it, so that each can be read without those above."""

import ast
from pathlib import Path

import bsfa_kernels
import pytest

import bsfa_cli

ROOMS = (
    "console models metrics data suites calibration timing verification comparison presentation training experiments "
    "commands"
).split()
ROOT = Path(bsfa_cli.__file__).parent


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "bsfa_cli" and parts[1] in ROOMS else None


def imports(file: Path, root: Path = ROOT) -> set[str]:
    """Modules that a file of the package in `root` imports, wherever in it the import stands."""
    package = (root.name, *file.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders | {"console"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_below(room):
    files = [ROOT / f"{room}.py"] if room == "console" else sorted((ROOT / room).rglob("*.py"))
    below = ROOMS[: ROOMS.index(room) + 1]
    upwards = {
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files
        for module in imports(file)
        if (other := room_of(module)) and other not in below
    }
    assert not upwards


def test_the_runtime_knows_no_tool():
    runtime = Path(bsfa_kernels.__file__).parent
    assert not [
        f"{file} imports {module}"
        for file in sorted(runtime.rglob("*.py"))
        for module in imports(file, runtime)
        if module.split(".")[0] == "bsfa_cli"
    ]
