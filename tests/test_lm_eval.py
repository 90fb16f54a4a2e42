"""The real lm-evaluation-harness at an operating point; skipped where it is not installed (pip install lm_eval)."""

import json

import pytest
import torch
from gap_thresholds import thresholds

harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

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
