"""The real lm-evaluation-harness at an operating point; skipped where it is not installed (`make test-lm-eval`)."""

import json
import re
import sys

import pytest
import torch
from gap_thresholds import thresholds

harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: make test-lm-eval has it")

pytestmark = pytest.mark.usefixtures("random_model")
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def evaluate(random_model, tmp_path_factory):
    """Run a task of four long questions with the thresholds of a file, or without any."""
    from lm_eval.tasks import TaskManager

    from bsfa_cli.models.load import load_model

    folder = tmp_path_factory.mktemp("task")
    rows = [{"question": f"{i} and on " * 40, "choices": [" so", " not"], "answer": i % 2} for i in range(4)]
    (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(TASK.format(file=folder / "tiny.jsonl"))
    loaded = load_model(random_model, device="cpu")
    thresholds(loaded, {"open": -torch.inf, "hard": 2.0}).write(folder / "t.safetensors")

    def run(name, **options):
        import bsfa_kernels.integrations.lm_eval  # noqa: F401 - registers `bsfa`
        from lm_eval.api.registry import get_model

        arguments = {"pretrained": str(random_model), "device": "cpu", "dtype": "float32", "batch_size": 1} | options
        model = get_model(name)(**arguments)
        tasks = TaskManager(include_path=str(folder), include_defaults=False)
        found = harness.simple_evaluate(
            model=model, tasks=["tiny"], task_manager=tasks, log_samples=True, bootstrap_iters=0
        )
        scores = [reply[0] for sample in found["samples"]["tiny"] for reply in sample["filtered_resps"]]
        return torch.tensor(scores), model

    return run, folder / "t.safetensors"


def test_the_harness_scores_a_model_at_an_operating_point(evaluate):
    from bsfa_kernels.integrations import transformers as bsfa

    run, file = evaluate
    exact, _ = run("hf", attn_implementation="sdpa")
    for options in ({}, {"thresholds": str(file), "point": "open"}):
        scores, _ = run("bsfa", **options)
        torch.testing.assert_close(scores, exact, atol=1e-3, rtol=1e-4)
    scores, model = run("bsfa", thresholds=str(file), point="hard")
    assert bsfa.skip_rate(model.model) > 0.1
    assert (scores - exact).abs().max() > 1e-3


@pytest.fixture
def command(evaluate, random_model, monkeypatch, capsys):
    """The harness's command line, without an index of its own thousands of tasks: what it says."""
    from bsfa_kernels.integrations import lm_eval
    from lm_eval.tasks import TaskManager

    build = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda *a, **k: build(*a, **k | {"include_defaults": False}))
    folder = evaluate[1].parent

    def run(model, arguments, **environment):
        for name in (lm_eval.THRESHOLDS, lm_eval.POINT):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        line = ["lm_eval", "run", "--model", model, "--tasks", "tiny", "--include_path", str(folder), "--device", "cpu"]
        line += ["--batch_size", "1", "--model_args", f"pretrained={random_model},dtype=float32{arguments}"]
        monkeypatch.setattr(sys, "argv", line)
        lm_eval.main()
        return capsys.readouterr()

    return run, evaluate[1]


def skipped(err: str) -> float:
    return float(re.search(r"bsfa: ([0-9.]+)% of the tiles a gate may drop were skipped", err)[1])


def test_the_command_line_takes_thresholds_from_its_arguments_or_the_environment(command):
    run, file = command
    said = run("bsfa", f",thresholds={file},point=hard")
    assert "tiny" in said.out and skipped(said.err) > 10
    there = run("hf", ",attn_implementation=bsfa", BSFA_THRESHOLDS=file, BSFA_POINT="hard")
    assert skipped(there.err) == skipped(said.err)
    assert "every tile was kept" in run("hf", ",attn_implementation=bsfa").err
    with pytest.raises(ValueError, match="unset BSFA_THRESHOLDS"):
        run("bsfa", "", BSFA_THRESHOLDS=file)


def test_thresholds_that_would_not_be_used_are_refused(evaluate, random_model, monkeypatch):
    import transformers
    from bsfa_kernels.integrations import lm_eval
    from bsfa_kernels.integrations.transformers import skip_rate

    model = transformers.AutoModelForCausalLM.from_pretrained(random_model, attn_implementation="sdpa").eval()
    assert lm_eval.apply_environment(model) is None
    monkeypatch.setenv(lm_eval.POINT, "hard")
    with pytest.raises(ValueError, match="BSFA_POINT is set and BSFA_THRESHOLDS is not"):
        lm_eval.apply_environment(model)
    monkeypatch.setenv(lm_eval.THRESHOLDS, str(evaluate[1]))
    with pytest.raises(ValueError, match="BSFA_THRESHOLDS is set and the model runs attn_implementation='sdpa'"):
        lm_eval.apply_environment(model)
    model.set_attn_implementation("bsfa")
    with lm_eval.apply_environment(model), torch.no_grad():
        model(torch.arange(512)[None] % 250)
        assert skip_rate(model) > 0.1
