"""run.json: every field that is read must be there and be what it should, or the sentence names it."""

import copy
import json
import shutil

import pytest
from bsfa_kernels.container import Malformed

from bsfa_cli.calibration import manifest

SOUND = {
    "schema": 2,
    "model": {"id": "m", "architecture": None, "layers": 2},
    "data": {"hash": "0", "spec": "builtin:mixed", "modalities": ["text"]},
    "options": {
        "tile": [64, 128], "top_k": [1, 2], "seed": 0, "length": 512, "data": "d", "device": "cpu", "dtype": "float32",
        "scores": "int8", "gradients": False,
    },
    "modules": {"layers.0": 4},
    "samples": [{"id": "a", "tokens": 512, "role": "fit", "source": "s"}],
    "software": {},
}  # fmt: skip
MAY_LACK = {("model", "layers"), ("data", "modalities"), ("options", "scores"), ("options", "gradients")}
MAY_BE_NULL = {("model", "architecture"), ("model", "layers"), ("data", "modalities")}
FIELDS = [(part, key) for part in ("model", "data", "options") for key in SOUND[part]] + [
    ("samples", 0, key) for key in SOUND["samples"][0]
]


def changed(field, *value):
    found = copy.deepcopy(SOUND)
    *parents, last = field
    place = found
    for parent in parents:
        place = place[parent]
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return found


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: ".".join(map(str, field)))
def test_a_field_that_is_missing_or_something_else(field):
    manifest.check(SOUND)
    for wrong in (-1.5, {"x": [1]}, [None], [-1, 5]):
        with pytest.raises(Malformed, match=f"{field[-1]} must be "):
            manifest.check(changed(field, wrong))
    if field not in MAY_LACK:
        with pytest.raises(Malformed, match=f"lacks {field[-1]}"):
            manifest.check(changed(field))
    if field not in MAY_BE_NULL:
        with pytest.raises(Malformed, match=f"{field[-1]} must be "):
            manifest.check(changed(field, None))


@pytest.mark.parametrize(
    "field, value",
    [(("samples",), []), (("samples",), None), (("modules", "layers.0"), 0), (("modules",), 3), (("software",), "x")],
)
def test_a_part_that_is_something_else(field, value):
    with pytest.raises(Malformed, match=f"{field[0]}.* must be "):
        manifest.check(changed(field, value))


def test_every_command_that_reads_a_run_says_so(run, one_sentence, tmp_path, random_model):
    path = tmp_path / "run"
    small = ("--samples", 1, "--length", 512, "--device", "cpu", "--top-k", 1)
    assert run("calibrate", "-o", path, *small).code == 0
    stored = json.loads((path / "run.json").read_text())
    stored["options"]["tile"] = [64, None]
    (path / "run.json").write_text(json.dumps(stored))
    words = ("run.json is damaged: options.tile must be two numbers, rows and keys",)
    one_sentence(run("inspect", path), 4, *words)
    one_sentence(run("export", path, "-o", tmp_path / "t", "--target-skip", 0.1), 4, *words)
    one_sentence(run("export", path, "-o", tmp_path / "t", "--target-skip", 0.1, "--to", "trtllm"), 4, *words)
    one_sentence(run("calibrate", "-o", path, *small), 4, *words)
    one_sentence(run("compare", "bundled", "--run", path, "--methods", "bsfa"), 4, *words)
    shutil.rmtree(path)
