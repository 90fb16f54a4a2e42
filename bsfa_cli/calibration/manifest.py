"""What run.json must hold for the code that reads it, so that a damaged one is one sentence and not a traceback."""

from __future__ import annotations

from collections.abc import Callable

from bsfa_kernels.container import Malformed, exact_keys
from bsfa_kernels.words import short

KEYS = ("schema", "model", "data", "options", "modules", "samples", "software")
ROLES = ("fit", "heldout")
MOST = 1 << 40  # of any count

Rule = tuple[Callable[[object], bool], str]  # and what it asks for, in words


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


def _from(least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < MOST


def _list_of(holds: Callable[[object], bool], least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(holds, value))


TEXT: Rule = (_is(str), "text")
COUNT: Rule = (_from(1), "a whole number from 1 on")
OBJECT: Rule = (_is(dict), "a JSON object")
TILE: Rule = (lambda value: _list_of(_from(1), 2)(value) and len(value) == 2, "two numbers, rows and keys")
RANKS: Rule = (_list_of(_from(1), 0), "a list of whole numbers from 1 on")
SEED: Rule = (lambda value: _is(int)(value) and not _is(bool)(value) and value >= 0, "a whole number from 0 on")
NEEDED: dict[str, dict[str, Rule]] = {
    "model": {"id": TEXT, "architecture": (_is(str, type(None)), "text or null")},
    "data": {"hash": TEXT, "spec": TEXT},
    "options": {
        "tile": TILE, "top_k": RANKS, "seed": SEED, "length": COUNT, "data": TEXT, "device": TEXT, "dtype": TEXT,
    },
}  # fmt: skip
OPTIONAL: dict[str, dict[str, Rule]] = {  # of some runs
    "model": {"layers": (_is(int, type(None)), "a whole number or null")},
    "data": {"modalities": (lambda value: value is None or _list_of(_is(str), 0)(value), "a list of names or null")},
    "options": {
        "scores": (lambda value: value in ("exact", "int8"), "exact or int8"),
        "gradients": (_is(bool), "true or false"),
    },
}
SAMPLE: dict[str, Rule] = {
    "id": TEXT, "tokens": COUNT, "role": (lambda value: value in ROLES, "fit or heldout"), "source": TEXT,
}  # fmt: skip


def check(manifest: object) -> None:
    """Raise Malformed, naming the field, for what is no run.json of this schema."""
    exact_keys("run.json", manifest, KEYS)
    for part in ("model", "data", "options", "modules", "software"):
        _ask(part, manifest[part], OBJECT)
    for part, rules in NEEDED.items():
        _ask_all(part, manifest[part], rules)
    for part, rules in OPTIONAL.items():
        _ask_all(part, manifest[part], {key: rule for key, rule in rules.items() if key in manifest[part]})
    for path, heads in manifest["modules"].items():
        _ask(f"modules.{short(path)}", heads, COUNT)
    _ask("samples", manifest["samples"], (_list_of(_is(dict), 1), "a list of JSON objects, and not empty"))
    for number, sample in enumerate(manifest["samples"], 1):
        _ask_all(f"sample {number}", sample, SAMPLE)


def _ask_all(place: str, found: dict, rules: dict[str, Rule]) -> None:
    for key, rule in rules.items():
        if key not in found:
            raise Malformed(f"{place} lacks {key}")
        _ask(f"{place}.{key}", found[key], rule)


def _ask(place: str, value: object, rule: Rule) -> None:
    holds, words = rule
    if not holds(value):
        raise Malformed(f"{place} must be {words}, got {short(value)}")
