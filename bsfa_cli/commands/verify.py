"""bsfa verify: is it still the model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from typer import Argument, Context, Option

from ..errors import GateFailed, UsageError
from ..idle import refuse_idle
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, numbers

if TYPE_CHECKING:
    from bsfa_kernels.thresholds import Thresholds

    from ..data.question_sets import QuestionSet
    from ..models.load import LoadedModel
    from ..verification.gates import Gates

DEFAULT_LENGTH = {"cpu": 2048, "cuda": 32768}
DEFAULT_KL = 0.01  # nats per position above the noise floor, where no other limit is asked for


def verify(
    context: Context,
    model: Annotated[
        str | None, Argument(help="Checkpoint directory or Hub id; the bundled retrieval model by default.")
    ] = None,
    thresholds: Annotated[Path, Option(help="Thresholds artifact made by bsfa export.")] = ...,
    point: Annotated[str | None, Option(help="Operating point in the artifact; all of them by default.")] = None,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    samples: Annotated[int, Option(min=1, help="Number of texts.")] = 2,
    length: Annotated[
        int | None, Option(min=2, help="Tokens a text, at most; 32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, help="Seed of the texts or questions; by default another one than calibration used.")
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            help="Ask questions instead: all, frames, task names (single,multi-key,...), a RULER .jsonl file, or your "
            "own, judged by likelihood: a line has question, choices and answer, or text and answer. With --image-root "
            "annotation files, as --data takes them, judged by likelihood too, behind others of --length tokens."
        ),
    ] = None,
    questions: Annotated[int, Option(min=1, help="With --tasks: questions for each task and length.")] = 20,
    lengths: Annotated[str | None, Option(help="With --tasks: several, e.g. 4096,32768, instead of --length.")] = None,
    min_retention: Annotated[
        float | None,
        Option(
            help="With --tasks: fail unless the answers show (95 % interval) that sparse accuracy is at least this "
            "share of dense accuracy; 0.95 takes 73 right answers, 0.99 takes 381."
        ),
    ] = None,
    heat_map: Annotated[
        Path | None, Option(metavar="FILE.svg", help="With --tasks: draw accuracy by length and depth; .svg or .png.")
    ] = None,
    save_questions: Annotated[
        Path | None, Option(metavar="FILE.jsonl", help="With --tasks: write the questions as a RULER file.")
    ] = None,
    min_top1: Annotated[
        float | None, Option(help="Fail below this share of positions where sparse and dense predict the same token.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, Option(help="Fail above this relative increase of perplexity (0.01 is one percent).")
    ] = None,
    max_kl_over_floor: Annotated[
        float | None,
        Option(
            help="Fail where the KL divergence from dense predictions is more than this above that with nothing "
            "skipped, in nats per position; 0.01 where no accuracy limit is given."
        ),
    ] = None,
    max_dropped_mass: Annotated[
        float | None, Option(help="Fail above this 99th percentile, over rows and heads, of dropped softmax mass.")
    ] = None,
    min_skip: Annotated[
        float | None, Option(help="Fail below this share of skipped tiles, of all layers' together.")
    ] = None,
    negative_control: Annotated[
        bool,
        Option("--negative-control", help="Also drop every tile that may be dropped: the accuracy gates must fail."),
    ] = False,
    details: Annotated[bool, Option("--details", help="Show every module, not the five worst.")] = False,
    scores: Annotated[
        str | None, Option(help="exact, or int8 (Q and K rounded to 8 bits); those of each point by default.")
    ] = None,
    backend: Annotated[str, Option(help="Demand this backend; the fastest that can serve by default.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE.json", help="Write the result, for bsfa report.")
    ] = None,
    json: Json = False,
    config: Config = None,
) -> None:
    """Compare a model at an operating point with its dense self.

    In what its kernel computes, what its layers give, and what it predicts or, with --tasks, answers. Without a limit
    on accuracy, texts fail (exit code 1) where KL is more than 0.01 nats above the noise floor.

    The thresholds must have been made for this model: its configuration, and the signs of up to 256 weights of every
    parameter, must be those of the calibrated one. That tells models apart that were trained apart; a change too small
    to flip a sign, such as a weight matrix scaled by 1.01, passes this check, and shows only in what is measured.
    """
    from ..presentation import figures
    from ..verification.gates import Gates

    gates = Gates(
        min_top1, max_perplexity_increase, max_kl_over_floor, max_dropped_mass, min_skip, min_retention
    )  # fmt: skip
    if tasks is None and not gates.judge_accuracy:
        gates = replace(gates, max_kl_over_floor=DEFAULT_KL)
    _check_options(context, gates)
    sizes = None if lengths is None else _lengths(lengths)
    if heat_map is not None:
        figures.check(heat_map)
    if scores not in (None, "exact", "int8"):
        raise UsageError(f"--scores must be exact or int8, got {scores!r}")
    data = joined(data if tasks is None or image_root is None else [tasks], image_root, frames, repeat_data)

    with importing():
        from bsfa_kernels.backends import NAMES
        from bsfa_kernels.thresholds import Thresholds

        from ..console import note, print_json
        from ..environment import describe, resolve_device, wake
        from ..files import RESULT, check_writable, write_json
        from ..verification import FORMAT, KIND

    if backend not in ("auto", *NAMES):
        raise UsageError(f"--backend must be auto or one of {', '.join(NAMES)}; got {backend!r}")
    place = resolve_device(device)
    asked, own_length, length = None, length, length or DEFAULT_LENGTH[place.type]
    if tasks is not None:
        from ..data.question_sets import ImageTasks, NamedTasks, QuestionFile

        if image_root is not None:
            asked = ImageTasks(data, questions, own_length, seed or 0)
        elif _is_file(tasks):
            asked = QuestionFile(tasks)
        else:
            asked = NamedTasks(tasks, sizes or (length,), questions)
        asked.check(saved=save_questions is not None)
        gates.check_questions(len(asked), asked.more)
        if heat_map is not None and not asked.has_depths():
            raise UsageError(f"--heat-map draws answers by depth, and no question of {tasks} is asked at one")
    artifact = Thresholds.read(thresholds)
    points = [each.name for each in artifact.points] if point is None else [point]
    artifact.index(points[0])
    if asked is None:
        _check_texts(artifact, data, samples, length)
    for path, kind in ((output, RESULT), (heat_map, None), (save_questions, None)):
        if path is not None:
            check_writable(path, kind)

    wake(place)
    with importing():
        from ..models.load import check_positions, load_model
        from ..verification import run  # last: it imports transformers, which takes seconds

    longest, flag = length if asked is None else asked.longest, "--length" if sizes is None else "--lengths"
    loaded = load_model(
        model, device=place, dtype=dtype, check_config=partial(check_positions, length=longest, flag=flag)
    )
    if loaded.label:
        note(f"{loaded.identity['id']}: {loaded.label}")
    artifact.check_model(loaded.identity)
    seed = _held_out_seed(artifact.provenance) if seed is None else seed
    job = _Job(loaded, artifact, points, gates, negative_control, backend, seed, details, scores)
    if asked is None:
        found, failures = _texts(job, data, samples, length)
    else:
        found, failures = _tasks(job, asked, heat_map, save_questions)
    dense = run.dense_notes(loaded.model)
    for reason in sorted({entry["reason"] for entry in dense}):
        count = sum(entry["reason"] == reason for entry in dense)
        note(f"{count} module(s) ran dense: {reason}")
    result = {
        "kind": KIND, "format": FORMAT, "complete": True, "seed": seed, "model": loaded.identity,
        "label": loaded.label, "thresholds": str(thresholds), "tile": str(artifact.tile),
        "environment": describe(place), "device": str(place),
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "backend": backend, "gates": vars(gates),
        "dense": dense, "passed": not failures, **found,
    }  # fmt: skip
    if output:
        write_json(output, result)
        note(f"written: {output}; next: bsfa report {output} -o report.html")
    if json:
        print_json(result)
    if failures:
        raise GateFailed("; ".join(failures))
    note(f"passed: {gates.words()}")


class _Job(NamedTuple):
    """What both kinds of verification work with."""

    loaded: LoadedModel
    artifact: Thresholds
    points: list[str]
    gates: Gates
    negative_control: bool
    backend: str
    seed: int
    details: bool
    scores: str | None


def _texts(job: _Job, given: str | None, samples: int, length: int) -> tuple[dict, list[str]]:
    """(JSON, failures) of dense against sparse predictions on texts."""
    from ..console import note, progress
    from ..data.prompts import default_data, load_prompts
    from ..data.texts import data_hash, remarks
    from ..models.load import explain_memory
    from ..presentation import verify_table
    from ..verification import run

    loaded, artifact, points, seed = job.loaded, job.artifact, job.points, job.seed
    data = given or default_data(loaded)
    for remark in remarks(given, data, samples):
        note(remark)
    shortest = 2 * max(artifact.tile.rows, artifact.tile.keys)
    texts = load_prompts(data, loaded, samples=samples, length=length, seed=seed, shortest=shortest)
    note(f"data: {len(texts)} texts of {data}, seed {seed}, {sum(len(text.tokens) for text in texts):,} tokens")
    overlap = _overlap(artifact.provenance, data, data_hash(texts))
    if overlap:
        note(overlap)

    memory = explain_memory("--length, or choose a 16-bit --dtype")
    with memory, progress() as display:
        task = display.add_task(
            "dense and sparse passes",
            total=len(texts) * run.passes(artifact, points, job.scores)
            + job.negative_control * run.passes(artifact, points[:1], job.scores),
        )

        def step():
            display.advance(task)

        results = run.verify_points(loaded.model, artifact, points, texts, job.backend, step, job.scores)
        control = None
        if job.negative_control:
            control = run.negative_control(loaded.model, artifact, points[0], texts, job.backend, step, job.scores)

    failures = []
    for result in results:
        result["failures"] = job.gates.failures(result)
        failures += [f"{result['name']}: {failure}" for failure in result["failures"]]
        result["drift"] = run.drift(artifact, result)
        verify_table.show(result, result["failures"], job.details)
    failures += _judge_control(control, job.gates.accuracy_failures)
    drawn = {
        "spec": data, "seed": seed, "hash": data_hash(texts),
        "samples": [{"id": t.id, "source": t.source, "tokens": len(t.tokens)} for t in texts],
    }  # fmt: skip
    return {"data": drawn, "points": results, "negative_control": control}, failures


def _tasks(job: _Job, questions: QuestionSet, heat_map: Path | None, save: Path | None) -> tuple[dict, list[str]]:
    """(JSON, failures) of dense against sparse answers to questions."""
    from ..console import note, progress
    from ..data import ruler
    from ..files import write_whole
    from ..models.load import explain_memory
    from ..presentation import figures, tasks_table
    from ..presentation.heat_map import heat_map as draw
    from ..suites.run import mode
    from ..verification import tasks

    loaded, spec = job.loaded, questions.spec
    overlap = _overlap(job.artifact.provenance, spec, "")
    if overlap:
        note(overlap)
    asked = questions.questions_for(loaded, job.seed)
    how = mode(asked[0])
    note(f"{len(asked)} questions of {spec}, answers {how}")
    if save is not None:
        ruler.write(save, questions.written(asked, loaded, job.seed))
    memory = explain_memory("--length, or choose a 16-bit --dtype")
    with memory, progress() as display:
        contenders = 1 + len(job.points) + 2 * job.negative_control
        bar = display.add_task("dense and sparse answers", total=len(asked) * contenders)

        def step():
            display.advance(bar)

        dense, results, answers = tasks.verify_tasks(
            loaded, job.artifact, job.points, asked, job.backend, step, job.scores
        )
        control = None
        if job.negative_control:
            control = tasks.negative_control(loaded, job.artifact, job.points[0], asked, job.backend, step, job.scores)

    failures = []
    for result in results:
        result["failures"] = job.gates.task_failures(result)
        failures += [f"{result['name']}: {failure}" for failure in result["failures"]]
        tasks_table.show(result, result["failures"])
    failures += _judge_control(control, job.gates.task_accuracy_failures)
    if heat_map is not None:
        words = f"Exact answers in percent, by tokens and depth: {loaded.identity['id']}, {how}"
        write_whole(heat_map, figures.content(draw([dense, *results], words), heat_map))
        note(f"written: {heat_map}")
    found = {
        "tasks": {"spec": spec, "mode": how, "seed": job.seed, "questions": tasks.to_json(answers)},
        "dense_answers": dense, "points": results, "negative_control": control,
    }  # fmt: skip
    return found, failures


def _check_texts(artifact: Thresholds, data: str | None, samples: int, length: int) -> None:
    """Raise for texts that can be refused without the model."""
    from ..data.prompts import check_source

    shortest = 2 * max(artifact.tile.rows, artifact.tile.keys)
    if length < shortest:
        raise UsageError(f"--length {length} is shorter than two tiles of the thresholds ({shortest} tokens)")
    check_source(data, length, samples)


def _judge_control(control: dict | None, judge: Callable[[dict], list[str]]) -> list[str]:
    """The failure of a negative control that passed."""
    from ..console import note

    if control is None:
        return []
    control["failures"] = judge(control)
    if not control["failures"]:
        return ["the negative control passed: these gates cannot tell a broken model from a good one"]
    note(f"negative control fails, as it must: {'; '.join(control['failures'])}")
    return []


def _check_options(context: Context, gates: Gates) -> None:
    """Raise UsageError for options that do not go together."""
    given = {name: value for name, value in context.params.items() if value is not None}
    tasks, pictured = given.get("tasks"), "image_root" in given
    needs_tasks, judges_texts = ("min_retention", "lengths", "heat_map", "save_questions"), (
        "min_top1", "max_perplexity_increase", "max_kl_over_floor", "max_dropped_mass",
    )  # fmt: skip
    for name in needs_tasks if tasks is None else judges_texts:
        if name in given:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} needs --tasks" if tasks is None else f"{flag} judges texts: drop --tasks")
    if tasks is None:
        refuse_idle(context, ("questions",), "without --tasks")
    elif pictured:
        refuse_idle(context, ("samples",), "with --tasks")
        if "data" in given:
            raise UsageError("--data and --tasks both name what --image-root belongs to; give one")
        for name, hint in (("lengths", "; give --length"), ("save_questions", "")):
            if name in given:
                raise UsageError(f"--{name.replace('_', '-')} does not go with questions about images{hint}")
    else:
        refuse_idle(context, ("samples", "data", "frames", "repeat_data"), "with --tasks")
        if _is_file(tasks):
            refuse_idle(context, ("questions", "length", "lengths"), f"with {tasks}, whose questions are all asked")
    if given["negative_control"] and not gates.judge_accuracy:
        raise UsageError("--negative-control needs an accuracy gate that it can fail: --min-retention")


def _is_file(tasks: str) -> bool:
    """Whether --tasks names a file of questions."""
    return tasks.endswith(".jsonl")


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted(set(numbers(text, int, "--lengths must be whole numbers"))))


def _held_out_seed(provenance) -> int:
    """A seed that calibration did not use; its own is in the artifact's provenance."""
    used = provenance.get("seed")
    return used + 1 if isinstance(used, int) and not isinstance(used, bool) else 1


def _overlap(provenance, data: str, texts_hash: str) -> str | None:
    """A warning where the texts are, or may be, those that the thresholds were calibrated on."""
    from ..data.texts import shared_files

    calibrated = provenance.get("data")
    calibrated = calibrated if isinstance(calibrated, dict) else {}
    if calibrated.get("hash") == texts_hash:
        return "these are the texts that the thresholds were calibrated on, so nothing here is held out"
    spec = calibrated.get("spec")
    shared = shared_files(data, spec) if isinstance(spec, str) else []
    if shared:
        return f"the thresholds were calibrated on a file named {shared[0]} too: these texts may not be held out"
    return None
