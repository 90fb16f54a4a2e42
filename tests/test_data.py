"""Calibration data: every supported file, generated text, and one sentence for whatever cannot be used."""

import json
import re
from types import SimpleNamespace

import pytest

from bsfa_cli.data import prompts
from bsfa_cli.data import texts as data
from bsfa_cli.data.generated_text import KINDS, generate
from bsfa_cli.data.images import ImageData
from bsfa_cli.data.texts import data_hash, load_texts
from bsfa_cli.errors import InputError, UsageError
from bsfa_cli.models.random_weights import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def load(spec, tokenizer, **options):
    return load_texts(str(spec), **{"samples": 4, "length": 100, "tokenizer": tokenizer, "shortest": 20} | options)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_is_seeded_and_varied(kind, tokenizer):
    text = generate(kind, 1, 5000)
    assert text == generate(kind, 1, 5000) != generate(kind, 2, 5000) and len(text) >= 5000
    assert len(set(text.split())) > 60 and text.isascii()
    samples = load(f"builtin:{kind}", tokenizer)
    assert [len(sample.tokens) for sample in samples] == [100] * 4
    assert len({sample.tokens for sample in samples}) == 4
    assert data_hash(samples) == data_hash(load(f"builtin:{kind}", tokenizer))
    assert data_hash(samples) != data_hash(load(f"builtin:{kind}", tokenizer, seed=1))


def test_a_text_file_becomes_windows(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text(generate("prose", 0, 330)[:330])
    samples = load(path, tokenizer)
    assert [len(sample.tokens) for sample in samples] == [100, 100, 100, 30]
    assert b"".join(bytes(sample.tokens) for sample in samples) == path.read_bytes()
    path.write_text(generate("prose", 0, 100_000))
    assert [len(sample.tokens) for sample in load(path, tokenizer)] == [100] * 4


@pytest.mark.parametrize("key", ["text", "input_text", "input"])
def test_jsonl_keys(key, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({key: f"{i}" * 50, "other": 1}) for i in range(3)) + "\n\n")
    samples = load(path, tokenizer)
    assert sorted(sample.id for sample in samples) == ["line-1", "line-2", "line-3"]
    assert {sample.tokens for sample in samples} == {tuple(str(i).encode() * 50) for i in range(3)}


class Chat:
    """A tokenizer by characters with a chat template that begins every conversation, unless told otherwise."""

    bos_token_id, chat_template = ord("<"), "template"

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return SimpleNamespace(input_ids=[ord("<")] * add_special_tokens + [ord(c) for c in text])

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            raise ValueError(f"roles must\nalternate, got {roles}")
        return "<" + "".join(f"[{message['role']}]{message['content']}" for message in messages)


def test_messages_go_through_the_chat_template_and_prompts_are_text(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    talk = [{"role": "user", "content": "Hello " * 5}, {"role": "assistant", "content": "Hi."}]
    path.write_text(json.dumps({"prompt": "Hello", "messages": talk}) + "\n" + json.dumps({"prompt": "p" * 40}))
    samples = {sample.id: "".join(map(chr, sample.tokens)) for sample in load(path, Chat())}
    assert samples == {"line-1": "<[user]" + "Hello " * 5 + "[assistant]Hi.", "line-2": "<" + "p" * 40}
    with pytest.raises(InputError, match="line 1: 'messages' needs a chat template"):
        load(path, tokenizer)
    path.write_text(json.dumps({"messages": talk[:1]}))
    with pytest.raises(InputError, match=r"line 1: the chat template refuses 'messages': roles must alternate"):
        load(path, Chat())


@pytest.mark.parametrize("blank", [" ", "\n", "\t \n"])
@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_blanks_do_not_use_up_a_sample(blank, name, tmp_path):
    class Merging:
        """2,000 blanks to a token, and every other character one."""

        bos_token_id = None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return SimpleNamespace(input_ids=[len(part) for part in re.findall(r"\s{1,2000}|\S", text)])

    text = blank * 200_000 + "x" * 3000
    (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("l") else text)
    (sample,) = load(tmp_path / name, Merging(), samples=1, length=1000)
    assert len(sample.tokens) == 1000


def test_more_samples_of_a_text_file_leave_its_windows_where_they_are(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} " for i in range(30_000)))
    all_windows = load(path, tokenizer, samples=8)
    assert len({sample.tokens for sample in all_windows}) == 8
    for samples in (1, 2, 3, 5):
        assert load(path, tokenizer, samples=samples) == all_windows[:samples]


def test_tasks_take_turns(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    tasks = ["a"] * 8 + ["b"] * 2
    path.write_text("\n".join(json.dumps({"input_text": f"{i:03}" * 20, "task_name": t}) for i, t in enumerate(tasks)))
    sources = [sample.source for sample in load(path, tokenizer)]
    assert [source[-3:] for source in sources] == ["(a)", "(b)", "(a)", "(b)"]


LINE = json.dumps({"text": "x" * 50}) + "\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("absent.txt", None, "does not exist"),
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.txt", b"abc\xff\xfe", "not UTF-8.*byte 3"),
        ("a.txt", b"abc\0def", "zero byte"),
        ("a.csv", b"text", "must be .txt or .jsonl"),
        ("a.jsonl", LINE.encode() + b"{oops", "line 2: not JSON"),
        ("a.jsonl", LINE.encode() + b"[1]", "line 2: expected a JSON object"),
        ("a.jsonl", LINE.encode() + b'\n{"body": "x"}', "line 3: needs one of the keys text.*it has body"),
        ("a.jsonl", b'{"text": 5}', "line 1: 'text' must be text"),
        ("a.jsonl", b'{"text": ""}', "line 1: 'text' must be text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "surrogate"),
        ("a.jsonl", b'{"messages": "hello"}', "line 1: 'messages' must be a list"),
        ("a.jsonl", b'{"messages": []}', "line 1: 'messages' must be a list"),
        ("a.jsonl", b'{"messages": ["hello"]}', "line 1: 'messages' must be a list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1: 'messages.content' must be text"),
        ("a.jsonl", b'{"messages": [{"role": 1, "content": "x"}]}', "line 1: 'messages.role' must be text"),
        ("a.jsonl", b'{"prompt": [1]}', "line 1: 'prompt' must be text"),
        ("a.jsonl", b'{"text": "short"}', "longest has 5 tokens, and at least 20"),
        ("a.txt", b"short", "every sample is too short"),
    ],
)
def test_unusable_data_gets_one_sentence(name, content, said, tmp_path, tokenizer):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load(path, tokenizer)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_directories_and_unknown_builtins(tmp_path, tokenizer):
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(InputError, match="data folder .* holds no"):
        load(tmp_path / "d.txt", tokenizer)
    with pytest.raises(UsageError, match="builtin:mixed, builtin:prose"):
        load("builtin:poems", tokenizer)


def test_the_beginning_token_is_on_every_sample(tmp_path):
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(c) for c in text])

    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 20)
    samples = load(path, Tokenizer())
    assert [sample.tokens[0] for sample in samples] == [1, 1]
    assert [len(sample.tokens) for sample in samples] == [100, 100]


def test_several_sources_are_read_in_turns(tmp_path, tokenizer):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a" * 300)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{c * 90}"}}\n' for c in "bcd"))
    (tmp_path / "deep" / "er" / "a.txt").write_text("e" * 90)
    (tmp_path / "deep" / "notes.md").write_text("no data")
    (tmp_path / "odd, name.txt").write_text("o" * 90)
    a, b, deep = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "deep"

    def ids(spec, samples=6):
        return [sample.id for sample in load(spec, tokenizer, samples=samples)]

    assert ids(f"{a},{b}")[:3] == ["a.txt:window-0", ids(f"{a},{b}")[1], "a.txt:window-1"]
    assert len(set(ids(f"{a},{b}"))) == 6 and {name[:7] for name in ids(f"{a},{b}")} == {"a.txt:w", "b.jsonl"}
    assert ids(f"{a},{a},{tmp_path / 'deep' / '..' / 'a.txt'}") == ids(a)  # named thrice, read once
    assert ids(deep) == ["window-0"] and load(deep, tokenizer)[0].tokens == tuple(b"e" * 90)
    assert ids(f"{a},{deep}")[:2] == [f"{a}:window-0", f"{deep / 'er' / 'a.txt'}:window-0"]  # two files of one name
    assert {name.split(":")[0] for name in ids(tmp_path / "*.txt")} == {"a.txt", "odd, name.txt"}
    assert ids(tmp_path / "odd, name.txt") == ["window-0"]
    mixed = ids(f"{tmp_path / 'odd, name.txt'}, {b}")
    assert [name.split(":")[0] for name in mixed[:2]] == ["odd, name.txt", "b.jsonl"]
    assert ids(f"builtin:code,{b}", 2)[0] == "builtin:code:code-0"
    both = load(f"{a},{b}", tokenizer, samples=6)
    assert load(f"{a},{b}", tokenizer, samples=6) == both and both[0].source == "a.txt, from token 0"


@pytest.mark.parametrize(
    "spec, kind, said",
    [
        ("{tmp}/*.txt", InputError, "no data file matches .*/\\*.txt"),
        ("{tmp}", InputError, "data folder .* holds no .txt or .jsonl file"),
        ("{tmp}/a.txt,builtin:code", InputError, "a.txt does not exist"),
        ("builtin:code,builtin:verse", UsageError, "no such generated text"),
        (",", UsageError, "--data names no text"),
    ],
)
def test_sources_that_are_not_there(tmp_path, tokenizer, spec, kind, said):
    spec = spec.format(tmp=tmp_path)
    for read in (lambda: load(spec, tokenizer), lambda: data.check_source(spec, 512)):
        with pytest.raises(kind, match=said):
            read()


def test_files_end_and_what_is_made_does_not(tmp_path, tokenizer):
    """A count far too large takes all of a file, and is refused where it would be made."""
    path = tmp_path / "a.txt"
    path.write_text("some words " * 400)
    prompts.check_source(str(path), 256, 1 << 40)
    assert 2 <= len(data.load_texts(str(path), samples=1 << 40, length=256, tokenizer=tokenizer)) < 100
    for spec in (
        None,
        "builtin:mixed",
        "builtin:shapes",
        f"{path},tasks:single",
        ImageData.of("a.csv", tmp_path, 1, True),
    ):
        with pytest.raises(
            UsageError, match="are more than the 134,217,728 that bsfa makes at most; lower --samples or"
        ):
            prompts.check_source(spec, 256, 1 << 40)


def test_tasks_keep_their_commas_and_results_name_no_folders():
    spec = "/home/me/a.txt,tasks:single,records,/home/me/texts,builtin:code"
    assert data.names(spec) == ["a.txt", "tasks:single,records", "texts", "builtin:code"]
    assert not data.is_generated(spec) and data.is_generated("builtin:code,tasks:single,records")
    assert data.shared_files(spec, "b.txt,texts,builtin:code") == ["texts"]


def test_generated_text_is_remarked_on_where_nobody_asked_for_it():
    (remark,) = data.remarks(None, "builtin:mixed", 8)
    assert "no --data was given, and builtin:mixed is generated text" in remark and "absolute ones and top-k" in remark
    assert data.remarks("builtin:mixed", "builtin:mixed", 8) == data.remarks(None, "tasks:all", 8) == []
    (remark,) = data.remarks("builtin:code,builtin:mixed", "builtin:code,builtin:mixed", 1)
    assert "names 2 sources, and 1 samples come from the first 1" in remark
