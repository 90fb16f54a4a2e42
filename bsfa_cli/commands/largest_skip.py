"""bsfa export --largest-skip-with: points found by what the model then predicts, on texts that are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import InputError, UsageError

if TYPE_CHECKING:
    from ..calibration.points import Request
    from ..calibration.store import Run
    from ..verification.search import Limit

# Texts to search on are others than calibration and `verify`, whose seeds are the run's and the next, have seen.
SEARCH_SEED = 2_000_000


class Place(NamedTuple):
    """Where a search looks: as the options of `export`."""

    model: str | None
    data: str | None
    samples: int
    length: int | None
    device: str
    dtype: str
    by_modality: bool


def parse_limits(texts: list[str]) -> list[Limit]:
    from ..verification.search import Limit

    limits = [Limit.parse(text) for text in texts]
    for limit in limits:
        if limits.count(limit) > 1:
            raise UsageError(f"operating point {limit.name} was asked for twice")
    return limits


def find(
    run: Run,
    limits: list[Limit],
    gate: str,
    quantile: float,
    place: Place,
    scores: str | None,
    max_int8_error: float | None,
) -> tuple[list[Request], dict[str, dict], dict[str, str]]:
    """(the points that keep the limits, {point: what was measured}, {point: why there is none})."""
    from functools import partial

    from ..calibration.points import Request
    from ..console import note, progress
    from ..data.prompts import check_source
    from ..data.texts import data_hash
    from ..environment import resolve_device
    from ..models.load import check_positions, explain_memory, load_model
    from ..verification.search import Search

    options = run.manifest["options"]
    data, length = place.data or options["data"], place.length or options["length"]
    check_source(data, length, place.samples)
    device = resolve_device(place.device)
    positions = partial(check_positions, length=length, flag="--length")
    loaded = load_model(place.model, device=device, dtype=place.dtype, check_config=positions)
    run.check_model(loaded.identity)
    texts = _texts(run, data, place.samples, length, loaded)
    seen = {"data": data, "hash": data_hash(texts), "seed": options["seed"] + SEARCH_SEED}
    note(f"searching on {len(texts)} texts of {data}, {sum(len(text.tokens) for text in texts):,} tokens")
    requests, searched, left_out = [], {}, {}
    with explain_memory("--length, or choose a 16-bit --dtype"), progress() as display:
        task = display.add_task("searching", total=None)
        search = Search(
            loaded, run, texts, gate, quantile, lambda: display.advance(task), scores, max_int8_error, place.by_modality
        )
        display.update(task, total=len(limits) * search.passes())
        for limit in limits:
            found = search.largest(limit)
            if found is None:
                least = search.at(1)[limit.metric] if search.rates else None
                left_out[limit.name] = (
                    f"no skip rate keeps it: at 1 % skipped {limit.metric} is {least.value:.6g}, and the end of its "
                    f"interval {least.worst:.6g}"
                    if least
                    else "the gate can drop nothing"
                )
                continue
            requests.append(Request("target-skip", found.rate, gate, limit.name))
            searched[limit.name] = found.to_json(limit) | seen
            note(
                f"{limit.name}: {found.rate:.0%} skipped, {limit.metric} {found.measured.value:.6g}, at the end of its "
                f"interval {found.measured.worst:.6g}"
            )
    return requests, searched, left_out


def _texts(run: Run, data: str, samples: int, length: int, loaded) -> list:
    """Texts that the run has not seen. Raises InputError where there are none."""
    from ..data.prompts import load_prompts
    from ..data.texts import shared_files

    options, seen = run.manifest["options"], set()
    if shared_files(data, options["data"]):
        seen = {sample["id"] for sample in run.manifest["samples"]}
    shortest = 2 * max(options["tile"])
    texts = load_prompts(
        data, loaded, samples=samples + len(seen), length=length, seed=options["seed"] + SEARCH_SEED, shortest=shortest
    )
    texts = [text for text in texts if text.id not in seen][:samples]
    if not texts:
        raise InputError(f"{data}: the run was calibrated on every text of it; give others with --data")
    return texts
