"""Task documents: exact length, one right answer where it was put, text and tokens the same."""

import re

import pytest
import torch

from bsfa_cli.data import document, tasks, templates
from bsfa_cli.data.vocabulary import IDS, WORDS, build_tokenizer
from bsfa_cli.data.words import CLASSES, OTHERS


def make(name, length=1024, rows=3, seed=0, **options):
    return tasks.make(name, length=length, rows=rows, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_documents_have_the_length_asked_for_and_read_back_as_the_same_tokens(name):
    tokenizer = build_tokenizer()
    for length in (256, 1024, 4096):
        batch = make(name, length)
        assert batch.tokens.shape == (3, length)
        assert torch.equal(batch.tokens[batch.answer].view(3, -1), batch.answers)
        for row in batch.tokens:
            assert tokenizer(tokenizer.decode(row[1:])).input_ids == row.tolist()


@pytest.mark.parametrize("name", tasks.NAMES)
def test_the_same_seed_gives_the_same_documents_and_another_one_does_not(name):
    assert torch.equal(make(name).tokens, make(name).tokens)
    assert not torch.equal(make(name).tokens, make(name, seed=1).tokens)


@pytest.mark.parametrize("depth", [0, 4, 9])
@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in ("single", "records")])
def test_what_is_asked_for_stands_at_the_depth(name, depth):
    batch = make(name, 4096, rows=1, depth=depth)
    value = tuple(batch.answers[0, :3].tolist()) if not name.startswith("tracking") else batch.answers[0, :1].tolist()
    tokens = batch.tokens[0].tolist()
    width = len(value)
    found = next(i for i in range(len(tokens)) if tuple(tokens[i : i + width]) == tuple(value) and is_stated(tokens, i))
    assert depth / 10 - 0.05 <= found / 4096 <= (depth + 1) / 10 + 0.05


def is_stated(tokens, index):
    """Whether the token before belongs to a sentence that states the value."""
    return WORDS[tokens[index - 1]] == "is" or WORDS[tokens[index - 1]] == "in" and WORDS[tokens[index - 2]] == "stored"


def test_values_of_a_key_may_be_given_in_any_order():
    batch = make("multi-value", 2048, rows=2, questions=2)
    answer = batch.answers[0]
    firsts = [0, 8, 16, 24]
    decode = build_tokenizer().decode
    assert [decode(answer[i : i + 3]) for i in firsts] == re.findall(r"\d+", decode(answer))
    others = batch.others[0, -batch.answer_length - 1 : -1]
    assert others[0].tolist() == answer[firsts[1:]].tolist()
    assert others[8].tolist() == [*answer[firsts[2:]].tolist(), -1]
    assert (batch.others[~batch.answer] == -1).all()
    assert (others != -1).any(-1).nonzero().flatten().tolist() == firsts[:3]
    predicted = batch.answers.clone()
    assert batch.right(predicted).all()
    predicted[0, 0] = answer[24]
    assert batch.right(predicted).all()
    predicted[0, 8] = answer[0]
    assert (~batch.right(predicted)).nonzero().tolist() == [[0, 8]]


def test_values_of_a_key_begin_differently():
    for batch in (make("multi-value", 2048, rows=64), make("multi-value", 2048, rows=64, depth=3)):
        firsts = batch.answers[:, [0, 8, 16, 24]].sort(1).values
        assert (firsts[:, 1:] != firsts[:, :-1]).all()


@pytest.mark.parametrize("name", [name for name in tasks.NAMES if name != "multi-value"])
def test_every_other_answer_has_one_order(name):
    assert (make(name).others == -1).all()


def test_templates_keep_to_the_vocabulary():
    used = {word for text in templates.ALL_TEXTS for word in templates.words(text) if not word.startswith("{")}
    assert used - {word for members in CLASSES.values() for word in members} == set(OTHERS) - {"order"}
    assert len(set(WORDS)) == len(WORDS)


def test_frequent_words_are_the_most_frequent():
    batch = make("frequent-words", 4096)
    for row, answer in zip(batch.tokens, batch.answers, strict=True):
        question = 4096 - document.length_of(templates.ASK_WORDS)
        counts = torch.bincount(row[:question], minlength=len(WORDS))
        counts[[IDS[word] for word in (*templates.words(templates.WORDS_HEADER), "<s>")]] = 0
        assert counts.topk(3).indices.tolist() == answer[::2].tolist()


def test_many_questions_each_follow_what_they_ask_about():
    batch = make("multi-key", 2048, rows=4, questions=20, groups=30)
    assert batch.answer.sum(1).tolist() == [60] * 4
    ids = torch.tensor([IDS[word] for word in ("Answer", ":")])
    for row, mask in zip(batch.tokens, batch.answer, strict=True):
        tokens = row.tolist()
        starts = [i for i in range(1, 2048) if mask[i] and not mask[i - 1]]
        assert len(starts) == 20
        for start in starts:
            assert any(tokens[i - 1 : i + 3] == tokens[start - 1 : start + 3] for i in range(1, start - 3))
    assert (batch.tokens == ids[0]).sum() == 80


def test_more_than_fits_is_refused():
    with pytest.raises(ValueError, match="do not fit into 64 tokens"):
        make("multi-query", 64)


def test_class_members_are_single_tokens_and_codes_are_no_words():
    tokenizer = build_tokenizer()
    assert [tokenizer.convert_ids_to_tokens(index) for index in range(len(WORDS))] == WORDS
    assert tokenizer("3fa9c1e2 482915", add_special_tokens=False).input_ids == [
        IDS[word] for word in ("3f", "##a9", "##c1", "##e2", "48", "##29", "##15")
    ]
