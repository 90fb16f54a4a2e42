"""What a vLLM server is told about bsfa: `--additional-config '{"bsfa": {"thresholds": "FILE", "point": "NAME"}}'`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ...thresholds import Thresholds, ThresholdsError
from ...words import kind

TESTED = ((0, 32),)  # with a real engine on a CPU, by tests/test_vllm_engine.py
READ = ((0, 33),)  # its source agrees with TESTED in all that is used here
FORMS = {"thresholds": str, "point": str, "log_every": (int, float), "any_version": bool}


class OptionsError(ValueError):
    """The options are not what they should be; the message says which, and what was expected."""


@dataclass(frozen=True)
class Options:
    """`thresholds` a thresholds file, `point` one of its operating points (None: its only one), `log_every` seconds
    between lines in the log while something was counted (0: none), `any_version` to try a vLLM that is not known.
    """

    thresholds: str
    point: str | None = None
    log_every: float = 10.0
    any_version: bool = False

    @classmethod
    def of(cls, additional_config: object) -> Options | None:
        """The options in vLLM's `additional_config`, None where it has none. Raises OptionsError."""
        found = additional_config.get("bsfa") if isinstance(additional_config, Mapping) else None
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise OptionsError(f'additional_config "bsfa" must be an object, got {kind(found)}')
        for name, value in found.items():
            if name not in FORMS:
                raise OptionsError(f'additional_config "bsfa" has no key {name!r}; it knows {", ".join(FORMS)}')
            if value is None and name == "point":
                continue
            if not isinstance(value, FORMS[name]) or (isinstance(value, bool) and FORMS[name] is not bool):
                wanted = {str: "text", bool: "true or false"}.get(FORMS[name], "a number of seconds")
                raise OptionsError(f'additional_config "bsfa": {name} must be {wanted}, got {value!r}')
        if not found.get("thresholds"):
            raise OptionsError('additional_config "bsfa" needs "thresholds", the path of a thresholds file')
        options = cls(**found)
        if not 0 <= options.log_every < float("inf"):
            raise OptionsError(
                f'additional_config "bsfa": log_every must be 0 seconds or more, got {options.log_every}'
            )
        return options

    def check_version(self, version: tuple) -> None:
        """Raise OptionsError for a vLLM that this code was neither tested with nor read against."""
        if self.any_version or tuple(version[:2]) in TESTED + READ:
            return
        known = ", ".join(".".join(map(str, pair)) for pair in TESTED + READ)
        raise OptionsError(
            f"this is vLLM {'.'.join(map(str, version[:3]))}, and bsfa knows {known}: install one of these, or set "
            '"any_version": true in additional_config "bsfa" to try'
        )

    @staticmethod
    def check_backend(vllm_config) -> None:
        """Raise OptionsError where a GPU's server would ignore the options: there the backend has to be asked for."""
        attention = vllm_config.attention_config
        chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
        if vllm_config.device_config.device_type == "cuda" and "CUSTOM" not in {getattr(x, "name", x) for x in chosen}:
            raise OptionsError('additional_config "bsfa" does nothing without --attention-backend CUSTOM')

    def read(self) -> Thresholds:
        """The thresholds file. Raises ThresholdsError for what is none, and for a point that it does not have or that
        is for int8 scores: what is rounded with what depends on the call, and a server's calls are its scheduler's.
        """
        stamp = os.stat(self.thresholds).st_mtime_ns if os.path.exists(self.thresholds) else 0
        thresholds = _read(self.thresholds, stamp)
        point = thresholds.points[thresholds.index(self.point)]
        if point.scores != "exact":
            raise ThresholdsError(
                f"point {point.name} is for {point.scores} scores, and in vLLM bsfa serves exact ones alone"
            )
        return thresholds


@cache
def _read(path: str, stamp: int) -> Thresholds:
    """Read once: every layer of a model asks."""
    return Thresholds.read(path)
