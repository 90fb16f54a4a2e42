"""Questions, how they are asked and scored, RULER's files, and the intervals around an accuracy."""

import itertools
import json
import math

import pytest
import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations.transformers import attention_modules

from bsfa_cli.comparison import methods
from bsfa_cli.comparison.handlers import MethodAttention, Stopwatch
from bsfa_cli.data import ruler, tasks
from bsfa_cli.data.questions import HELD_OUT, Plan, TextQuestion, as_text, is_bundled, parse_names
from bsfa_cli.data.texts import load_texts
from bsfa_cli.data.vocabulary import build_tokenizer
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.metrics import statistics
from bsfa_cli.models import random_weights
from bsfa_cli.models.load import load_model
from bsfa_cli.suites.run import Examiner, Score, dense_handlers, examine, match, mode
from bsfa_cli.training import model

SHAPE = {**model.TOY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def llama():
    return model.build(SHAPE, 0).eval()


@pytest.mark.parametrize("name", tasks.NAMES)
def test_outputs_are_what_the_answer_says(name):
    question = Plan((name,), (512,), 1).draw(name, 512, 3)
    text, answer = as_text(question)
    expected = {"multi-query": 4, "multi-value": 4, "frequent-words": 3}
    expected |= {f"tracking-{copies}": copies + 1 for copies in (1, 2, 3, 4)}
    assert len(question.outputs) == expected.get(name, 1)
    assert all(output in answer for output in question.outputs)
    assert match(answer, TextQuestion(name, 512, 3, text, question.outputs)) == Score(True, 1.0)
    assert question.depth == (None if name == "frequent-words" else 3)
    assert text.rindex("Answer:") > text.rindex("Question:")


def test_questions_are_the_same_every_time_and_held_out_from_calibration():
    def tokens(**options):
        return Plan(("multi-key",), (512,), 2, **options).draw("multi-key", 512, 1).batch.tokens

    assert torch.equal(tokens(), tokens())
    assert not torch.equal(tokens(), tokens(seed=1))
    assert not torch.equal(tokens(), tokens(held_out=False))
    seeds = []

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        tokens()
        tokens(held_out=False)
    assert seeds[0] == seeds[1] | HELD_OUT and not seeds[1] & HELD_OUT and max(seeds) < 1 << 32


def test_a_plan_takes_tasks_and_lengths_in_turn():
    plan = Plan(("single", "records"), (256, 512), 2)
    found = [(question.task, question.length, question.depth) for question in plan.questions_for(build_tokenizer())]
    first = [("single", 256, 0), ("records", 256, 0), ("single", 512, 0), ("records", 512, 0)]
    assert found == first + [(task, length, 1) for task, length, _ in first] and len(plan) == 8


def test_another_tokenizer_gets_text_of_its_own_length():
    tokenizer = random_weights.build_tokenizer()
    assert is_bundled(build_tokenizer()) and not is_bundled(tokenizer)
    plan = Plan(("multi-value", "records"), (3000,), 1)
    for question in plan.questions_for(tokenizer):
        assert isinstance(question, TextQuestion)
        tokens, _ = plan.document(question.task, 3000, 0, tokenizer)
        assert 2900 < len(tokens) <= 3000
        assert tokenizer.decode(tokens).startswith(question.text)
        assert question.text.endswith(question.lead) and question.lead.startswith("Answer:")


@pytest.mark.parametrize("names, lengths", [(("needle",), (512,)), (("single",), (64,))])
def test_a_plan_that_cannot_be_is_refused(names, lengths):
    with pytest.raises(UsageError, match="no task 'needle'; there are single, multi|into 64 tokens.* works is 256$"):
        Plan(names, lengths, 1)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_every_task_fits_into_the_shortest_document(name):
    for length in (*range(tasks.SHORTEST, 400, 3), 512):
        batch = tasks.make(name, length=length, rows=1, generator=torch.Generator().manual_seed(length), depth=4)
        assert batch.tokens.shape == (1, length)


def test_a_length_too_short_for_the_text_of_a_task_is_refused_with_one_that_works():
    tokenizer = random_weights.build_tokenizer()  # one token a byte: a word of the tasks takes several
    for make in (
        lambda length: load_texts("tasks:records,single", samples=4, length=length, tokenizer=tokenizer, seed=3),
        lambda length: list(Plan(("records", "multi-value"), (length, 4096), 2).questions_for(tokenizer)),
    ):
        with pytest.raises(UsageError, match="does not fit into 512 tokens of this model's tokenizer") as refused:
            make(512)
        works = int(str(refused.value).split()[-1])
        assert 512 < works < 2048 and make(works)


def test_names():
    assert parse_names("all") == tasks.NAMES
    assert parse_names("single, records,single") == ("single", "records")


def test_calibration_documents_end_with_the_answer_and_take_the_tasks_in_turn():
    tokenizer = build_tokenizer()
    samples = load_texts("tasks:single,records", samples=3, length=512, tokenizer=tokenizer, seed=4)
    assert [sample.id for sample in samples] == ["single-0", "records-0", "single-1"]
    assert all(len(sample.tokens) == 512 for sample in samples)
    evaluated = Plan(("single",), (512,), 1, seed=4).draw("single", 512, 0)
    assert samples[0].tokens != tuple(evaluated.batch.tokens[0].tolist())
    assert tokenizer.decode(samples[0].tokens[-8:]).startswith("for")
    with pytest.raises(UsageError, match="no task 'needle'"):
        load_texts("tasks:needle", samples=1, length=512, tokenizer=tokenizer)


def test_teacher_forcing_asks_for_every_token_of_the_answer(llama, monkeypatch):
    examiner = Examiner(llama, build_tokenizer())
    question = Plan(("multi-key",), (256,), 1).draw("multi-key", 256, 0)
    assert mode(question) == "teacher-forced"
    answer = question.batch.answers[0]

    def answering(tokens):
        """Logits that follow the document wherever it goes."""
        logits = torch.zeros(len(tokens), 1216)
        logits[torch.arange(len(tokens) - 1), tokens[1:]] = 1.0
        return logits

    monkeypatch.setattr(examiner._head, "logits", lambda hidden: hidden)
    monkeypatch.setattr(examiner._head, "hidden", lambda prompt: answering(prompt.tokens))
    assert examiner.ask(question) == Score(True, 1.0)
    monkeypatch.setattr(
        examiner._head,
        "hidden",
        lambda prompt: answering(torch.where(prompt.tokens == answer[1], answer[0], prompt.tokens)),
    )
    assert examiner.ask(question) == Score(False, pytest.approx(2 / 3))


def test_filler_behind_the_answer_moves_the_question_and_changes_no_answer():
    end, middle = (Plan(("multi-value",), (length,), 1, ask_at=at) for length, at in ((512, 1.0), (1024, 0.5)))
    question = middle.draw("multi-value", 1024, 3).batch
    assert question.tokens.shape == question.answer.shape == (1, 1024) and question.tail == 512
    assert (
        question.place.stop == 511 and question.answer[0, question.place].all() and not question.answer[0, 512:].any()
    )
    assert question.right(question.answers).all()
    with pytest.raises(UsageError, match="do not fit into 1024 tokens; the shortest length that works is 1280$"):
        Plan(("single",), (1024,), 1, ask_at=0.2)
    with pytest.raises(UsageError, match="at most 1, got 1.5"):
        Plan(("single",), (1024,), 1, ask_at=1.5)
    with pytest.raises(UsageError, match="only the bundled model can be asked before the end"):
        next(middle.questions_for(random_weights.build_tokenizer()))
    loaded = load_model(None, device="cpu", dtype=torch.float32)
    scores = [Examiner(loaded.model, loaded.tokenizer).ask(plan.draw("multi-value", n, 3))
              for plan, n in ((end, 512), (middle, 1024))]  # fmt: skip
    assert [score.exact for score in scores] == [True, True]


def test_rows_that_tri_shape_computes_densely_are_only_the_last_ones():
    """A needle beyond the window is found from the end of a text, and not from its middle."""
    loaded = load_model(None, device="cpu", dtype=torch.float32)
    examiner, method = Examiner(loaded.model, loaded.tokenizer), methods.available(None)["tri_shape"]
    handlers = {
        path: MethodAttention(path, method, 512, TileShape(), Stopwatch(torch.device("cpu")))
        for path in attention_modules(loaded.model)
    }
    right = {}
    for at in (1.0, 0.75):
        plan = Plan(("multi-key",), (1536,), 2, ask_at=at)
        answers = examine(
            examiner, {"dense": dense_handlers(loaded.model), "tri": handlers}, plan.questions_for(loaded.tokenizer)
        )
        right[at] = [sum(answer.score.exact for answer in given) for given in answers.values()]
    assert right == {1.0: [2, 2], 0.75: [2, 0]}


def test_a_model_is_really_asked(llama):
    examiner = Examiner(llama, build_tokenizer())
    plan = Plan(("single",), (256,), 1)
    score = examiner.ask(plan.draw("single", 256, 0))
    assert not score.exact and 0 <= score.share < 1
    question = plan.write("single", 256, 0, build_tokenizer())
    assert mode(question) == "generated"
    answer = examiner.generate(question)
    with torch.no_grad():
        tokens = build_tokenizer()(question.text, return_tensors="pt").input_ids
        first = llama(tokens).logits[0, -1].argmax()
    assert answer.split()[0].startswith(build_tokenizer().decode([first]))
    assert examiner.ask(question) == match(answer, question)


def test_string_match():
    question = TextQuestion("qa", 1, None, "?", ("Paris", "42"), "all")
    assert match("it is PARIS", question) == Score(False, 0.5)
    assert match("paris 42", question) == Score(True, 1.0)
    part = TextQuestion("qa", 1, None, "?", ("Paris", "42"), "part")
    assert match("it is 42", part) == Score(True, 1.0) and match("no", part) == Score(False, 0.0)


def test_ruler_files_are_read_back_as_they_were_written(tmp_path):
    tokenizer = random_weights.build_tokenizer()
    questions = list(Plan(("single", "frequent-words"), (2000,), 2).questions_for(tokenizer))
    ruler.write(tmp_path / "q.jsonl", questions)
    assert ruler.read(tmp_path / "q.jsonl") == questions
    line = json.loads((tmp_path / "q.jsonl").read_text().splitlines()[0])
    assert {"index", "input", "outputs", "length", "answer_prefix"} <= line.keys()
    assert not line["input"].endswith(line["answer_prefix"])


def test_a_file_of_ruler_itself(tmp_path):
    folder = tmp_path / "qa_1"
    folder.mkdir()
    record = {"index": 0, "input": "Who? ", "outputs": ["Ada", "Lovelace"], "length": 9, "length_w_model_temp": 9,
              "answer_prefix": "Answer:", "token_position_answer": 3}  # fmt: skip
    (folder / "validation.jsonl").write_text(json.dumps(record) + "\n")
    (question,) = ruler.read(folder / "validation.jsonl")
    assert question == TextQuestion("qa_1", 9, None, "Who? Answer:", ("Ada", "Lovelace"), "part", 32, "Answer:")
    (tmp_path / "niah_single_1.jsonl").write_text(json.dumps({"input": "Who? Answer:", "outputs": ["Ada"]}))
    (question,) = ruler.read(tmp_path / "niah_single_1.jsonl")
    assert (question.task, question.text, question.match) == ("niah_single_1", "Who? Answer:", "all")


@pytest.mark.parametrize(
    "line, message",
    [
        ({"outputs": ["a"]}, "line 1: 'input' must be text"),
        ({"input": "a"}, "line 1: 'outputs' must be a list"),
        ({"input": "a", "outputs": [1]}, "line 1: 'outputs' must be text"),
        ({"input": "a", "outputs": ["a"], "depth": 10}, "'depth' must be a whole number from 0 to 9"),
        ({"input": "a", "outputs": ["a"], "answer_prefix": None}, "'answer_prefix' must be text"),
        ([], "line 1: expected a JSON object"),
    ],
)
def test_lines_that_are_no_questions_are_refused(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match=message):
        ruler.read(tmp_path / "q.jsonl")


def test_wilson_against_its_defining_equation():
    for right, questions in ((0, 10), (3, 10), (10, 10), (487, 500)):
        share = right / questions
        for end in statistics.wilson(right, questions):
            # The ends are the shares p from which `share` lies exactly Z standard errors away.
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(
                    statistics.Z * math.sqrt(end * (1 - end) / questions), abs=1e-6
                )
    assert statistics.wilson(10, 10)[1] == pytest.approx(1) and statistics.wilson(0, 10)[0] == pytest.approx(0)
    assert statistics.wilson(0, 0) == (0, 1)


def test_paired_differences_are_of_the_same_questions():
    dense = [1.0] * 90 + [0.0] * 10
    worse = statistics.paired([0.0] * 9 + dense[9:], dense)
    assert (worse["gained"], worse["lost"]) == (0, 9)
    assert worse["difference"] == pytest.approx(-0.09) and worse["retention"] == pytest.approx(0.9)
    low, high = worse["difference_interval"]
    assert -0.17 < low < -0.09 < high < -0.04  # 9 of 100 questions: a standard error of 0.029
    low, high = worse["retention_interval"]
    assert 0.81 < low < 0.9 < high < 0.96
    nothing = statistics.paired([0.0], [0.0])
    assert nothing["retention"] is None and nothing["retention_interval"] is None


@pytest.mark.parametrize("right, wrong", [(4, 0), (4, 6), (90, 10), (500, 0)])
def test_answers_that_never_differ_leave_as_much_open_as_their_number(right, wrong):
    dense = [1.0] * right + [0.0] * wrong
    same = statistics.paired(dense, dense)
    assert same["difference"] == 0 and same["retention"] == 1
    # Wilson's bound, of the dense model's right answers kept.
    assert same["retention_interval"][0] == pytest.approx(right / (right + statistics.Z**2))
    assert same["retention_interval"][1] == pytest.approx(1 + statistics.Z**2 / right)
    spread = statistics.Z**2 / (right + wrong + statistics.Z**2)
    assert same["difference_interval"] == pytest.approx([-spread, spread])


def outcomes(questions, shares):
    """(Pairs, probability) of everything that so many questions can give."""
    for both, gained, lost in itertools.product(range(questions + 1), repeat=3):
        neither = questions - both - gained - lost
        if neither >= 0:
            pairs = statistics.Pairs(both, gained, lost, neither)
            ways = math.factorial(questions) // math.prod(map(math.factorial, pairs))
            yield pairs, ways * math.prod(share**number for share, number in zip(shares, pairs, strict=True))


@pytest.mark.parametrize("questions", [4, 12])
@pytest.mark.parametrize("dense, lost, gained", [(0.4, 0.1, 0.1), (0.9, 0.3, 0.0), (0.9, 0.02, 0.3), (0.97, 0.5, 0.3)])
def test_intervals_hold_the_truth_as_often_as_they_say(questions, dense, lost, gained):
    shares = (dense * (1 - lost), (1 - dense) * gained, dense * lost, (1 - dense) * (1 - gained))
    truth = {"retention": (shares[0] + shares[1]) / dense, "difference": shares[1] - shares[2]}
    held = dict.fromkeys(truth, 0.0)
    for pairs, probability in outcomes(questions, shares):
        for name in truth:
            if name == "difference" or pairs.dense:
                low, high = getattr(statistics, f"{name}_interval")(pairs)
                held[name] += probability * (low - 1e-9 <= truth[name] <= high + 1e-9)
            else:
                held[name] += probability  # no answer, no interval, no claim
    assert all(share > 0.935 for share in held.values()), held


@pytest.mark.parametrize("retention, least", [(0.5, 4), (0.95, 73), (0.99, 381), (1.0, None)])
def test_how_many_answers_show_a_retention(retention, least):
    assert statistics.least_answers(retention) == least
    if least:
        for count, shown in ((least - 1, False), (least, True)):
            assert (statistics.retention_interval(statistics.Pairs(count, 0, 0, 0))[0] >= retention) == shown
        assert statistics.enough_questions(statistics.Pairs(2, 0, 0, 2), retention) == pytest.approx(2 * least, rel=0.3)
    assert statistics.enough_questions(statistics.Pairs(8, 0, 2, 0), 0.8) is None
    enough = statistics.enough_questions(statistics.Pairs(95, 2, 3, 10), 0.95)
    assert statistics.retention_interval(statistics.Pairs(95, 2, 3, 10).times(enough / 110))[0] >= 0.95 and enough > 110
