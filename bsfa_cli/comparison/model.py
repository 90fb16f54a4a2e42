"""The comparison inside a model: what every method costs until the first logits, and what the model then gets wrong.

Every method runs in every attention module alike. Times are taken in turns, over whole prefills: TTFT, and within it
the device time of selection and of attention; the dense backends run in the same modules on the same clock. On a GPU
both are launched before their clock starts, and TTFT is less what the device was held for that: a model too small to
keep the device busy would else show how fast Python launches kernels.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bsfa_kernels import TileShape
from bsfa_kernels.integrations import dense
from bsfa_kernels.integrations.transformers import AttentionModule, attach

from ..calibration.group import Group
from ..errors import BsfaError, InputError
from ..metrics.logits import Head, Predictions
from ..metrics.statistics import paired, wilson
from ..models.load import LoadedModel
from ..models.prompts import Prompt
from ..suites.run import Examiner
from ..timing import flash_attention
from ..timing.baselines import CPU_SDPA, SDPA
from ..timing.interleave import Begin, Contender, Timing, first_call, measure, unseen
from ..timing.libraries import Library
from .capture import why_dense
from .handlers import DenseAttention, FlashAttention, MethodAttention, Stopwatch
from .measure import ATTENTION, GROUPED, SELECTION, Entry
from .methods import Method


@dataclass
class _Run:
    """One contender: handlers, their stopwatch, and the entry of a method (None for a dense backend)."""

    name: str
    handlers: dict
    stopwatch: Stopwatch
    entry: Entry | None = None
    library: Library | None = None
    reason: str | None = None
    scored: dict | None = None  # {task: [right or not, 0 or 1, of each question]}
    predictions: Predictions | None = None


class ModelBench:
    """`modules`: those that may skip tiles; the others run as they always do. `texts`: prompts of equal length."""

    def __init__(
        self, loaded: LoadedModel, modules: dict[str, AttentionModule], methods: Sequence[Method], tile: TileShape,
        device: torch.device,
    ):  # fmt: skip
        self.loaded, self.model, self.device, self.tile = loaded, loaded.model, device, tile
        self.modules = modules
        self.runs = [run for run in map(self._dense, GROUPED) if run is not None]
        for method in methods:
            for setting in method.sweep:
                watch, entry = Stopwatch(device), Entry(method, setting)
                handlers = {path: MethodAttention(path, method, setting, tile, watch) for path in modules}
                self.runs.append(_Run(entry.name, handlers, watch, entry))

    def _dense(self, name: str) -> _Run | None:
        """The run of a dense kernel of GROUPED, with a reason where it is not installed; None for one of elsewhere."""
        watch, cpu = Stopwatch(self.device), self.device.type == "cpu"
        if name in flash_attention.MODULES and not cpu:
            library = flash_attention.find(name)
            if not isinstance(library, Library):
                return _Run(name, {}, watch, reason=library)
            return _Run(name, dict.fromkeys(self.modules, FlashAttention(library, watch)), watch, library=library)
        backend = (CPU_SDPA if cpu else SDPA).get(name)
        if backend is None:
            return None
        return _Run(name, dict.fromkeys(self.modules, DenseAttention(backend, watch)), watch)

    @torch.inference_mode()
    def cell(
        self, texts: Sequence, length: int, seconds: float, seed: int, questions: Sequence = (), begin: Begin = unseen,
        minutes: float | None = None, group: Group | None = None,
    ) -> dict | None:  # fmt: skip
        """Everything about one length, as JSON. `texts` as `Prompt.of` takes them, `questions` of bsfa_cli.suites, of
        which none is begun after `minutes`, but the first. The processes of a group share the questions out; all but
        the first then return None, and the first has measured everything else.
        """
        densely = dict.fromkeys(self.modules, dense.attention)
        if group is not None and not group.first:
            self._ask(questions, densely, begin, minutes, group, length)
            return None
        head = Head(self.model)
        prompts = [Prompt.of(text, self.model) for text in texts]
        work = {run.name: len(prompts) if run.entry else 1 for run in self.runs}
        step = begin(len(prompts) + sum(work.values()), "losses")
        exact = []
        called = []

        def attend_densely(q, k, v, **options):
            called.append(True)
            return dense.attention(q, k, v, **options)

        with attach(self.model, dict.fromkeys(self.modules, attend_densely)):
            for each in prompts:
                exact.append(head.hidden(each))
                step()
            if not called:
                raise InputError(f"methods cannot be compared on these prompts: {why_dense(self.model)}")
        for run in self.runs:
            done = []

            def one(done=done):
                done.append(step())

            run.reason = run.reason or self._try(
                run, lambda run=run, one=one: self._judge(run, head, prompts, exact, one)
            )
            step(work[run.name] - len(done))
        dense_score = self._ask(questions, densely, begin, minutes, group, length) if questions else None
        timings = self._time(prompts[0], seconds, seed, begin)
        gc.collect()
        left = len(questions) - sum(map(len, (dense_score or {}).values()))
        return self._result(length, timings, dense_score) | ({"questions_left": left} if left else {})

    def _try(self, run: _Run, work: Callable[[], None]) -> str | None:
        """Do `work` with a contender's handlers; the reason why that cannot be done, or None."""
        said = []

        def attempt():
            try:
                work()
            except (BsfaError, ValueError) as error:
                said.append(str(error).partition(";")[0])
                raise

        with attach(self.model, run.handlers):
            _, reason = first_call(attempt, self.device)
        return said[0] if said else reason

    @staticmethod
    def _judge(run: _Run, head: Head, prompts, exact, step) -> None:
        """The losses of one contender, `step` called after each prefill."""
        for handler in run.handlers.values() if run.entry else ():
            handler.quality = run.entry.quality
        sparse = head.hidden(prompts[0])
        for handler in run.handlers.values() if run.entry else ():
            handler.quality = None
        if run.entry:
            run.predictions = Predictions()
            for i, each in enumerate(prompts):
                run.predictions.add(head, exact[i], sparse if i == 0 else head.hidden(each), each)
                step()

    def _ask(
        self, questions: Sequence, densely: dict, begin: Begin, minutes: float | None, group: Group | None, length: int
    ) -> dict[str, list[float]]:  # fmt: skip
        """The dense answers {task: [right or not]}; every method's go into its run. One question after the other, each
        to all, so that what it takes to make one (two hundred frames are drawn) is not paid by each; tasks in turns,
        so that all have had their share where time runs out. With a group those of all processes, in the first one.
        """
        started = time.monotonic()
        able = [run for run in self.runs if run.entry and run.reason is None]
        questions = in_turns(questions)
        if group is not None:
            questions = questions[group.rank :: group.size]
        step = begin(len(questions) * (1 + len(able)), "answers")
        examiner = Examiner(self.model, self.loaded.tokenizer)
        found: dict[str, list[float]] = {}
        for run in able:
            run.scored = {}

        def ask(question, scored):
            scored.setdefault(question.task, []).append(float(examiner.ask(question).exact))

        for question in questions:
            if found and minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            with attach(self.model, densely):
                ask(question, found)
            step()
            for run in able:
                if run.reason is None:
                    run.reason = self._try(run, lambda run=run, question=question: ask(question, run.scored))
                step()
        return found if group is None else self._gather(found, group, length)

    def _gather(self, found: dict, group: Group, length: int) -> dict[str, list[float]]:
        """The dense answers of all processes and, in the first one, their methods' in its runs; what fails in one of
        them has failed.
        """
        mine = {run.name: (run.reason, run.scored) for run in self.runs if run.entry}
        parts = group.gather(f"answers/{length}", (found, mine))
        if parts is None:
            return found
        for run in self.runs:
            if run.scored is not None:
                theirs = [part[run.name] for _, part in parts]
                run.reason = run.reason or next((reason for reason, _ in theirs if reason), None)
                run.scored = merged([scored for reason, scored in theirs if not reason])
        return merged([found for found, _ in parts])

    def _time(self, prompt: Prompt, seconds: float, seed: int, begin: Begin) -> dict:
        """{name: Timing} of whole prefills; the stopwatches then hold the same passes."""
        attached = []

        def prepare(run):
            def change():
                while attached:
                    attached.pop().detach()
                attached.append(attach(self.model, run.handlers))
                run.stopwatch.begin()

            return change

        def forward():
            return self.model(**prompt.inputs, use_cache=True, logits_to_keep=1).logits

        for run in self.runs:
            run.stopwatch.passes.clear()
        contenders = [
            Contender(run.name, forward, prepare(run), ahead=False) for run in self.runs if run.reason is None
        ]
        try:
            return measure(contenders, self.device, seconds=seconds, seed=seed, begin=begin)
        finally:
            while attached:
                attached.pop().detach()

    def _result(self, length: int, timings: dict, dense_score) -> dict:
        rows, baselines, unavailable = [], [], []
        for run in self.runs:
            if run.reason is not None:
                unavailable.append({"name": run.name, "reason": run.reason})
                continue
            whole = timings[run.name].samples_ms
            laps = {phase: run.stopwatch.read(phase, len(whole)) for phase in (SELECTION, ATTENTION, Stopwatch.HELD)}
            laps["ttft"] = [spent - held for spent, held in zip(whole, laps.pop(Stopwatch.HELD), strict=True)]
            taken = {name: Timing(samples) for name, samples in laps.items()}
            selection, attention = taken[SELECTION].median, taken[ATTENTION].median
            times = {
                "ttft_ms": taken["ttft"].median,
                "samples_ms": {name: timing.as_dict()["samples_ms"] for name, timing in taken.items()},
            }
            if run.entry is None:
                library = {"library": run.library.version} if run.library else {}
                baselines.append({"name": run.name, "ms_median": attention} | library | times)
            else:
                method, setting = run.entry.method, run.entry.setting
                selection = selection if method.selects else 0.0
                rows.append({
                    "method": method.name, "knob": method.knob, "setting": setting,
                    "published": setting == method.published, "selection_ms": selection, "attention_ms": attention,
                    "total_ms": selection + attention, "accuracy": accuracy(run.scored, dense_score),
                    "agreement": run.predictions.summary(),
                } | times | run.entry.quality.summary())  # fmt: skip
        fastest = min(baselines, key=lambda found: found["ms_median"], default=None)
        for row in rows:
            row["speedup"] = fastest["ms_median"] / row["total_ms"] if fastest else None
        return {
            "level": "model",
            "label": "task" if dense_score is not None else "text",
            "length": length,
            "backend": next((row["backend"] for row in rows), None),
            "dense": baselines,
            "dense_accuracy": accuracy(dense_score, None),
            "fastest_dense": fastest and fastest["name"],
            "fastest_dense_ms": fastest and fastest["ms_median"],
            "fastest_ttft_ms": min((found["ttft_ms"] for found in baselines), default=None),
            "unavailable": unavailable,
            "rows": rows,
        }


def merged(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """{task: answers} of several such, one behind the other."""
    tasks = dict.fromkeys(task for part in parts for task in part)
    return {task: [answer for part in parts for answer in part.get(task, ())] for task in tasks}


def in_turns(questions: Sequence) -> list:
    """The first question of every task, then the second of every task, and so on."""
    counts: Counter[str] = Counter()
    turns = []
    for question in questions:
        turns.append(counts[question.task])
        counts[question.task] += 1
    return [question for _, question in sorted(zip(turns, questions, strict=True), key=lambda pair: pair[0])]


def accuracy(scored: dict[str, list[float]] | None, dense: dict[str, list[float]] | None) -> dict | None:
    """JSON of {task: right or not, question by question}: mean over tasks, the worst task, each with its 95 % Wilson
    interval, and the paired difference from dense attention on the same questions.
    """
    if not scored:
        return None
    tasks = {}
    for name, answers in scored.items():
        low, high = wilson(round(sum(answers)), len(answers))
        tasks[name] = {
            "questions": len(answers), "accuracy": sum(answers) / len(answers), "low": low, "high": high,
        }  # fmt: skip
    everything = [answer for answers in scored.values() for answer in answers]
    low, high = wilson(round(sum(everything)), len(everything))
    worst = min(tasks, key=lambda name: tasks[name]["accuracy"])
    mean = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    against = None
    if dense:
        against = paired(everything, [answer for name in scored for answer in dense[name]])
    return {"mean": mean, "low": low, "high": high, "worst": worst, "tasks": tasks, "against_dense": against}
