"""What messages quote is neither Python's notation nor longer than a line."""

import pytest
from bsfa_kernels.words import kind, quoted, short

from bsfa_cli.errors import InputError, memory_wanted, said, unlike_its_format


@pytest.mark.parametrize(
    "value, words, what",
    [
        (None, "null", "null"),
        (True, "true", "true"),
        ([1.5, "a"], '[1.5, "a"]', "a list"),
        ({"a": None}, '{"a": null}', "an object"),
        (3, "3", "a number"),
        ("é\x1b[2J", "'é\\x1b[2J'", "text"),
        ("a" * 100, f"'{'a' * 77}...'", "text"),
        ({(1, 2): 3}, "{(1, 2): 3}", "an object"),  # YAML's keys may be anything
    ],
)
def test_values_are_shown_as_json(value, words, what):
    assert quoted(value) == words and kind(value) == what
    assert short(value) == words.strip("'")


def test_what_an_exception_says():
    assert said(KeyError("cells")) == "there is no key 'cells'"
    assert said(ValueError("one\ntwo")) == "one"
    assert said(AssertionError()) == "AssertionError"
    assert memory_wanted(RuntimeError("can't allocate memory: you tried to allocate 3221225472 bytes. Error")) == (
        " (asked for 3.0 GiB)"
    )
    assert memory_wanted(MemoryError()) == ""
    for error, told in ((KeyError("a"), ": there is no key 'a'"), (TypeError("'int' object is not iterable"), "")):
        assert str(unlike_its_format("f.json", error)) == f"f.json lacks or breaks what its format promises{told}"
    assert isinstance(unlike_its_format("f.json", KeyError("a")), InputError)
