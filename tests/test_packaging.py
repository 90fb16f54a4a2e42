"""What an installation holds, and that it leaves other packages' names alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path, **options) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_folder_is_packaged():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = {"bsfa_profiles"}
    for parent, top in ((ROOT / "kernels", "bsfa_kernels"), (ROOT, "bsfa_cli")):
        for init in (parent / top).rglob("__init__.py"):
            found.add(".".join(init.parent.relative_to(parent).parts))
    assert listed == found


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A plain (not editable) installation into an empty folder, built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("kernels", "bsfa_cli", "profiles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return target


def test_a_plain_installation_finds_its_own_files(installed, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import bsfa_cli, bsfa_kernels, bsfa_cli.app\n"
        "from bsfa_cli.timing import plan\n"
        "from bsfa_cli.models import bundled\n"
        "assert (bundled.BUNDLED / 'model.safetensors').is_file() and (bundled.BUNDLED / 'tokenizer.json').is_file()\n"
        "from bsfa_cli.presentation import figures\nassert figures.STYLE.is_file()\n"
        "from bsfa_cli.data import frames\nassert len(frames.digit_images(True)) == 10\n"
        "print(bsfa_cli.__file__, bsfa_kernels.__file__, plan._folder(), *plan.available(), sep='\\n')"
    )
    lines = python(code, tmp_path).splitlines()
    assert all(line.startswith(str(installed)) for line in lines[:3])
    assert lines[3:] == sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))


def test_a_plain_installation_claims_no_foreign_name(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {"bin"}
    assert names == {"bsfa_cli", "bsfa_kernels", "bsfa_profiles"}


def test_hugging_face_kernels_works_from_the_repository_root():
    code = (
        "import bsfa_kernels.integrations.transformers, kernels, transformers\n"
        "from kernels import get_kernel\n"
        "print(kernels.__file__)"
    )
    assert not Path(python(code, ROOT)).is_relative_to(ROOT / "kernels")


def test_the_runtimes_names_are_imported_when_they_are_used():
    code = (
        "import sys, bsfa_kernels, bsfa_kernels.files\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(bsfa_kernels.__all__) <= set(dir(bsfa_kernels))\n"
        "found = [getattr(bsfa_kernels, name).__name__ for name in bsfa_kernels.__all__]\n"
        "assert found == bsfa_kernels.__all__ and not hasattr(bsfa_kernels, 'nothing')\n"
        "assert 'torch._dynamo' not in sys.modules"  # takes as long as torch itself
    )
    python(code, ROOT)


def test_versions_agree():
    assert python("import bsfa_cli.environment as e; print(e._version('bsfa'))", ROOT) == PROJECT["project"]["version"]
