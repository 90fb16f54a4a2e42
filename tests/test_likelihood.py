"""The user's own questions by likelihood: how they are read, weighed, and put to a model dense and sparse."""

import json

import pytest
import torch
from gap_thresholds import thresholds

from bsfa_cli.data import likelihood, question_files
from bsfa_cli.data.likelihood import LikelihoodQuestion
from bsfa_cli.errors import InputError
from bsfa_cli.models.load import load_model
from bsfa_cli.suites.run import Examiner, mode

CHOICE = {"question": "Which? Answer:", "choices": ["one", "two", "three"], "answer": 2}
CLOZE = {"text": "It was said and done and", "answer": "said"}


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_lines_are_read_as_what_they_are(tmp_path):
    path = written(tmp_path / "mine.jsonl", CHOICE, CHOICE | {"answer": "two", "task": "t"}, CHOICE | {"text": "more"})
    found = question_files.read(path)
    assert [question.answer for question in found] == [2, 1, 2]
    assert [question.task for question in found] == ["mine", "t", "mine"]
    assert mode(found[0]) == "by likelihood"
    (cloze,) = question_files.read(written(tmp_path / "cloze.jsonl", CLOZE))
    assert cloze == LikelihoodQuestion("cloze", CLOZE["text"], ("said",), 0)
    (ruler,) = question_files.read(written(tmp_path / "r.jsonl", {"input": "?", "outputs": ["a"], "answer": "a"}))
    assert mode(ruler) == "generated"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"choices": ["one"]}, "'choices' must be a list of 2 to 64 texts"),
        ({"choices": "one two"}, "'choices' must be a list"),
        ({"choices": ["a", "a"]}, "stands twice"),
        ({"choices": ["a", ""]}, "'choices' must be text and not empty"),
        ({"answer": 3}, "'answer' must be one of the choices, or its number from 0 to 2"),
        ({"answer": True}, "'answer' must be one of"),
        ({"answer": "four"}, "'answer' must be one of"),
        ({"question": "  "}, "must be text and not blank"),
        ({"question": None}, "'question' must be text"),
        ({"task": 3}, "'task' must be text"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(tmp_path, change, words):
    path = written(tmp_path / "mine.jsonl", "", CHOICE, CHOICE | change)
    with pytest.raises(InputError, match=f"line 3: .*{words}"):
        question_files.read(path)


def test_files_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(InputError, match="line 2: all lines must be of one kind"):
        question_files.read(written(tmp_path / "a.jsonl", CHOICE, {"input": "?", "outputs": ["a"]}))


class Words:
    """A tokenizer by blanks and words: a blank belongs to the word behind it."""

    bos_token_id = None

    def __call__(self, text, **_):
        import re
        from types import SimpleNamespace

        return SimpleNamespace(input_ids=re.findall(r"\s*\S+|\s+", text))


@pytest.mark.parametrize("text, choice", [("a b:", "c d"), ("a b: ", "c d"), ("a b:", " c d")])
def test_a_choice_begins_with_the_blank_before_it(text, choice):
    question = LikelihoodQuestion("t", text, (choice, "x"), 0)
    assert question.encoded(Words(), choice) == (["a", " b:", " c", " d"], 2)
    with pytest.raises(InputError, match="has no token of its own"):
        question.encoded(lambda text, **_: Words()("one"), choice)


@pytest.fixture(scope="module")
def loaded(random_model):
    return load_model(random_model, device="cpu")


def test_scores_are_those_of_the_models_own_logits(loaded):
    question = LikelihoodQuestion("t", "Once upon a time", (" there", " was not", " it"), 1)
    totals = []
    for choice in question.choices:
        tokens, count = question.encoded(loaded.tokenizer, choice)
        with torch.no_grad():
            log_p = loaded.model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        totals.append(sum(float(log_p[i - 1, tokens[i]]) for i in range(len(tokens) - count, len(tokens))))
    shares = torch.tensor(totals).softmax(0)
    score = Examiner(loaded.model, loaded.tokenizer).ask(question)
    assert score.share == pytest.approx(float(shares[1]), rel=1e-3)
    assert score.exact == (int(shares.argmax()) == 1)


def test_a_cloze_is_right_where_every_token_is_the_likeliest(loaded):
    tokens = loaded.tokenizer("Once upon a time").input_ids
    with torch.no_grad():
        best = loaded.model(input_ids=torch.tensor([tokens])).logits[0, -1].argsort(descending=True)
    words = [loaded.tokenizer.decode([int(token)]) for token in best]
    examiner = Examiner(loaded.model, loaded.tokenizer)

    def size(word):
        return len(loaded.tokenizer("Once upon a time" + word).input_ids) - len(tokens)

    def ask(word):
        return examiner.ask(LikelihoodQuestion("t", "Once upon a time", (word,), 0))

    own = [word for word in words if word.startswith(" ") and size(word) == 1]
    assert words[0] not in own or ask(words[0]).exact
    assert not ask(own[-1]).exact and ask(own[-1]).share == 0


def test_verify_asks_a_file_of_them(run, one_sentence, loaded, random_model, tmp_path):
    thresholds(loaded, {"hard": 1e9}).write(tmp_path / "t.safetensors")
    rows = [CHOICE | {"question": f"{i} and on " * 60, "task": "ab"[i % 2]} for i in range(4)]
    path = written(tmp_path / "mine.jsonl", *rows)
    command = ("verify", random_model, "--thresholds", tmp_path / "t.safetensors", "--device", "cpu", "--tasks", path)
    result = run(*command, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    (point,) = found["points"]
    assert found["tasks"]["mode"] == "by likelihood" and point["questions"] == 4 and point["skip"] > 0.5
    assert set(point["by_task"]) == {"a", "b"} and len(point["difference_interval"]) == 2
    if point["dense"] < 0.5:
        assert point["unanswered"] and "answers too little of these" in result.err
    save = ("--save-questions", tmp_path / "s.jsonl")
    one_sentence(run(*command, *save), 2, "--save-questions writes RULER's files")
    one_sentence(run(*command[:-2], "--data", path), 4, "questions with choices go to verify --tasks")
    long = written(tmp_path / "long.jsonl", CHOICE | {"question": "on " * 50000})
    one_sentence(run(*command[:-1], long), 4, "past the model's")


def test_unknown_keys_are_named(tmp_path):
    with pytest.raises(InputError, match="line 1"):
        question_files.read(written(tmp_path / "a.jsonl", {"choices": ["a", "b"], "answer": 0}))
    assert likelihood.is_likelihood(CHOICE) and not likelihood.is_likelihood({"text": "a"})
