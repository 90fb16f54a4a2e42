"""Text to calibrate and verify on: files, generated text, and tasks. One sample is one sequence of tokens.

A .txt file is one long text, cut into windows. A .jsonl file has one sample a line, under `text`, `input_text` (the
BSFA authors' file, spread over its `task_name`s), `input` (RULER), `messages` (a conversation, put through the
tokenizer's chat template) or `prompt`. Whatever is longer than `length` is cut there.
"tasks:NAME[,NAME]" are documents of those retrieval tasks with question and answer, from seeds that evaluation avoids.
Several of these, folders and patterns are read in turns: see `sources`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from bsfa_kernels.words import kind

from ..errors import InputError, UsageError
from . import frame_tasks, generated_text, plans, questions, shapes
from .images import ImageData

if TYPE_CHECKING:
    import torch

MESSAGES = "messages"
TEXT_KEYS = ("text", "input_text", "input", MESSAGES, "prompt")  # the first that a line has is read
BUILTIN, TASKS = "builtin:", "tasks:"
SUFFIXES = (".txt", ".jsonl")
MOST_COMMAS = 8  # that the name of a file may hold
MAX_FILE_BYTES = 1 << 30
# A token rarely stands for more characters than this; more of a text need not be tokenised to fill a sample.
CHARACTERS_PER_TOKEN = 12
TASK_NAMES = (*questions.tasks.NAMES, *frame_tasks.NAMES, questions.ALL, plans.FRAMES)


@dataclass(frozen=True)
class Sample:
    """One sequence: `id` names it within its data, `source` says where it stands there. `extra` is what the model's
    forward takes besides the tokens, {name: tensor}: pixel values, their grids, token types.
    """

    id: str
    tokens: tuple[int, ...]
    source: str
    extra: Mapping[str, torch.Tensor] | None = None


def load_texts(spec: str, *, samples: int, length: int, tokenizer, seed: int = 0, shortest: int = 1) -> list[Sample]:
    """Up to `samples` samples of at most `length` tokens from what `spec` names (see `sources`), several in turns;
    deterministic.

    Samples of texts under `shortest` tokens are left out. Raises InputError for data that cannot be used and UsageError
    for an unknown builtin or task.
    """
    if isinstance(spec, ImageData):
        raise InputError(f"{spec} names images, and this model reads text only; drop --image-root")
    named, found, longest = sources(spec), [], 0
    turns = {
        label: _samples(source, samples, length, seed, tokenizer)
        for label, source in zip(_labels(named), named, strict=True)
    }
    while turns and len(found) < samples:
        for label in list(turns):
            sample = next(turns[label], None)
            if sample is None:
                del turns[label]
                continue
            longest = max(longest, len(sample.tokens))
            if len(found) < samples and (len(sample.tokens) >= shortest or sample.source.startswith(TASKS)):
                if len(named) > 1:
                    sample = replace(sample, id=f"{label}:{sample.id}", source=f"{label}, {sample.source}")
                found.append(sample)
    if not found:
        raise InputError(
            f"{spec}: every sample is too short: the longest has {longest} tokens, and at least {shortest} are needed "
            "(two tiles)"
        )
    return found


def sources(spec: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """The files and generated texts that `spec` names, each once: those of its parts, separated by commas, each a file,
    a folder (all files with one of `suffixes` below it), a pattern of the shell's, "builtin:NAME" or "tasks:NAME,NAME".

    Raises InputError for folders and patterns without such a file, UsageError for nothing at all.
    """
    found: dict[str, str] = {}
    for part in _parts(spec):
        for source in [part] if _generated(part) else _files(part, suffixes):
            found.setdefault(source if _generated(part) else os.path.realpath(source), source)
    if not found:
        raise UsageError("--data names no text")
    return list(found.values())


def names(spec: str) -> list[str]:
    """The parts of `spec` as a result states them: generated texts whole, files and folders without where they lie."""
    return [_name(part) for part in _parts(spec)]


def shared_files(spec: str, other: str) -> list[str]:
    """Names of files and folders that stand in both."""
    return [name for name in names(spec) if name in names(other) and not _generated(name)]


def remarks(given: str | None, spec: str, samples: int) -> list[str]:
    """What the user should know about the texts of `spec`, which was `given`, or chosen where that is None."""
    if isinstance(spec, ImageData):
        return ["samples are repeated where they are too few for the length"] if spec.repeat else []
    found = [f"no --data was given, and {stand_in(spec)}"] if given is None and stand_in(spec) else []
    count = len(sources(spec))
    if count > samples:
        found.append(f"--data names {count} sources, and {samples} samples come from the first {samples} of them only")
    return found


def stand_in(spec: str) -> str | None:
    """The sentence to repeat wherever text generated for want of real text was used."""
    if not any(part.startswith(BUILTIN) for part in _parts(spec)):
        return None
    if f"{BUILTIN}{shapes.KIND}" in _parts(spec):
        return (
            f"{spec} are generated images, unlike what a model is shown; thresholds fitted to them cost accuracy on "
            "real ones, and numbers measured on them say little of real ones"
        )
    return (
        f"{spec} is generated text; thresholds fitted to it, absolute ones and top-k above all, cost accuracy on real "
        "text, of which numbers measured on it say little"
    )


def check_source(spec: str | None, length: int) -> None:
    """Raise, as `load_texts`, for what can be refused without a model: None is the default and always there."""
    if isinstance(spec, ImageData):
        spec.annotations.check()
        return
    for source in () if spec is None else sources(spec):
        if source.startswith(TASKS):
            plans.plan(source.removeprefix(TASKS), (length,), 1)
        else:
            next(_samples(source, 1, 1, 0, _Characters()), None)


def _parts(spec: str) -> list[str]:
    """`spec` at its commas, except within names of files that are there and between the names of tasks."""
    parts: list[str] = []
    rest = spec.split(",")
    while rest:
        longest = min(len(rest), MOST_COMMAS + 1)
        size = next((n for n in range(longest, 1, -1) if os.path.exists(os.path.expanduser(",".join(rest[:n])))), 1)
        part, rest = ",".join(rest[:size]).strip(), rest[size:]
        if parts and parts[-1].startswith(TASKS) and part in TASK_NAMES:
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts


def _files(part: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files of a file's name, a folder or a pattern."""
    path = Path(part).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file())
        if not found:
            raise InputError(f"data folder {path} holds no {' or '.join(suffixes)} file")
        return list(map(str, found))
    if not path.exists() and glob.has_magic(part):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"no data file matches {path}")
        return [file for match in matches for file in (_files(match, suffixes) if Path(match).is_dir() else [match])]
    return [str(path)]


def _labels(named: list[str]) -> list[str]:
    """A different label for each: a file's name, or the whole path where that is another's too."""
    short = list(map(_name, named))
    return [name if short.count(name) == 1 else source for name, source in zip(short, named, strict=True)]


def _samples(source: str, samples: int, length: int, seed: int, tokenizer) -> Iterator[Sample]:
    """The samples of one source, of any length."""
    if source.startswith(TASKS):
        yield from _tasks(source, samples, length, seed, tokenizer)
        return
    prefix = beginning(tokenizer)
    if source.startswith(BUILTIN):
        texts = _builtin(source, samples, length, seed)
    else:
        texts = _file(Path(source), samples, length, seed, tokenizer)
    for name, where, text in texts:
        tokens = text if isinstance(text, list) else _tokenize(tokenizer, text, length)
        # A chat template may have written the beginning token already.
        tokens = (tokens if tokens[: len(prefix)] == prefix else [*prefix, *tokens])[:length]
        yield Sample(name, tuple(tokens), where)


class _Characters:
    """A tokenizer by characters, in place of a model's."""

    bos_token_id, chat_template = None, "any"

    def __call__(self, text: str, **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    def apply_chat_template(self, messages: list[dict], **_) -> str:
        return messages[0]["content"]


def default_data(tokenizer) -> str:
    """What is read where no data is named: the tasks for the bundled model, which knows no other words."""
    if frame_tasks.is_bundled(tokenizer):
        return f"{TASKS}{plans.FRAMES}"
    return f"{TASKS}{questions.ALL}" if questions.is_bundled(tokenizer) else f"{BUILTIN}mixed"


def is_generated(spec: str) -> bool:
    """Whether `spec` names data made here and no file."""
    return all(map(_generated, _parts(spec)))


def makes(spec: str) -> bool:
    """Whether `spec` names data made here, of which there is no end."""
    return any(map(_generated, _parts(spec)))


def _generated(part: str) -> bool:
    return part.startswith((BUILTIN, TASKS))


def _name(part: str) -> str:
    return part if _generated(part) else Path(part).name


def data_hash(samples: list[Sample]) -> str:
    """sha256 over the ids and tokens of the samples, and the images of those that have some, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.tokens]).encode() + b"\n")
        for name, tensor in sorted((sample.extra or {}).items()):
            digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def falls_short(sample: Sample, length: int) -> bool:
    """Whether a sample has fewer tokens than it should. A pack of images ends before the image that would cross."""
    return len(sample.tokens) < length and not getattr(sample, "parts", ())


def beginning(tokenizer) -> list[int]:
    """The token every text begins with for this tokenizer (BOS), if it adds one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def _tokenize(tokenizer, text: str, length: int | None = None) -> list[int]:
    """Tokens of `text`, or of as much of it as `length` tokens need."""
    end = len(text) if length is None else length * CHARACTERS_PER_TOKEN + 64
    while True:
        tokens = tokenizer(text[:end], add_special_tokens=False, verbose=False).input_ids
        # Runs of blanks and the like fit hundreds of characters into a token.
        if end >= len(text) or len(tokens) > length:
            return tokens
        end *= 4


def _tasks(spec: str, samples: int, length: int, seed: int, tokenizer) -> list[Sample]:
    names = spec.removeprefix(TASKS)
    plan = plans.plan(names, (length,), -(-samples // len(plans.names_of(names))), seed, held_out=False)
    plan.check(tokenizer)
    found = []
    for i in range(samples):
        name, index = plan.tasks[i % len(plan.tasks)], i // len(plan.tasks)
        tokens, extra = plan.document(name, length, index, tokenizer)
        found.append(Sample(f"{name}-{index}", tuple(tokens), f"{TASKS}{name} seed {seed} question {index}", extra))
    return found


def _builtin(spec: str, samples: int, length: int, seed: int):
    kind = spec.removeprefix(BUILTIN)
    if kind not in generated_text.KINDS:
        names = ", ".join(BUILTIN + name for name in (*generated_text.KINDS, shapes.KIND))
        raise UsageError(f"--data {spec}: no such generated text; there is {names}")
    for i in range(samples):
        text = generated_text.generate(kind, seed * 100_003 + i, length * CHARACTERS_PER_TOKEN)
        yield f"{kind}-{i}", f"{spec} seed {seed} sample {i}", text


def _file(path: Path, samples: int, length: int, seed: int, tokenizer):
    text = read_text(path)
    if path.suffix == ".jsonl":
        return _lines(path, text, seed, tokenizer)
    return _windows(path, text, samples, length, tokenizer)


def read_text(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The content of a file with one of these suffixes. Raises InputError where it cannot be text."""
    if path.suffix not in suffixes:
        others = ", or one of the builtin:NAME texts; files that name images need --image-root"
        raise InputError(f"data file {path} must be {' or '.join(suffixes)}{others if suffixes == SUFFIXES else ''}")
    try:
        size = os.stat(path).st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"data file {path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"data file {path} does not exist") from None
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror or error}") from error
    if not content.strip():
        raise InputError(f"data file {path} is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 text (byte {error.start:,}); is it binary?") from None
    if "\0" in text:
        raise InputError(f"data file {path} is binary: it holds a zero byte")
    return text


def _lines(path: Path, content: str, seed: int, tokenizer):
    """Samples of a .jsonl file, a seeded choice that takes turns between task names."""
    by_task: dict[str, list[tuple[int, str | list[dict]]]] = {}
    for number, record in records(path, content):
        said = _said(path, number, record)
        by_task.setdefault(str(record.get("task_name", "")), []).append((number, said))
    queues = [by_task[task] for task in sorted(by_task)]
    tasks = sorted(by_task)
    for task, queue in zip(tasks, queues, strict=True):
        random.Random(f"bsfa {seed} {task}").shuffle(queue)
    while any(queues):
        for task, queue in zip(tasks, queues, strict=True):
            if queue:
                number, said = queue.pop(0)
                text = said if isinstance(said, str) else _templated(path, number, said, tokenizer)
                yield f"line-{number}", f"line {number}" + (f" ({task})" if task else ""), text


def _said(path: Path, number: int, record: dict) -> str | list[dict]:
    """The text or the messages of a line of a .jsonl file. Raises InputError, naming the line."""
    key = next((key for key in TEXT_KEYS if key in record), None)
    if key is None:
        keys = ", ".join(map(str, record))[:80] or "none"
        hint = "; images need --image-root" if "image" in keys or "video" in keys else ""
        if "choices" in keys:
            hint = "; questions with choices go to verify --tasks"
        raise InputError(f"{path}, line {number}: needs one of the keys {', '.join(TEXT_KEYS)}; it has {keys}{hint}")
    if key != MESSAGES:
        check_text(path, number, key, record[key])
        return record[key]
    messages = record[key]
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise InputError(
            f"{path}, line {number}: {key!r} must be a list of objects with role and content, and not empty"
        )
    for message in messages:
        for part in ("role", "content"):
            check_text(path, number, f"{key}.{part}", message.get(part))
    return messages


def _templated(path: Path, number: int, messages: list[dict], tokenizer) -> str:
    """`messages` through the tokenizer's chat template. Raises InputError, naming the line."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{path}, line {number}: {MESSAGES!r} needs a chat template, and this model's tokenizer has none; give text"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # noqa: BLE001 - a template may raise anything, such as for roles that do not alternate
        raise InputError(
            f"{path}, line {number}: the chat template refuses {MESSAGES!r}: {' '.join(str(error).split())}"
        ) from None


def records(path: Path, content: str) -> Iterator[tuple[int, dict]]:
    """(line number, object) of every line of a .jsonl file that is not blank. Raises InputError, naming the line."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {kind(record)}")
        yield number, record


def check_text(path: Path, number: int, key: str, value) -> None:
    """Raise InputError, naming the line, unless `value` is text and not empty."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{path}, line {number}: {key!r} must be text and not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}, line {number}: {key!r} holds half a surrogate pair, so it is no text") from None


def _windows(path: Path, text: str, samples: int, length: int, tokenizer):
    """Windows of a .txt file: consecutive where all of it is needed, else spread evenly over it, so that more samples
    leave the windows before them where they are.
    """
    slots = 1 << (samples - 1).bit_length()
    if len(text) <= slots * length * CHARACTERS_PER_TOKEN:
        tokens = _tokenize(tokenizer, text)
        step = length - len(beginning(tokenizer))
        for i, start in enumerate(range(0, len(tokens), max(step, 1))):
            yield f"window-{i}", f"from token {start}", tokens[start : start + length]
        return
    for i in range(samples):
        slot = int(f"{i:0{slots.bit_length()}b}"[:0:-1] or "0", 2)  # bits of i reversed: halves, quarters, ...
        start, end = (len(text) * edge // slots for edge in (slot, slot + 1))
        yield f"window-{i}", f"from character {start}", text[start:end]
