"""A real vLLM on the CPU, in the venv that `make vllm` makes: an engine (vllm_engine.py) and its HTTP server.

Synthetic: the bundled model on random tokens, in float32. What is compared is one implementation with another.
"""

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import vllm_fakes

from bsfa_cli.models.bundled import BUNDLED

ROOT = Path(__file__).parents[1]
VENV = ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")
PYTHON = VENV / "bin" / "python"
MISSING = VENV / "missing.txt"  # written by `make vllm` where the index has no such package

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.long,
    pytest.mark.skipif(
        not PYTHON.exists() or MISSING.exists(),
        reason=MISSING.read_text().strip() if MISSING.exists() else "no .venv-vllm: make vllm makes it",
    ),
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1",
    # Half of the time is imports, of packages that uv installs uncompiled: the engine's are for the server too.
    "PYTHONDONTWRITEBYTECODE": "",
    # The worker is in the engine's process, as on a single GPU, which is another one than the server's all the same.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def environment() -> dict[str, str]:
    """That of a user who has installed bsfa beside vLLM: the plug-in is found by its entry points alone."""
    left_out = ("TRITON_INTERPRET", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in left_out} | ENVIRONMENT


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """(folder with the thresholds file, what the engine found, its log)."""
    folder = tmp_path_factory.mktemp("vllm")
    command = [PYTHON, ROOT / "tests" / "vllm_engine.py", folder, BUNDLED]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder, json.loads((folder / "found.json").read_text()), done.stdout + done.stderr


@pytest.fixture
def found(engine):
    return engine[1]


def test_with_everything_kept_tokens_are_vllms_own(found):
    """In chunks of whole query tiles and others, with decoding in the same batches."""
    assert all(len(set(tokens)) > 3 for tokens in found["tokens stock"])
    assert found["tokens keep"] == found["tokens keep, ragged"] == found["tokens stock"]


def test_absurd_thresholds_change_the_tokens(found):
    assert found["tokens absurd"] != found["tokens stock"]


def test_chunks_of_whole_tiles_are_transformers_whole_prompt(found):
    """Log-probabilities of the prompt and the very tiles, at a point where most are dropped."""
    expected, actual = found["transformers"], found["whole tiles"]
    skip = 1 - actual["kept"] / actual["candidates"]
    assert 0.3 < skip == pytest.approx(expected["skip"], abs=1e-9)
    assert distance(actual, expected).max() < 1e-3


def test_other_chunks_keep_more(found):
    """Nothing changes before the first query tile that no chunk holds whole; from there, more is kept."""
    whole, ragged = found["whole tiles"], found["ragged"]
    assert 0 < ragged["candidates"] - ragged["kept"] < whole["candidates"] - whole["kept"]
    changed = distance(ragged, whole)
    assert changed[:575].max() < 1e-3 < changed[575:].max()


def distance(one, other) -> torch.Tensor:
    one, other = (torch.tensor(x["log_probabilities"]) for x in (one, other))
    assert one.shape == other.shape and one.isfinite().all()
    return (one - other).abs()


@pytest.mark.parametrize("case, cached", [("prefix hit", 1024), ("prefix of another", 896)])
def test_a_prefix_from_the_cache_changes_nothing(found, case, cached):
    hit, missed = found[case], found["prefix missed"]
    assert (hit["cached"], missed["cached"]) == (cached, 0)
    assert hit["tokens"] == missed["tokens"] and distance(hit, missed).max() < 1e-3


def test_the_log_says_what_was_skipped(engine):
    _, found, log = engine
    assert "4 of 4 attention layers, matched by configuration, the weights not" in log
    rates = [float(rate) for rate in re.findall(r"bsfa: skipped ([\d.]+)% of [\d,]+ tiles", log)]
    skip = found["whole tiles"]["kept"] / found["whole tiles"]["candidates"]
    assert f"{1 - skip:.1%}" in {f"{rate}%" for rate in rates}
    assert found["passed"] == []


def test_the_gpus_backend_fits_this_vllm(found):
    """cuda.py imports, overrides what is there, and reads fields that exist; so do the stand-ins of its unit tests."""
    fits = found["cuda"]
    assert fits["name"] == "CUSTOM" and fits["graphs"] == "UNIFORM_BATCH"
    assert fits["pages"] == [128, 128, 256]
    assert fits["forward"] == fits["forward of vLLM"]
    assert set(vllm_fakes.CommonAttentionMetadata.__dataclass_fields__) <= set(fits["common"])
    for kind in (vllm_fakes.FlashAttentionImpl, vllm_fakes.FlashAttentionMetadataBuilder):
        for method in set(vars(kind)) & {"__init__", "forward", "build", "update_block_table"}:
            names = list(getattr(kind, method).__code__.co_varnames[: getattr(kind, method).__code__.co_argcount])
            assert names == fits["arguments"][f"{kind.__name__}.{method}"]


@pytest.fixture(scope="module")
def server(engine):
    """The address of `python -m vllm.entrypoints.openai.api_server` at the real point, on loopback."""
    folder, _, _ = engine
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = {"bsfa": {"thresholds": str(folder / "thresholds.safetensors"), "point": "real", "log_every": 0.5}}
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", BUNDLED, "--served-model-name", "m",
        "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", 2048,
        "--max-num-batched-tokens", 600, "--max-num-seqs", 8, "--block-size", 128,
        "--distributed-executor-backend", "uni",
        "--additional-config", json.dumps(options), "--scheduler-cls", "bsfa_kernels.integrations.vllm.TileScheduler",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), env=environment() | {"TMPDIR": str(folder)}, stdout=file, stderr=file
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait(lambda: get(f"{address}/health") is not None, process, log, 400)
        yield address, process, log
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    assert not list(folder.glob("bsfa-vllm-*"))  # nothing stays behind


def get(url: str, body: dict | None = None) -> str | None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read().decode()
    except ConnectionError:
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return None
        raise


def wait(happens, process, log, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
        time.sleep(0.2)


def test_the_server_answers_as_the_engine_does_and_shows_what_it_skipped(server, engine):
    (address, process, log), (folder, found, _) = server, engine
    tokens = found["prompts"]["long"]
    body = {"model": "m", "prompt": tokens, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    reply = json.loads(get(f"{address}/v1/completions", body | {"return_token_ids": True}))
    assert reply["choices"][0]["token_ids"] == found["tokens real"][0]

    def counts(name) -> float:
        lines = re.findall(rf"^vllm:bsfa_{name}_tiles_total{{(.*)}} (\S+)$", get(f"{address}/metrics"), re.MULTILINE)
        return sum(float(value) for _, value in lines)

    wanted = found["whole tiles"]
    wait(lambda: counts("candidate") == wanted["candidates"], process, log, 60)
    assert counts("kept") == wanted["kept"]
    assert "bsfa: skipped" in log.read_text() and list(folder.glob("bsfa-vllm-*/rank-0-*.json"))
