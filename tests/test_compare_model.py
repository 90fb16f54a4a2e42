"""bsfa compare inside a model: losses, times and answers of every method, in the same modules."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.transformers import attention_modules

from bsfa_cli.calibration.group import Group
from bsfa_cli.comparison import matching, methods, model
from bsfa_cli.comparison import run as comparison
from bsfa_cli.comparison.handlers import Stopwatch
from bsfa_cli.data.questions import TextQuestion
from bsfa_cli.data.texts import load_texts
from bsfa_cli.models.load import load_model
from bsfa_cli.suites.run import Examiner

CPU, TILE = torch.device("cpu"), TileShape()


@pytest.fixture(scope="module")
def loaded(random_model):
    return load_model(None, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def texts(loaded):
    return load_texts("builtin:mixed", samples=1, length=640, tokenizer=loaded.tokenizer, seed=5)


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """(model directory, run directory of its calibration)."""
    folder = tmp_path_factory.mktemp("model")
    loaded.model.save_pretrained(folder / "model")
    loaded.tokenizer.save_pretrained(folder / "model")
    return folder / "model", folder / "run"


@pytest.fixture(scope="module")
def questions(loaded, texts) -> list[TextQuestion]:
    """Eight questions in two tasks, to which the right answer is what the dense model generates."""
    examiner, questions = Examiner(loaded.model, loaded.tokenizer), []
    for i in range(8):
        text = loaded.tokenizer.decode(texts[0].tokens[i * 5 :])
        question = TextQuestion(("first", "second")[i % 2], 640, None, text, ("",), new_tokens=6)
        questions.append(replace(question, outputs=(examiner.generate(question),)))
    return questions


def test_rows_have_losses_times_and_answers(loaded, texts, questions):
    few = methods.Settings.parse(["sliding_window=512", "xattention=0.5,0.9"])
    cell = comparison.model_cell(
        loaded, None, "sliding_window,xattention", TILE, CPU, texts, 0.001, 0, questions, settings=few
    )
    json.dumps(cell, allow_nan=False)
    assert cell["dense_accuracy"]["mean"] == 1 and cell["level"] == "model" and cell["asked"] == "generated"
    by_name = {(row["method"], row["setting"]): row for row in cell["rows"]}
    exact = by_name["dense", 1.0]
    assert exact["agreement"]["top1"] == 1 and exact["recall"]["worst"] > 0.999 and exact["error"] < 1e-3
    sparse = by_name["xattention", 0.5]
    assert sparse["density"] < 1 and sparse["agreement"]["kl"] > exact["agreement"]["kl"] >= -1e-6
    assert len(sparse["layers"]) == 3 and exact["accuracy"]["mean"] == 1
    assert sparse["accuracy"]["mean"] < 1
    assert sparse["accuracy"]["against_dense"]["difference"] == pytest.approx(sparse["accuracy"]["mean"] - 1)
    first = sparse["accuracy"]["tasks"]["first"]
    assert first["questions"] == 4 and first["low"] <= first["accuracy"] <= first["high"]
    for row in cell["rows"]:
        assert 0 < row["total_ms"] < row["ttft_ms"]
        assert (row["selection_ms"] > 0) == (row["method"] != "dense")
        assert len(row["samples_ms"]["attention"]) == len(row["samples_ms"]["ttft"]) >= 5
    assert [entry["name"] for entry in cell["dense"]] == ["PyTorch's CPU flash attention"]
    assert all(getattr(module, "bsfa_handlers", None) is None for module in loaded.model.modules())


@pytest.mark.usefixtures("one_round")
def test_processes_share_questions_out_and_the_first_has_all_answers(loaded, texts, questions):
    questions = questions[:7]
    few = methods.Settings.parse(["sliding_window=512", "xattention=0.5"])

    def cell(group):
        return comparison.model_cell(
            loaded, None, "sliding_window,xattention", TILE, CPU, texts, 0.001, 0, questions, settings=few, group=group
        )

    store = torch.distributed.HashStore()
    assert cell(Group(1, 2, 1, store)) is None
    shared, alone = cell(Group(0, 2, 0, store)), cell(None)
    assert (shared["processes"], alone["processes"]) == (2, 1) and "questions_left" not in shared
    assert shared["dense_accuracy"] == alone["dense_accuracy"]
    for theirs, ours in zip(shared["rows"], alone["rows"], strict=True):
        assert theirs["accuracy"] == ours["accuracy"]
    assert any(row["accuracy"]["mean"] < 1 for row in shared["rows"])


@pytest.mark.usefixtures("one_round")
def test_a_method_that_failed_in_another_process_is_left_out(loaded, texts, questions):
    store = torch.distributed.HashStore()

    def cell(rank, method):
        bench = model.ModelBench(loaded, attention_modules(loaded.model), [methods.Dense(), method], TILE, CPU)
        return bench.cell(texts, 640, 0.001, 0, questions, group=Group(rank, 2, rank, store))

    class Flaky(methods.Dense):
        name = "flaky"

        def choose(self, layer, q, *rest, **options):
            if fails:
                raise ValueError("no memory there; here there is")
            return super().choose(layer, q, *rest, **options)

    fails = True
    assert cell(1, Flaky()) is None
    fails = False
    found = cell(0, Flaky())
    assert [row["method"] for row in found["rows"]] == ["dense"]
    assert {entry["reason"] for entry in found["unavailable"] if "flaky" in entry["name"]} == {"no memory there"}
    assert sum(task["questions"] for task in found["dense_accuracy"]["tasks"].values()) == 8


@pytest.mark.usefixtures("one_round")
def test_a_method_that_cannot_run_says_why_and_the_others_go_on(loaded, texts):
    class Broken(methods.Mask):
        def choose(self, *arguments, **options):
            raise ValueError("blocks do not fit; at all")

    from bsfa_kernels.selection import SlidingWindow

    bench = model.ModelBench(
        loaded, attention_modules(loaded.model), [methods.Dense(), Broken(SlidingWindow)], TILE, CPU
    )
    cell = bench.cell(texts, 640, 0.001, 0)
    assert {row["method"] for row in cell["rows"]} == {"dense"} and cell["rows"][0]["accuracy"] is None
    assert {entry["reason"] for entry in cell["unavailable"]} == {"blocks do not fit"}


@pytest.mark.usefixtures("one_round")
def test_a_question_is_made_once_and_a_method_that_fails_at_one_is_left_out(loaded, texts, questions):
    asked = []

    class Remembered:
        """A question that says when its text is taken; who asks it anew each time pays for its making anew."""

        def __init__(self, question):
            self.question = question

        def __getattr__(self, name):
            if name == "text":
                asked.append(self.question.text)
            return getattr(self.question, name)

    class Short(methods.Dense):
        name = "short"

        def choose(self, layer, q, *rest, **options):
            if asked and q.shape[2] > 1:
                raise ValueError("no questions; please")
            return super().choose(layer, q, *rest, **options)

    bench = model.ModelBench(loaded, attention_modules(loaded.model), [methods.Dense(), Short()], TILE, CPU)
    cell = bench.cell(texts, 640, 0.001, 0, [Remembered(question) for question in questions])
    assert {row["method"] for row in cell["rows"]} == {"dense"} and cell["rows"][0]["accuracy"]["mean"] == 1
    assert {entry["name"]: entry["reason"] for entry in cell["unavailable"]} == {"short": "no questions"}
    order = [text for i, text in enumerate(asked) if i == 0 or asked[i - 1] != text]
    assert "questions_left" not in cell
    assert order == [question.text for question in questions]  # all contenders one after the other, no text twice
    asked.clear()
    bench = model.ModelBench(loaded, attention_modules(loaded.model), [methods.Dense()], TILE, CPU)
    cell = bench.cell(texts, 640, 0.001, 0, questions, minutes=1e-9)
    assert cell["questions_left"] == len(questions) - 1 and matching.questions(cell, matching.ACCURACY) == 1


def test_tasks_take_turns():
    asked = [SimpleNamespace(task=task, number=i) for i, task in enumerate("aaabbc")]
    assert [(each.task, each.number) for each in model.in_turns(asked)] == [
        ("a", 0), ("b", 3), ("c", 5), ("a", 1), ("b", 4), ("a", 2)
    ]  # fmt: skip


def test_only_passes_that_have_begun_are_timed():
    watch = Stopwatch(CPU)
    with watch.lap("attention"):
        pass
    assert watch.passes == []
    watch.begin()
    for seconds in (0.001, 0.002):
        with watch.lap("attention"):
            time.sleep(seconds)
    (spent,) = watch.read("attention", 1)
    assert spent > 2.9 and watch.read("selection", 1) == watch.read(Stopwatch.HELD, 1) == [0]


@pytest.mark.gpu
def test_a_lap_is_launched_before_its_clock_starts():
    x = torch.zeros(1024, device="cuda")
    watch = Stopwatch(x.device)
    for _ in range(3):
        watch.begin()
        with watch.lap("selection"):
            x.add_(1)
            time.sleep(0.005)
            x.add_(1)
    torch.cuda.synchronize()
    laps, held = watch.read("selection", 3), watch.read(Stopwatch.HELD, 3)
    assert max(laps[1:]) < 1 < 4 < laps[0] and held[0] < 1 < 5 < min(held[1:])


@pytest.mark.usefixtures("one_round")
def test_the_command_uses_the_thresholds_of_a_run(run, one_sentence, saved, tmp_path):
    checkpoint, calibrated = saved
    small = ("--length", "512", "--device", "cpu")
    assert run("calibrate", checkpoint, "-o", calibrated, "--samples", "2", *small).code == 0
    options = ("--samples", "1", "--seconds", "0.001", *small)
    done = run("compare", checkpoint, "--run", calibrated, "--methods", "bsfa", *options, "--json")
    assert done.code == 0
    (cell,) = json.loads(done.out)["cells"]
    assert {row["method"] for row in cell["rows"]} == {"dense", "bsfa"} and cell["calibrated_on"] == "the run run"
    assert "random weights" in cell["label"] or "model" in cell["label"]
    one_sentence(run("compare", checkpoint, "--tasks", "no-such", *options), 2, "there is no task 'no-such'")
    (tmp_path / "result.json").write_text(done.out)
    assert run("report", tmp_path / "result.json", "-o", tmp_path / "report.html").code == 0
    one_sentence(
        run("compare", checkpoint, "--run", calibrated, "--tile", "128x64", *options), 4, "calibrated with tiles of"
    )
    done = run("compare", "bundled", "--methods", "sliding_window", *options, "--json")
    assert done.code == 0 and json.loads(done.out)["cells"][0]["level"] == "model"
    artifact = tmp_path / "thresholds.safetensors"
    assert run("export", calibrated, "-o", artifact, "--target-skip", "0.1", "--target-skip", "0.2").code == 0
    compared = ("compare", checkpoint, "--thresholds", artifact, *options, "--methods")
    one_sentence(run(*compared, "bsfa,bsfa_top_k"), 2, "bsfa_top_k: thresholds.safetensors holds no k for it")
    done = run(*compared, "bsfa", "--json")
    (exported,) = json.loads(done.out)["cells"]
    assert [row["setting"] for row in exported["rows"]] == [1.0, 0.2, 0.1]
    assert exported["calibrated_on"] == "thresholds.safetensors"
    manifest = json.loads((calibrated / "run.json").read_text())
    manifest["model"]["weights"] = "another"
    (calibrated / "run.json").write_text(json.dumps(manifest))
    one_sentence(
        run("compare", checkpoint, "--run", calibrated, *options), 4, "another model: weights is another there and"
    )


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (("--tasks", "all"), 2, "--tasks are asked of a model"),
        (("--run", "somewhere"), 2, "belong to a comparison inside a model"),
        (("model", "--ask-at", "0.5"), 2, "--ask-at belongs to --tasks"),
        (("model", "--run", "a", "--thresholds", "b"), 2, "either --run or --thresholds"),
        (("model", "--thresholds", "/nonexistent/t.safetensors"), 4, "/nonexistent/t.safetensors"),
        (("model", "--captured", "a.safetensors"), 2, "either a model or --captured"),
        (("/nonexistent/model", "--methods", "bsfa"), 2, "bsfa needs thresholds to compare with: give --run RUN or"),
        (("--captured", "a", "--methods", "pbs,pbs+bsfa"), 2, "pbs+bsfa needs thresholds to compare with: give --cal"),
        (("/nonexistent/model", "--methods", "global_attention"), 2, "global_attention: not defined for causal"),
        (("/nonexistent/model",), 4, "does not exist"),
        (("/nonexistent/model", "--run", "/nonexistent/run"), 4, "is no run directory"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(run, one_sentence, arguments, code, words):
    one_sentence(run("compare", *arguments, "--device", "cpu"), code, words)
