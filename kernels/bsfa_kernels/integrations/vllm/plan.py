"""Which sequences of a vLLM batch, and which of its layers, bsfa serves; vLLM's own kernel serves the rest.

Device-free and without vLLM: numbers in, decisions and their reasons out. What a call on our side then runs is decided
where it is for every integration, in `integrations/plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...thresholds import Thresholds, ThresholdsError
from ..plan import SINKS, softcap_reason, window_reason

MLA, CROSS = "multi-head latent attention", "it does not attend causally to its own sequence"
BIDIRECTIONAL = "the batch is not plain causal"
REFERENCE_WINDOW = "a reference sliding window"
CONTEXT_PARALLEL = "context parallelism divides sequences over ranks"
UNKNOWN_LENGTHS = "vLLM gave no sequence lengths on the host"
QUANTISED_OUTPUT = "vLLM asks for a quantised output"
HEAD_SCALES = "the cache has one FP8 scale a head"
UNQUANTISED = ("auto", "float16", "bfloat16", "float32")
FP8 = ("fp8", "fp8_e4m3")
# Arguments of an attention layer that change nothing in what it computes, or are judged by name below.
HARMLESS = frozenset({"use_alibi_sqrt"})
# How vLLM calls a module of transformers, as (its beginning there, its beginning here).
RENAMED = (
    ("", ""),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
)


class Prefill(NamedTuple):
    """One sequence of a batch whose queries fill at least a tile."""

    request: int  # its row in the block table
    start: int  # of its queries in the batch
    rows: int  # queries; they are the last of its keys
    keys: int

    @property
    def q_offset(self) -> int:
        return self.keys - self.rows


class Batch(NamedTuple):
    """A batch taken apart."""

    prefills: tuple[Prefill, ...]
    others: tuple[int, ...]  # requests that vLLM's kernel serves: decoding and short chunks


class LayerFacts(NamedTuple):
    """How vLLM describes an attention layer."""

    attn_type: str = "decoder"
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    alibi_slopes: Sequence[float] | None = None
    kv_cache_dtype: str = "auto"
    sinks: bool = False
    others: Mapping[str, object] = {}  # keyword arguments besides


def take_apart(
    starts: Sequence[int], lengths: Sequence[int], least_rows: int, few: Callable[[int, int], bool] = lambda *_: False
) -> Batch:
    """`starts` [requests + 1]: where each request's queries begin in the batch; `lengths` [requests]: its keys, these
    queries included; a request of fewer than `least_rows` queries has no query tile that a gate might judge, and one
    that is `few(queries, keys)` takes less time without.

    Raises ValueError where these are no batch.
    """
    if len(starts) != len(lengths) + 1 or any(b < a for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"{len(lengths)} requests cannot begin at {list(starts)}")
    prefills, others = [], []
    for request, (start, end, keys) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
        rows = end - start
        if rows > keys:
            raise ValueError(f"request {request} has {rows} queries and {keys} keys")
        if rows >= least_rows and not few(rows, keys):
            prefills.append(Prefill(request, start, rows, keys))
        elif rows:  # a batch that is padded to a captured size ends in requests without queries
            others.append(request)
    return Batch(tuple(prefills), tuple(others))


def token_rows(starts: Sequence[int], requests: Sequence[int]) -> slice | list[int]:
    """The batch's rows that belong to `requests`: a slice where they lie side by side."""
    rows = [row for request in requests for row in range(starts[request], starts[request + 1])]
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return rows


def head_slice(heads: int, local: int, rank: int, size: int) -> slice:
    """Query heads of tensor-parallel `rank` of `size`, which has `local` of the model's `heads`: vLLM deals them out in
    order. Raises ThresholdsError where they are dealt out otherwise.
    """
    if local * size != heads or not 0 <= rank < size:
        raise ThresholdsError(
            f"the thresholds have {heads} query heads, and vLLM has {local} on rank {rank} of {size}: they cannot be "
            "divided"
        )
    return slice(rank * local, (rank + 1) * local)


def of_heads(thresholds: Thresholds, point: str | None, path: str, heads: slice) -> Thresholds:
    """One point's thresholds of these query heads of one module."""
    row = thresholds.index(point)
    values = thresholds.tensors[path][row : row + 1, heads].contiguous()
    return replace(thresholds, points=(thresholds.points[row],), tensors={path: values})


def module_path(layer: str, paths: Iterable[str]) -> str | None:
    """The module among `paths` (as in transformers' named_modules) that vLLM calls `layer`; None where it is none.

    vLLM's attention layer lies in the module that transformers' attention is: "model.layers.0.self_attn.attn".
    """
    paths = set(paths)
    parent = layer.removesuffix(".attn")
    for name in (parent, f"{parent.removesuffix('.attn')}.self_attn", layer):
        for there, here in RENAMED:
            if name.startswith(there) and here + name[len(there) :] in paths:
                return here + name[len(there) :]
    return None


def module_paths(layers: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """{layer: module path} of the layers that thresholds were calibrated for. Raises ThresholdsError where two layers
    would be the same module.
    """
    paths, found = list(paths), {}
    for layer in layers:
        path = module_path(layer, paths)
        if path in found.values():
            raise ThresholdsError(f"vLLM has more than one layer that could be {path!r}")
        if path is not None:
            found[layer] = path
    return found


def layer_reason(facts: LayerFacts, fp8: bool) -> str | None:
    """Why vLLM's kernel keeps a layer, in words; None where bsfa may serve it. `fp8`: FP8 pages can be read."""
    if facts.attn_type != "decoder":
        return f"{CROSS} ({facts.attn_type})"
    if facts.sliding_window is not None:
        return window_reason(facts.sliding_window)
    if facts.logits_soft_cap:
        return softcap_reason(facts.logits_soft_cap)
    if facts.sinks:
        return SINKS
    if facts.alibi_slopes is not None:
        return "ALiBi biases"
    if facts.kv_cache_dtype not in UNQUANTISED and not (fp8 and facts.kv_cache_dtype in FP8):
        return f"a KV cache of {facts.kv_cache_dtype}"
    unknown = sorted(name for name, value in facts.others.items() if name not in HARMLESS and _says_something(value))
    if unknown:
        return f"attention arguments that bsfa does not know: {', '.join(unknown)}"
    return None


def _says_something(value: object) -> bool:
    return not (value is None or value is False)


def round_to_tiles(computed: int, new: int, total: int, rows: int) -> int:
    """How many tokens a prefill chunk should have that would have `new`, from `computed` on in a prompt of `total`.

    A chunk that ends inside a query tile leaves it to no call as a whole, and every key tile of it is kept: end at the
    tile's first row, unless the prompt ends or nothing would be left.
    """
    end = computed + new
    if end >= total:
        return new
    rounded = end // rows * rows - computed
    return rounded if rounded > 0 else new
