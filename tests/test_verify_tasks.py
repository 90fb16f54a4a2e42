"""bsfa verify --tasks on the bundled model: real answers, kept by mild thresholds and lost by reckless ones."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest
from gap_thresholds import thresholds

from bsfa_cli.data import ruler
from bsfa_cli.data.questions import Plan
from bsfa_cli.errors import UsageError
from bsfa_cli.models.load import load_model
from bsfa_cli.presentation import figures
from bsfa_cli.presentation.heat_map import heat_map
from bsfa_cli.suites.run import Answer, Examiner, Score, dense_handlers, examine
from bsfa_cli.suites.summary import summarise
from bsfa_cli.verification.gates import Gates


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, device="cpu")


@pytest.fixture(scope="module")
def artifact(loaded, tmp_path_factory):
    """Gap gates: one that drops what hardly weighs, one that drops all that it may."""
    gates = {"mild": -4.0, "reckless": 1e9}
    path = tmp_path_factory.mktemp("artifact") / "thresholds.safetensors"
    thresholds(loaded, gates, {"seed": 0}).write(path)
    return path


ASKED = ("single", "multi-key", "frequent-words")
SMALL = ("--tasks", ",".join(ASKED), "--lengths", "512,768", "--questions", "2", "--device", "cpu")


def test_mild_thresholds_keep_the_answers_reckless_ones_lose_them_and_a_page_says_so(run, artifact, tmp_path):
    command = ("verify", "--thresholds", artifact, *SMALL, "--json", "--min-retention", "0.7")
    stored, page = tmp_path / "v.json", tmp_path / "r.html"
    result = run(*command, "--point", "mild", "--min-skip", "0.05", "--negative-control", "-o", stored)
    assert result.code == 0, result.err
    assert run("report", stored, "-o", page).code == 0
    for words in ("mild: passed", "teacher-forced", "12 questions", "<td>multi-key</td>", "<td>768 tokens</td>"):
        assert words in page.read_text()
    found = json.loads(result.out)
    (mild,) = found["points"]
    assert found["tasks"]["mode"] == "teacher-forced" and len(found["tasks"]["questions"]) == 12
    assert mild["questions"] == 12 and mild["dense"] >= 0.75 and mild["retention"] >= 0.9 and mild["skip"] > 0.05
    assert 0.7 <= mild["retention_interval"][0] < 0.9
    assert set(mild["by_task"]) == set(ASKED) and set(mild["by_length"]) == {"512", "768"}
    assert {cell["depth"] for cell in mild["by_length_and_depth"]} == {0, 1}
    assert found["negative_control"]["retention"] < 0.5
    assert "negative control fails, as it must" in result.err and "of dense accuracy kept" in result.err
    options = ("--heat-map", tmp_path / "map.svg", "--save-questions", tmp_path / "questions.jsonl")
    result = run(*command, *options)
    assert result.code == 1 and "reckless: retention of dense accuracy is" in result.err
    mild, reckless = json.loads(result.out)["points"]
    assert mild["failures"] == [] and reckless["failures"] and reckless["skip"] == 1
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag.endswith("svg")
    assert [question.task for question in ruler.read(tmp_path / "questions.jsonl")] == 4 * list(ASKED)


def test_a_ruler_file_is_answered_by_generation(run, artifact, loaded, tmp_path):
    plan = Plan(("single", "tracking-1"), (512,), 1)
    ruler.write(tmp_path / "q.jsonl", [plan.write(*place, loaded.tokenizer) for place in plan.places()])
    command = ("verify", "--thresholds", artifact, "--tasks", tmp_path / "q.jsonl", "--point", "mild", "--json")
    found = json.loads(run(*command, "--device", "cpu").out)
    assert found["tasks"]["mode"] == "generated" and found["dense_answers"]["exact"] == 1
    assert found["points"][0]["exact"] == 1


def test_questions_past_the_models_positions_are_refused(run, one_sentence, artifact, tmp_path):
    line = json.dumps({"input": "the garden " * 70_000, "outputs": ["1"], "task": "niah"})
    (tmp_path / "q.jsonl").write_text(json.dumps({"input": "the", "outputs": ["1"]}) + "\n" + line)
    command = ("verify", "--thresholds", artifact, "--tasks", tmp_path / "q.jsonl", "--device", "cpu")
    one_sentence(run(*command), 4, "q.jsonl, question 2: its 140,129 tokens, answer included", "positions")


def test_what_cannot_be_drawn_or_shown_is_refused_before_the_model_is_loaded(
    run, one_sentence, no_model, artifact, tmp_path
):
    """Files without depths, and tasks that ask about the whole document; a limit that a file is too small for."""
    path = tmp_path / "mine.jsonl"
    lines = [{"question": "Two and two?", "choices": ["four", "five"], "answer": 0}] * 4
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("verify", "--thresholds", artifact, "--device", "cpu", "--tasks")
    for tasks in (path, "frequent-words"):
        result = run(*command, tasks, "--heat-map", tmp_path / "map.svg")
        one_sentence(result, 2, "--heat-map draws answers by depth", f"no question of {tasks} is asked at one")
    assert not (tmp_path / "map.svg").exists()
    one_sentence(run(*command, path, "--min-retention", "0.9"), 2, f"and 4 would be asked; add some to {path}")


def test_generation_and_teacher_forcing_agree(loaded):
    examiner, plan = Examiner(loaded.model, loaded.tokenizer), Plan(("multi-query", "records", "tracking-3"), (512,), 2)
    for place in plan.places():
        forced = examiner.ask(plan.draw(*place))
        assert forced.exact == examiner.ask(plan.write(*place, loaded.tokenizer)).exact


def test_tiles_are_counted_question_by_question(loaded, artifact):
    from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules
    from bsfa_kernels.thresholds import Thresholds

    modules = attention_modules(loaded.model)
    handlers = SparseAttention.for_model(Thresholds.read(artifact), modules, "mild", count=True)
    plan = Plan(("single",), (512,), 2)
    questions = list(plan.questions_for(loaded.tokenizer))
    answers = examine(
        Examiner(loaded.model, loaded.tokenizer), {"dense": dense_handlers(loaded.model), "mild": handlers}, questions
    )
    assert all(answer.candidates == 0 for answer in answers["dense"])
    # 512 tokens: 16 query tiles, two to a key tile; the first key tile and the diagonal are no candidates.
    assert [answer.candidates for answer in answers["mild"]] == [4 * 4 * sum(max(0, i // 2 - 1) for i in range(16))] * 2
    assert all(0 < answer.kept < answer.candidates for answer in answers["mild"])


def test_modules_without_thresholds_count_in_the_skip_rate(loaded, artifact):
    from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules
    from bsfa_kernels.thresholds import Thresholds

    every = Thresholds.read(artifact)
    path = "model.layers.2.self_attn"
    one = dataclasses.replace(every, tensors={path: every.tensors[path]})
    modules = attention_modules(loaded.model)
    contenders = {
        name: SparseAttention.for_model(each, modules, "reckless", count=True)
        for name, each in {"every": every, "one": one}.items()
    }
    plan = Plan(("single",), (512,), 1)
    examiner = Examiner(loaded.model, loaded.tokenizer)
    for question in (plan.draw("single", 512, 0), plan.write("single", 512, 0, loaded.tokenizer)):
        found = examine(examiner, contenders, [question])
        (all_dropped,), (one_of_four) = found["every"], found["one"][0]
        assert all_dropped.kept == 0 and one_of_four.candidates == all_dropped.candidates > 0
        assert one_of_four.kept == 3 * one_of_four.candidates // 4


def answers_of(plan, right, kept=0, candidates=0):
    return [
        Answer(plan.draw(*place), Score(place[0] in right, 1.0), kept, candidates) for place in plan.places()
    ]  # fmt: skip


def test_a_summary_names_the_worst_task_and_counts_tiles():
    plan = Plan(("single", "records", "frequent-words"), (256,), 2)
    dense, sparse = answers_of(plan, plan.tasks), answers_of(plan, ("single", "frequent-words"), 25, 100)
    found = summarise(sparse, dense)
    assert found["exact"] == pytest.approx(2 / 3) and found["retention"] == pytest.approx(2 / 3)
    assert found["skip"] == 0.75 and found["worst_task"] == "records" == found["worst_retention"]
    assert found["by_task"]["records"]["difference"] == -1 and found["by_task"]["single"]["retention"] == 1
    assert [(cell["length"], cell["depth"], cell["questions"]) for cell in found["by_length_and_depth"]] == [
        (256, 0, 2), (256, 1, 2),
    ]  # fmt: skip
    few = summarise(dense, dense)
    assert few["retention"] == 1
    assert Gates(min_retention=0.7).task_accuracy_failures(few) == [
        "retention of dense accuracy is 1, of which 6 questions show only that it is at least 0.6097 "
        "(--min-retention 0.7); about 9 such questions would show more"
    ]
    assert Gates(min_retention=0.6).task_accuracy_failures(few) == []
    nothing = summarise(answers_of(plan, ()), answers_of(plan, ()))
    assert nothing["retention"] is None and nothing["worst_retention"] is None and nothing["skip"] is None
    gates = Gates(min_retention=0.7, min_skip=0.8)
    assert gates.task_failures(found) == [
        "retention of dense accuracy is 0.6667 (--min-retention 0.7)", "skip rate is 0.75 (--min-skip 0.8)"
    ]  # fmt: skip
    assert "nothing to retain" in gates.task_failures(nothing)[0]
    assert gates.task_failures(nothing)[-1] == "nothing was skipped, so nothing was verified"


def test_a_heat_map_needs_depths():
    plan = Plan(("frequent-words",), (256,), 1)
    answers = answers_of(plan, plan.tasks)
    with pytest.raises(UsageError, match="no question was asked at a depth"):
        heat_map([{"name": "dense", **summarise(answers, answers)}], "words")
    plan = dataclasses.replace(plan, tasks=("single",))
    answers = answers_of(plan, plan.tasks)
    drawn = figures.svg(heat_map([{"name": "<dense>", **summarise(answers, answers)}], "a & b"))
    assert "&lt;dense&gt;" in drawn and "a &amp; b" in drawn and ElementTree.fromstring(drawn) is not None


@pytest.mark.parametrize(
    "options, words",
    [
        (("--min-retention", "0.9"), "--min-retention needs --tasks"),
        (("--heat-map", "m.svg"), "--heat-map needs --tasks"),
        (("--tasks", "all", "--min-top1", "0.9"), "--min-top1 judges texts: drop --tasks"),
        (("--tasks", "all", "--negative-control"), "that it can fail: --min-retention"),
        (
            ("--tasks", "single", "--questions", "4", "--min-retention", "0.95"),
            "--min-retention 0.95 needs at least 73 questions that the dense model answers right, and 4 would be asked",
        ),
        (("--tasks", "all", "--min-retention", "1"), "more than any number of questions can show"),
        (("--tasks", "needle"), "there is no task 'needle'"),
        (("--tasks", "single", "--lengths", "4k"), "--lengths must be whole numbers"),
        (("--tasks", "single", "--lengths", "200000"), "--lengths 200000 is past the model's"),
    ],
)
def test_bad_requests(run, artifact, one_sentence, options, words):
    one_sentence(run("verify", "--thresholds", artifact, "--device", "cpu", *options), 2, words)
