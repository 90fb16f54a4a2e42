"""bsfa verify: is it still the model?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from typer import Argument, Context, Option

from ..errors import GateFailed, InputError, UsageError
from ..idle import refuse_idle
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, numbers

if TYPE_CHECKING:
    from bsfa_kernels.thresholds import Thresholds

    from ..data.image_questions import ImagePlan
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
    """Compare the model at an operating point with its dense self: kernel, layers, predictions, or answers.

    Without a limit on accuracy, texts fail (exit code 1) where KL is more than 0.01 nats above the noise floor.

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
    if tasks is None:
        refuse_idle(context, ("questions",), "without --tasks")
    else:
        refuse_idle(
            context, ("samples",) if image_root else ("samples", "data", "frames", "repeat_data"), "with --tasks"
        )
    if tasks is not None and image_root is None and _is_file(tasks):
        refuse_idle(context, ("questions", "length", "lengths"), f"with {tasks}, whose questions are all asked")
    _check_options(tasks, gates, negative_control, lengths, heat_map, save_questions)
    pictured = _pictured(tasks, data, image_root, frames, repeat_data, lengths, save_questions, questions, length, seed)
    if heat_map is not None:
        figures.check(heat_map)

    if scores not in (None, "exact", "int8"):
        raise UsageError(f"--scores must be exact or int8, got {scores!r}")
    from bsfa_kernels.backends import NAMES
    from bsfa_kernels.thresholds import Thresholds

    if backend not in ("auto", *NAMES):
        raise UsageError(f"--backend must be auto or one of {', '.join(NAMES)}; got {backend!r}")
    if tasks is not None:
        gates.check_questions(len(pictured.drawn) if pictured else _count(tasks, lengths, questions))
    artifact = Thresholds.read(thresholds)
    points = [each.name for each in artifact.points] if point is None else [point]
    artifact.index(points[0])

    from ..console import note, print_json
    from ..environment import describe
    from ..files import RESULT, check_writable, write_json
    from ..models.load import check_positions, load_model, resolve_device
    from ..verification import FORMAT, KIND

    device = resolve_device(device)
    own = pictured is not None or tasks is not None and _is_file(tasks)  # questions that have lengths of their own
    length = length or DEFAULT_LENGTH[device.type]
    sizes = (length,) if lengths is None else _lengths(lengths)
    given = None if pictured else joined(data, image_root, frames, repeat_data)
    if pictured is None:
        _check_inputs(artifact, given, length, tasks, sizes, questions, save_questions)
    for path, kind in ((output, RESULT), (heat_map, None), (save_questions, None)):
        if path is not None:
            check_writable(path, kind)

    from ..verification import run  # last: it imports transformers, which takes seconds

    longest, flag = max(sizes), "--length" if lengths is None else "--lengths"
    positions = partial(check_positions, length=longest, flag=flag)
    loaded = load_model(model, device=device, dtype=dtype, **({} if own else {"check_config": positions}))
    if loaded.label:
        note(f"{loaded.identity['id']}: {loaded.label}")
    artifact.check_model(loaded.identity)
    if seed is None:
        seed = _held_out_seed(artifact.provenance)
        pictured = pictured and replace(pictured, seed=seed)
    job = _Job(loaded, artifact, points, gates, negative_control, backend, seed, details, scores)
    if tasks is None:
        found, failures = _texts(job, given, samples, length)
    else:
        found, failures = _tasks(job, pictured or tasks, sizes, questions, heat_map, save_questions)
    dense = run.dense_notes(loaded.model)
    for reason in sorted({entry["reason"] for entry in dense}):
        count = sum(entry["reason"] == reason for entry in dense)
        note(f"{count} module(s) ran dense: {reason}")
    result = {
        "kind": KIND, "format": FORMAT, "complete": True, "seed": seed, "model": loaded.identity,
        "label": loaded.label, "thresholds": str(thresholds), "tile": str(artifact.tile),
        "environment": describe(device), "device": str(device),
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


def _tasks(
    job: _Job, spec: str | ImagePlan, lengths: tuple[int, ...], count: int, heat_map: Path | None, save: Path | None
) -> tuple[dict, list[str]]:
    """(JSON, failures) of dense against sparse answers to questions."""
    from ..console import note, progress
    from ..data import question_files, ruler
    from ..files import write_whole
    from ..models.load import explain_memory
    from ..presentation import figures, tasks_table
    from ..presentation.heat_map import heat_map as draw
    from ..suites.run import mode
    from ..verification import tasks

    loaded = job.loaded
    if isinstance(spec, str):
        asked = _questions(spec, lengths, count, job.seed, loaded.tokenizer)
        if _is_file(spec):
            question_files.check_positions(Path(spec), asked, loaded)
    else:
        overlap = _overlap(job.artifact.provenance, spec.data, "")
        if overlap:
            note(overlap)
        asked, spec = _about_images(loaded, spec), str(spec.data)
    how = mode(asked[0])
    note(f"{len(asked)} questions of {spec}, answers {how}")
    if save is not None:
        ruler.write(save, asked if how == "generated" else _written(spec, lengths, count, job.seed, loaded.tokenizer))
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


def _count(spec: str, lengths: str | None, count: int) -> int:
    """How many questions will be asked."""
    from ..data import question_files
    from ..data.plans import names_of

    if _is_file(spec):
        return len(question_files.read(Path(spec).expanduser()))
    return count * len(names_of(spec)) * (1 if lengths is None else len(_lengths(lengths)))


def _questions(spec: str, lengths: tuple[int, ...], count: int, seed: int, tokenizer) -> list:
    from ..data import question_files
    from ..data.plans import plan

    if _is_file(spec):
        return question_files.read(Path(spec).expanduser())
    return list(plan(spec, lengths, count, seed).questions_for(tokenizer))


def _pictured(
    tasks, data, image_root, frames, repeat_data, lengths, save_questions, count: int, length: int | None,
    seed: int | None,
) -> ImagePlan | None:  # fmt: skip
    """The plan of questions about images, checked, where --tasks names annotation files of --image-root."""
    from ..data.image_questions import ImagePlan

    if tasks is None or image_root is None:
        return None
    if data is not None:
        raise UsageError("--data and --tasks both name what --image-root belongs to; give one")
    for option, value in (("--lengths", lengths), ("--save-questions", save_questions)):
        if value is not None:
            raise UsageError(
                f"{option} does not go with questions about images" + "; give --length" * (value is lengths)
            )
    plan = ImagePlan(joined([tasks], image_root, frames, repeat_data), count, length, seed or 0)
    plan.check()
    return plan


def _about_images(loaded: LoadedModel, plan: ImagePlan) -> list:
    """Its questions for this model. Raises InputError for one that reads no images or has too few positions."""
    if loaded.processor is None:
        raise InputError(f"{plan.data} asks about images, and {loaded.no_processor or 'this model reads text only'}")
    from ..models.load import check_positions

    config = loaded.model.config
    if plan.length is not None:
        check_positions(config, plan.length, "--length")
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return list(plan.questions_for(loaded.processor, most))


def _is_file(spec: str) -> bool:
    """Whether --tasks names a file of questions."""
    return spec.endswith(".jsonl")


def _check_inputs(
    artifact: Thresholds, data: str | None, length: int, tasks: str | None, sizes: tuple[int, ...], count: int,
    save: Path | None,
) -> None:  # fmt: skip
    """Raise for texts and questions that can be refused without the model."""
    from ..data import question_files
    from ..data.plans import plan
    from ..data.prompts import check_source
    from ..data.questions import TextQuestion

    if tasks is None:
        shortest = 2 * max(artifact.tile.rows, artifact.tile.keys)
        if length < shortest:
            raise UsageError(f"--length {length} is shorter than two tiles of the thresholds ({shortest} tokens)")
        check_source(data, length)
    elif _is_file(tasks):
        found = question_files.read(Path(tasks).expanduser())
        if save is not None and not isinstance(found[0], TextQuestion):
            raise UsageError(f"--save-questions writes RULER's files, and {tasks} is judged by likelihood")
    else:
        plan(tasks, sizes, count)


def _written(spec: str, lengths: tuple[int, ...], count: int, seed: int, tokenizer) -> Iterator:
    """The questions of a plan as text, where the model is asked them as tokens."""
    from ..data.plans import plan

    planned = plan(spec, lengths, count, seed)
    return (planned.write(*place, tokenizer) for place in planned.places())


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


def _check_options(tasks, gates: Gates, negative_control: bool, lengths, heat_map, save_questions) -> None:
    """Raise UsageError for options that do not go together."""
    text_limits = {
        "--min-top1": gates.min_top1, "--max-perplexity-increase": gates.max_perplexity_increase,
        "--max-kl-over-floor": gates.max_kl_over_floor, "--max-dropped-mass": gates.max_dropped_mass,
    }  # fmt: skip
    task_options = {
        "--min-retention": gates.min_retention, "--lengths": lengths, "--heat-map": heat_map,
        "--save-questions": save_questions,
    }  # fmt: skip
    for option, value in (task_options if tasks is None else text_limits).items():
        if value is not None:
            raise UsageError(f"{option} needs --tasks" if tasks is None else f"{option} judges texts: drop --tasks")
    if negative_control and not gates.judge_accuracy:
        raise UsageError("--negative-control needs an accuracy gate that it can fail: --min-retention")


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
