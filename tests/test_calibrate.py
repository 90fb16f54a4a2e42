"""bsfa calibrate and bsfa export end to end: resuming after any end, refusals, and what the artifact then does."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from bsfa_kernels.thresholds import Thresholds
from random_llama import build, build_tokenizer

from bsfa_cli import app
from bsfa_cli.calibration import run as calibration
from bsfa_cli.calibration.store import Run

pytestmark = pytest.mark.usefixtures("random_model")
RUN_FILES = ("run.json", "fit.safetensors", "heldout.safetensors")
SMALL = ["--samples", "5", "--length", "768", "--top-k", "1,2,3", "--device", "cpu"]


@pytest.fixture
def bsfa(monkeypatch, capfd):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bsfa", *map(str, arguments)])
        code = app.run()
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, random_model):
    """A finished run."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bsfa", "calibrate", "-o", str(path), *SMALL])
        assert app.run() == 0
    return path


@pytest.fixture
def forked(monkeypatch):
    """Start a command in a process of its own, which begins with `prelude` and has all imports already."""

    def call(prelude, *arguments):
        def work():
            prelude()
            sys.exit(app.run())

        monkeypatch.setattr(sys, "argv", ["bsfa", *map(str, arguments)])
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process

    return call


def contents(path):
    return {name: (path / name).read_bytes() for name in RUN_FILES}


def die_in_sample_3():
    forward, calls = calibration.forward, []

    def dying(*arguments):
        calls.append(1)
        forward(*arguments)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    calibration.forward = dying


def die_while_writing():
    replace, calls = os.replace, []

    def dying(source, target):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = dying


@pytest.mark.parametrize("prelude, survived", [(die_in_sample_3, 2), (die_while_writing, 2)])
def test_kill_loses_the_sample_in_progress_and_the_same_command_ends_in_the_same_bytes(
    prelude, survived, finished, tmp_path, bsfa, forked
):
    path = tmp_path / "run"
    process = forked(prelude, "calibrate", "-o", path, *SMALL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sum(len(Run.open(path).load(role)[0]) for role in ("fit", "heldout")) == survived
    code, _, errors = bsfa("export", path, "-o", tmp_path / "t", "--target-skip", "0.1")
    assert code == 4 and "is not finished" in errors and not (tmp_path / "t").exists()
    code, _, errors = bsfa("calibrate", "-o", path, *SMALL)
    assert code == 0 and f"{survived} of 5 samples are done" in errors
    assert contents(path) == contents(finished)
    assert {entry.name for entry in path.iterdir()} == {*RUN_FILES, ".lock"}


def test_interrupt_says_how_to_resume(finished, tmp_path, bsfa, monkeypatch):
    forward, calls = calibration.forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        forward(*arguments)

    monkeypatch.setattr(calibration, "forward", interrupted)
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "run", *SMALL)
    assert code == 130 and "1 of 5 samples done; the same command resumes" in errors and "Traceback" not in errors
    monkeypatch.setattr(calibration, "forward", forward)
    assert bsfa("calibrate", "-o", tmp_path / "run", *SMALL)[0] == 0
    assert contents(tmp_path / "run") == contents(finished)


def sleep():
    calibration.forward = lambda *_: time.sleep(60)


def test_a_signal_from_the_terminal_ends_it_cleanly(tmp_path, forked, capfd):
    path = tmp_path / "run"
    process = forked(sleep, "calibrate", "-o", path, *SMALL)
    deadline = time.monotonic() + 60
    while not (path / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    errors = capfd.readouterr().err
    assert process.exitcode == 130 and "the same command resumes" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "change, said",
    [
        (["--length", "640"], "options.length is 768 there and 640 here"),
        (["--seed", "1"], "options.seed is"),
        (["--data", "builtin:prose"], "options.data is"),
        (["--layers", "0"], "options.layers is"),
        (["--tile", "128x64"], "options.tile is"),
        (["--top-k", "1"], "options.top_k is"),
        (["--dtype", "bfloat16"], "options.dtype is"),
    ],
)
def test_another_option_is_refused(change, said, finished, bsfa):
    before = contents(finished)
    code, _, errors = bsfa("calibrate", "-o", finished, *SMALL, *change)
    assert code == 2 and said in errors and "Traceback" not in errors
    assert contents(finished) == before


def test_other_weights_and_other_text_are_refused(tmp_path, bsfa):
    model = build("bsfa")
    for name, shift in (("a", 0), ("b", 1)):
        with torch.no_grad():
            up = model.model.layers[1].mlp.up_proj.weight
            up.copy_(up.roll(shift, 0))
        model.save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "t.txt").write_text("some text " * 200)
    quick = ["--samples", "2", "--length", "512", "--data", tmp_path / "t.txt", "-o", tmp_path / "run"]
    assert bsfa("calibrate", tmp_path / "a", *quick)[0] == 0
    os.rename(tmp_path / "a", tmp_path / "kept")
    os.rename(tmp_path / "b", tmp_path / "a")
    code, _, errors = bsfa("calibrate", tmp_path / "a", *quick)
    assert code == 2 and "holds another run: model.weights is" in errors
    os.rename(tmp_path / "a", tmp_path / "b")
    os.rename(tmp_path / "kept", tmp_path / "a")
    (tmp_path / "t.txt").write_text("other text " * 200)
    code, _, errors = bsfa("calibrate", tmp_path / "a", *quick)
    assert code == 2 and "holds another run: data.hash is" in errors


def test_the_same_text_under_another_name_resumes(tmp_path, bsfa):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text " * 200)
    quick = ["--samples", "2", "--length", "512", "-o", tmp_path / "run"]
    assert bsfa("calibrate", *quick, "--data", tmp_path / "a.txt")[0] == 0
    before = contents(tmp_path / "run")
    code, _, errors = bsfa("calibrate", *quick, "--data", tmp_path / "b.txt")
    assert code == 0 and "2 of 2 samples are done" in errors and contents(tmp_path / "run") == before
    (tmp_path / "b.txt").write_text("more text " * 200)
    code, _, errors = bsfa("calibrate", *quick, "--data", tmp_path / "b.txt")
    assert code == 2 and "options.data is" in errors and contents(tmp_path / "run") == before


@pytest.mark.parametrize("text", [None, "t.txt"])
def test_more_samples_extend_a_run(text, tmp_path, bsfa):
    """Only the further ones are run, and the end is that of a run begun with all of them."""
    (tmp_path / "t.txt").write_text("".join(f"{i} bottles of beer; " for i in range(20_000)))
    options = ["--length", "512", "--top-k", "1"] + (["--data", tmp_path / text] if text else [])
    assert bsfa("calibrate", "-o", tmp_path / "run", *options, "--samples", "4")[0] == 0
    code, out, errors = bsfa("calibrate", "-o", tmp_path / "run", *options, "--samples", "6", "--json")
    assert code == 0 and "4 of 6 samples are done" in errors and len(json.loads(out)["seconds"]) == 2
    assert bsfa("calibrate", "-o", tmp_path / "whole", *options, "--samples", "6")[0] == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "run", *options, "--samples", "5")
    assert code == 2 and "options.samples is 6 there and 5 here" in errors
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "run", *options, "--samples", "8", "--seed", "1")
    assert code == 2 and "options.seed is" in errors
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_further_samples_keep_the_layout_of_the_curves(tmp_path, bsfa):
    lines = [json.dumps({"text": f"{i} " * 140, "task_name": "a" if i < 2 else "b"}) for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    options = ["--length", "768", "-o", tmp_path / "run", "--data", tmp_path / "t.jsonl"]
    assert bsfa("calibrate", *options, "--samples", "1")[0] == 0
    lines[2] = json.dumps({"text": "long " * 200, "task_name": "b"})
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    code, _, errors = bsfa("calibrate", *options, "--samples", "2")
    assert code == 2 and "samples of up to 280 tokens, and a further one has 768" in errors


def test_a_run_that_collected_nothing_leaves_no_folder(tmp_path, bsfa, monkeypatch):
    from bsfa_cli.errors import InputError

    def fails(*_):
        raise InputError("the model's output is not finite")

    monkeypatch.setattr(calibration, "forward", fails)
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "run", *SMALL)
    assert code == 4 and "not finite" in errors and not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    assert bsfa("calibrate", "-o", tmp_path / "mine", *SMALL)[0] == 4 and not list(tmp_path.glob("mine/*"))


def test_defaults_of_top_k_fit_the_length(tmp_path, bsfa):
    assert calibration.default_ranks(32768, 128) == calibration.RANKS and calibration.RANKS[-1] == 128
    assert calibration.default_ranks(2048, 128) == (1, 2, 3, 4, 6, 8, 12) and calibration.default_ranks(256, 128) == (
        1,
    )
    code, _, errors = bsfa("calibrate", "--dry-run", "--length", "2048", "--samples", "1", "--device", "cpu")
    assert code == 0 and "will drop nothing" not in errors
    code, _, errors = bsfa("calibrate", "--dry-run", "--length", "2048", "--samples", "1", "--top-k", "14,15,128")
    assert code == 0 and "--top-k 15, 128 will drop nothing: in samples of 2,048 tokens a row has at most 15" in errors


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 2, "give -o RUN"),
        (["-o", "{tmp}/r", "--tile", "32x32"], 2, "64x128, 128x64"),
        (["-o", "{tmp}/r", "--length", "200"], 2, "shorter than two tiles"),
        (["-o", "{tmp}/r", "--length", "200000"], 2, "131072 positions"),
        (["-o", "{tmp}/r", "--layers", "a"], 2, "must be like 0-3,8"),
        (["-o", "{tmp}/r", "--top-k", "x"], 2, "whole numbers"),
        (["-o", "{tmp}/r", "--data", "builtin:x"], 2, "builtin:mixed"),
        (["-o", "{tmp}/r", "--data", "{tmp}/absent.txt"], 4, "does not exist"),
        (["-o", "{tmp}/r", "--data", "{tmp}/broken.jsonl"], 4, "line 1: not JSON"),
        (["-o", "{tmp}/r", "--data", "tasks:poems"], 2, "no task 'poems'"),
        (["-o", "{tmp}/full"], 2, "not empty and holds no calibration run"),
        (["-o", "{tmp}/short.txt"], 2, "is a file"),
        (["-o", "{tmp}/short.txt/run"], 2, "cannot write"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_what_needs_no_model_is_refused_before_one_is_loaded(arguments, code, said, tmp_path, bsfa):
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    result = bsfa("calibrate", "--device", "cpu", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert result[0] == code and said in result[2] and "Traceback" not in result[2] and not result[1]
    assert not (tmp_path / "r").exists() and (tmp_path / "short.txt").read_text() == "short"


@pytest.mark.parametrize(
    "arguments, code, said",
    [(["--layers", "3"], 2, "no layer 3; it has 0 to 2"), (["--data", "{tmp}/short.txt"], 4, "too short")],
)
def test_what_the_model_cannot_do_gets_one_sentence(arguments, code, said, tmp_path, bsfa):
    (tmp_path / "short.txt").write_text("short")
    arguments = ("-o", tmp_path / "r", *(argument.format(tmp=tmp_path) for argument in arguments))
    result = bsfa("calibrate", "--device", "cpu", *arguments)
    assert result[0] == code and said in result[2] and not result[1] and not (tmp_path / "r").exists()


def test_a_sample_that_memory_cannot_hold_is_refused_before_it_runs(tmp_path, bsfa, monkeypatch):
    monkeypatch.setattr(calibration, "free_memory", lambda device: 1 << 20)
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "r", *SMALL)
    assert code == 3 and "lower --length" in errors and not (tmp_path / "r").exists()


def test_dry_run_writes_nothing(tmp_path, bsfa, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, errors = bsfa("calibrate", *SMALL, "--dry-run", "--json", "-o", "run")
    planned = json.loads(out)
    assert code == 0 and not list(tmp_path.iterdir()) and "curves in memory" in errors
    assert [sample["role"] for sample in planned["samples"]] == ["fit", "fit", "fit", "heldout", "fit"]


def test_bounds_of_the_dry_run_hold(finished, bsfa):
    planned = json.loads(bsfa("calibrate", *SMALL, "--dry-run", "--json")[1])["bytes"]
    assert sum((finished / name).stat().st_size for name in RUN_FILES[1:]) <= planned["files on disk"] + 50_000


def test_a_full_disk_leaves_the_run_as_it_was(tmp_path, bsfa, monkeypatch):
    saved, fsync = [], os.fsync

    def full(descriptor):
        saved.append(1)
        if len(saved) > 4:  # of run.json and of the first sample, each with its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, errors = bsfa("calibrate", "-o", tmp_path / "run", *SMALL)
    assert code == 3 and "no space left" in errors and "Traceback" not in errors
    assert Run.open(tmp_path / "run").load("fit")[0] == ["mixed-0"]
    assert not list((tmp_path / "run").glob(".*.part"))


def test_two_processes_do_not_write_to_one_run(finished, bsfa):
    with Run.open(finished).lock():
        code, _, errors = bsfa("calibrate", "-o", finished, *SMALL)
    assert code == 2 and "another bsfa calibrate" in errors


@pytest.mark.parametrize("damage", ["truncate", "text", "negative", "manifest"])
def test_a_damaged_run_is_refused(damage, finished, tmp_path, bsfa):
    path = tmp_path / "run"
    path.mkdir()
    for name, content in contents(finished).items():
        (path / name).write_bytes(content)
    fit = path / "fit.safetensors"
    if damage == "truncate":
        fit.write_bytes(fit.read_bytes()[:-2])
    elif damage == "text":
        fit.write_text("not a tensor")
    elif damage == "negative":
        fit.write_bytes(fit.read_bytes()[:-2] + b"\xff\xff")
    else:
        (path / "run.json").write_text("{}")
    code, _, errors = bsfa("export", path, "-o", tmp_path / "t", "--target-skip", "0.1")
    assert code == 4 and "damaged" in errors and "Traceback" not in errors


def test_roles_hold_out_every_fourth_and_fit_the_longest():
    assert calibration.roles([5]) == ["fit"]
    assert calibration.roles([5, 5]) == ["fit", "heldout"]
    assert calibration.roles([5, 9]) == ["heldout", "fit"]
    assert [i for i, role in enumerate(calibration.roles([5] * 9)) if role == "heldout"] == [3, 7]
    assert calibration.roles([1, 2, 3, 9, 5])[3] == "fit" and "heldout" in calibration.roles([1, 2, 3, 9, 5])


def test_data_may_be_given_several_times_and_in_the_environment(tmp_path, bsfa, monkeypatch):
    for name in ("a.txt", "b c.txt"):
        (tmp_path / name).write_text("some text " * 200)
    options = ["--samples", "4", "--length", "512", "--device", "cpu", "--dry-run", "--json"]
    code, out, _ = bsfa("calibrate", "--data", tmp_path / "a.txt", "--data", tmp_path / "b c.txt", *options)
    assert code == 0
    expected = ["a.txt:window-0", "b c.txt:window-0", "a.txt:window-1", "b c.txt:window-1"]
    assert [sample["id"] for sample in json.loads(out)["samples"]] == expected
    monkeypatch.setenv("BSFA_CALIBRATE_DATA", f"{tmp_path / 'a.txt'},{tmp_path / 'b c.txt'}")
    assert json.loads(bsfa("calibrate", *options)[1])["samples"] == json.loads(out)["samples"]
    monkeypatch.delenv("BSFA_CALIBRATE_DATA")
    (tmp_path / "c.yaml").write_text(f"data: [{tmp_path / 'a.txt'}, {tmp_path / 'b c.txt'}]\n")
    found = bsfa("calibrate", "--config", tmp_path / "c.yaml", *options)[1]
    assert json.loads(found)["samples"] == json.loads(out)["samples"]


def test_text_generated_for_want_of_real_text_is_named_wherever_it_matters(tmp_path, bsfa):
    run, artifact = tmp_path / "run", tmp_path / "t.safetensors"
    small = ["--samples", "2", "--length", "512", "--device", "cpu"]
    code, _, errors = bsfa("calibrate", "-o", run, *small)
    assert code == 0 and "no --data was given, and builtin:mixed is generated text" in errors
    assert json.loads((run / "run.json").read_text())["data"]["generated"] is True
    code, _, errors = bsfa("export", run, "-o", artifact, "--target-skip", "0.1")
    assert code == 0 and "calibrated without real text: builtin:mixed" in errors
    assert Thresholds.read(artifact).provenance["data"]["generated"] is True
    assert "no --data was given" in bsfa("verify", "--thresholds", artifact, *small)[2]
    assert "no --data was given" not in bsfa("calibrate", "--data", "builtin:code", "--dry-run", *small)[2]


def test_a_run_of_an_earlier_version_goes_on(finished, tmp_path, bsfa):
    run = shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    del manifest["model"]["config"], manifest["data"]["generated"]  # as versions before wrote it
    (run / "run.json").write_text(json.dumps(manifest))
    code, _, errors = bsfa("calibrate", "-o", run, *SMALL)
    assert code == 0 and "5 of 5 samples are done" in errors
    manifest["model"]["config_hash"] = "0" * 64
    (run / "run.json").write_text(json.dumps(manifest))
    code, _, errors = bsfa("calibrate", "-o", run, *SMALL)
    assert code == 2 and "model.config_hash is 000000000000 there and" in errors
    manifest["model"]["config"] = {"rms_norm_eps": 1e-3}
    (run / "run.json").write_text(json.dumps(manifest))
    code, _, errors = bsfa("calibrate", "-o", run, *SMALL)
    assert code == 2 and "model.config." in errors


def test_a_lock_that_is_a_link_is_not_followed(finished, tmp_path, bsfa):
    run, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(finished, run)
    victim.write_text("precious")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(victim)
    code, _, errors = bsfa("calibrate", "-o", run, *SMALL)
    assert code == 2 and "cannot write" in errors and ".lock" in errors
    assert victim.read_text() == "precious"


def test_export_says_when_only_some_layers_were_calibrated(tmp_path, bsfa):
    run, artifact = tmp_path / "run", tmp_path / "t.safetensors"
    small = ["--samples", "2", "--length", "512", "--device", "cpu"]
    assert bsfa("calibrate", "-o", run, "--layers", "1", *small)[0] == 0
    code, _, errors = bsfa("export", run, "-o", artifact, "--target-skip", "0.1")
    assert code == 0 and "skip rates are of the 1 calibrated modules of 3" in errors and "33.3%" in errors
