"""Annotation files, one record at a time, and typed access to a record's fields: .json, .jsonl, .csv, .tsv.

A .json file holds a list of records, or a dict of them by id, as LAVIS reads it. Cells of a .csv file may be
JSON lists. NaN and infinities, which JSON does not have, are refused.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..texts import read_text

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SAMPLE_ID = "sample_id"  # LAVIS's name for the key of a record in a dict of them
MOST_CHARACTERS = 4_000_000  # of one field: more than any context holds


@dataclass(frozen=True)
class Record:
    """One entry of a file; `place` names both: "val.json, entry 3", "val.csv, line 4"."""

    place: str
    fields: dict[str, Any]

    def refuse(self, what: str) -> InputError:
        """An InputError that says where."""
        return InputError(f"{self.place}: {what}")

    def text(self, key: str) -> str:
        """A field of text, not empty."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.refuse(f"{key!r} must be text and not empty, got {shown(value)}")
        return self.checked(key, value)

    def name(self, *keys: str) -> str:
        """The first of these fields that is there: text or a whole number, printable."""
        for key in keys:
            value = self.fields.get(key)
            if isinstance(value, int) and not isinstance(value, bool) or isinstance(value, str) and value.strip():
                found = self.checked(key, str(value))[:200]
                return found if found.isprintable() else "".join(c if c.isprintable() else "?" for c in found)
        raise self.refuse(f"{' or '.join(map(repr, keys))} must be text or a whole number")

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that is a text, a number, or a list of them that is not empty."""
        value = self.fields.get(key)
        values = value if isinstance(value, list) else [value]
        if not values or not all(
            isinstance(each, str) and each.strip() or isinstance(each, int | float) and not isinstance(each, bool)
            for each in values
        ):
            raise self.refuse(f"{key!r} must be text or a list of texts, none of them empty, got {shown(value)}")
        return tuple(self.checked(key, str(each)) for each in values)

    def names(self, key: str) -> list[str]:
        """A field that is a list of names of files, empty where it is missing or null."""
        value = self.fields.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
            raise self.refuse(f"{key!r} must be a list of file names, got {shown(value)}")
        return value

    def number(self, key: str, below: int) -> int:
        """A field that is a whole number from 0 to `below` - 1, or its digits."""
        value = self.fields.get(key)
        if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise self.refuse(f"{key!r} must be a whole number from 0 to {below - 1}, got {shown(value)}")
        return value

    def checked(self, key: str, value: str) -> str:
        """`value`, if it can be tokenised."""
        if len(value) > MOST_CHARACTERS:
            raise self.refuse(f"{key!r} has {len(value):,} characters; at most {MOST_CHARACTERS:,} are read")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refuse(f"{key!r} holds half a surrogate pair, so it is no text") from None
        return value

    def some(self, *keys: str) -> dict[str, str]:
        """Those of these fields that hold text or a number, as text, to split results by."""
        found = {key: self.fields.get(key) for key in keys}
        return {
            key: self.name(key)
            for key, value in found.items()
            if isinstance(value, str) and value.strip() or isinstance(value, int) and not isinstance(value, bool)
        }


def shown(value: Any) -> str:
    """`value` in a message: short, and harmless to a terminal."""
    words = "nothing" if value is None else ascii(value)
    return words if len(words) <= 60 else words[:57] + "..."


def read(path: Path) -> Iterator[Record]:
    """The records of a file, in order. Raises InputError, naming the line or entry."""
    content = read_text(path, SUFFIXES)
    readers = {".json": _document, ".jsonl": _lines, ".csv": _table, ".tsv": _table}
    yield from readers[path.suffix](path, content)


def _loads(where: str, text: str) -> Any:
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON; write null, or leave the key out")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from None


def _record(place: str, entry: Any) -> Record:
    if not isinstance(entry, dict):
        raise InputError(f"{place}: expected an object with keys, got {shown(entry)}")
    return Record(place, entry)


def _document(path: Path, content: str) -> Iterator[Record]:
    loaded = _loads(str(path), content)
    if isinstance(loaded, dict):
        if not all(isinstance(entry, dict) for entry in loaded.values()):
            raise InputError(
                f"{path}: expected a list of records, or a dict of them by id; it has the keys "
                f"{shown(', '.join(loaded))}"
            )
        for key, entry in loaded.items():
            yield Record(f"{path}, entry {shown(key)}", {SAMPLE_ID: key} | entry)
    elif isinstance(loaded, list):
        for number, entry in enumerate(loaded, 1):
            yield _record(f"{path}, entry {number}", entry)
    else:
        raise InputError(f"{path}: expected a list of records, got {shown(loaded)}")


def _lines(path: Path, content: str) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield _record(place, _loads(place, line))


def _table(path: Path, content: str) -> Iterator[Record]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        names = rows.fieldnames or []
        if len(set(names)) < len(names):
            raise InputError(f"{path}, line 1: two columns have the same name: {shown(', '.join(names))}")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row:
                raise InputError(f"{place}: more cells than the {len(names)} columns of the first line")
            yield Record(place, {key: _cell(value) for key, value in row.items() if value})
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not a table ({error})") from None


def _cell(value: str) -> Any:
    """The list that a cell holds, or its text."""
    if value.lstrip().startswith("["):
        try:
            return _loads("", value)
        except InputError:
            pass  # text in brackets
    return value
