"""What a verified operating point must reach, and the sentences for what it does not."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..metrics import statistics


@dataclass(frozen=True)
class Gates:
    """Limits asked for on the command line; None where none was."""

    min_top1: float | None = None  # share of positions, 0 .. 1
    max_perplexity_increase: float | None = None  # relative: 0.01 is one percent
    max_kl_over_floor: float | None = None  # nats per position, above what the kernel gives with nothing skipped
    max_dropped_mass: float | None = None  # 99th percentile over rows, 0 .. 1
    min_skip: float | None = None  # share of the whole model's candidate tiles, 0 .. 1
    min_retention: float | None = None  # lower end of the interval for sparse over dense accuracy, 0 .. 1

    def __post_init__(self):
        for name in ("min_top1", "max_dropped_mass", "min_skip", "min_retention"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UsageError(f"--{name.replace('_', '-')} must lie between 0 and 1, got {value}")
        for name in ("max_perplexity_increase", "max_kl_over_floor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be a number from 0 on, got {value}")

    @property
    def judge_accuracy(self) -> bool:
        return any(limit is not None for name, limit in vars(self).items() if name != "min_skip")

    def words(self) -> str:
        """The limits, as options."""
        given = [f"--{name.replace('_', '-')} {limit:g}" for name, limit in vars(self).items() if limit is not None]
        return ", ".join(given) + ("" if self.judge_accuracy else f"{' and ' * bool(given)}no limit on accuracy")

    def accuracy_failures(self, result: dict) -> list[str]:
        """Sentences for the accuracy limits that `result` (see run.py) misses. A number that is not one misses."""
        logits, dropped = result["logits"], result["dropped_mass"]["p99"]
        checks = (
            ("--min-top1", "top-1 agreement", logits["top1"], self.min_top1, 1),
            ("--max-perplexity-increase", "perplexity increase", logits["perplexity_increase"],
             self.max_perplexity_increase, -1),
            ("--max-kl-over-floor", "KL above the noise floor", logits["kl_over_floor"]["value"],
             self.max_kl_over_floor, -1),
            ("--max-dropped-mass", "p99 dropped mass", dropped, self.max_dropped_mass, -1),
        )  # fmt: skip
        return [
            f"{what} is {'not finite' if value is None else format(value, '.6g')} ({option} {limit:g})"
            for option, what, value, limit, sign in checks
            if limit is not None and (value is None or not sign * value >= sign * limit)
        ]

    def failures(self, result: dict) -> list[str]:
        """Everything that fails `result`: its limits, no skipping, non-finite output, a kernel unlike the reference."""
        found = self.accuracy_failures(result)
        if self.min_skip is not None and result["skip"] < self.min_skip:
            found.append(f"skip rate is {result['skip']:.4g} (--min-skip {self.min_skip:g})")
        if result["kept"] == result["candidates"]:
            found.append("nothing was skipped, so nothing was verified")
        if not result["finite"]:
            found.append("the output is not finite")
        if result["scores"] != "exact":
            others = sum(module["scores"] != result["scores"] for module in result["modules"])
            if others:
                found.append(f"{others} modules ran exact scores: no kernel here has {result['scores']} ones for them")
        for check in result["kernel"]:
            if not check["passed"]:
                error, allowed = (
                    "a number that is not finite" if check[key] is None else f"{check[key]:.3g}"
                    for key in ("error", "allowed")
                )
                found.append(
                    f"{check['path']}: backend {check['backend']} is off the reference by {error} (allowed {allowed}) "
                    f"and decided {check['decided_differently']} of {check['candidates']} tiles differently"
                )
        return found

    def task_accuracy_failures(self, result: dict) -> list[str]:
        """The same for `--min-retention` and the `summarise` of a point's answers."""
        if self.min_retention is None:
            return []
        if result["retention"] is None:
            return ["the dense model answers nothing, so there is nothing to retain (--min-retention)"]
        asked, least = f"(--min-retention {self.min_retention:g})", result["retention_interval"][0]
        if result["retention"] < self.min_retention:
            return [f"retention of dense accuracy is {result['retention']:.4g} {asked}"]
        if least >= self.min_retention:
            return []
        both = round(result["dense"] * result["questions"]) - result["lost"]
        others = result["questions"] - both - result["gained"] - result["lost"]
        pairs = statistics.Pairs(both, result["gained"], result["lost"], others)
        enough = statistics.enough_questions(pairs, self.min_retention)
        return [
            f"retention of dense accuracy is {result['retention']:.4g}, of which {result['questions']} questions show "
            f"only that it is at least {least:.4g} {asked}"
            + (f"; about {enough} such questions would show more" if enough else "")
        ]

    def check_questions(self, count: int, more: str) -> None:
        """Raise UsageError where `count` questions cannot show `--min-retention`, whatever the answers; `more` says how
        to get more of them.
        """
        least = None if self.min_retention is None else statistics.least_answers(self.min_retention)
        if self.min_retention == 1:
            raise UsageError("--min-retention 1 is more than any number of questions can show; give less")
        if least is not None and count < least:
            raise UsageError(
                f"--min-retention {self.min_retention:g} needs at least {least} questions that the dense model answers "
                f"right, and {count} would be asked; {more}"
            )

    def task_failures(self, result: dict) -> list[str]:
        """Everything that fails a point's answers: its limits, and no skipping."""
        found, skip = self.task_accuracy_failures(result) + result.get("instead", []), result["skip"] or 0.0
        if self.min_skip is not None and skip < self.min_skip:
            found.append(f"skip rate is {skip:.4g} (--min-skip {self.min_skip:g})")
        if not skip:
            found.append("nothing was skipped, so nothing was verified")
        return found
