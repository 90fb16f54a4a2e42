"""End to end: the time to a prompt's first logits (TTFT), dense against bsfa, interleaved on one loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import sdpa_kernel

from ..data.prompts import load_prompts
from ..data.texts import falls_short
from ..errors import InputError
from ..models.prompts import Prompt
from ..prefill_tiles import Attending
from ..suites.run import exact_instead
from . import flash_attention
from .baselines import CPU_SDPA, MATH_LIMIT, SDPA
from .interleave import Begin, Contender, first_call, measure, unseen
from .libraries import Library
from .plan import EXACT, OURS, with_scores

if TYPE_CHECKING:
    from bsfa_kernels.thresholds import Thresholds

    from ..models.load import LoadedModel

OTHER_TEXTS = 1_000_000


@contextmanager
def images_seen_once(model) -> Iterator[None]:
    """Within it a vision-language model looks at images in its first pass only: what the tower said then is said again.

    Raises InputError for a model whose tower is not called apart.
    """
    base, kept = model.base_model, []
    look = getattr(base, "get_image_features", None)
    if look is None:
        raise InputError(f"{type(model).__name__} does not call its vision tower apart, so it cannot be left out")

    def remember(*arguments, **options):
        if not kept:
            kept.append(look(*arguments, **options))
        return kept[0]

    base.get_image_features = remember
    try:
        yield
    finally:
        del base.get_image_features


class Prefill:
    """One model, with the handlers of one operating point (no artifact: every tile is kept)."""

    def __init__(
        self, model: str | None | LoadedModel, artifact: Thresholds | None, point: str | None, device, dtype: str,
        check_config: Callable = lambda config: None, scores: str | None = None,
    ):  # fmt: skip
        """`model`: a name, which with `dtype` and `check_config` goes to `load_model`, or what that returned. `scores`
        override the point's own. Raises InputError for a model that cannot be used, ThresholdsError for thresholds of
        another.
        """
        from bsfa_kernels.integrations.transformers import SparseAttention, attention_modules

        from ..models.load import LoadedModel, load_model

        self.loaded = model
        if not isinstance(model, LoadedModel):
            self.loaded = load_model(model, device=device, dtype=dtype, check_config=check_config)
        self.model, self.device, self.point = self.loaded.model, device, point
        self.handlers = self.counting = None
        if artifact is not None:
            artifact.check_model(self.loaded.identity)
            modules = attention_modules(self.model)
            self.handlers, self.counting = (
                SparseAttention.for_model(artifact, modules, point, count=count, scores=scores)
                for count in (False, True)
            )
            self.point = artifact.points[artifact.index(point)].name
        self._attached = None

    def time(
        self, data: str, length: int, seed: int, seconds: float, begin: Begin = unseen, *, language_only: bool = False,
        dense: tuple[str, ...] | None = None,
    ) -> dict:  # fmt: skip
        """One prompt of `length` tokens of `data`, or up to an image fewer, timed every way that runs here, or with the
        dense kernels `dense`. `language_only`: images go through the vision tower once, before.

        `skip` is the share of all the model's candidate tiles that was dropped on that very prompt. Milliseconds as in
        `Timing`. Raises InputError for data that cannot be used or holds no prompt that long.
        """
        prompt = self._prompt(data, length, seed)
        if not language_only:
            return self._timed(prompt, data, seed, seconds, begin, dense)
        if prompt.visual is None or not bool(prompt.visual.any()):
            raise InputError(f"{data} holds no image, so the language model is all that is timed")
        with images_seen_once(self.model):
            return self._timed(prompt, data, seed, seconds, begin, dense) | {"vision": "left out"}

    def _timed(self, prompt: Prompt, data: str, seed: int, seconds: float, begin: Begin, dense) -> dict:
        from bsfa_kernels.integrations.transformers import attention_modules

        @torch.inference_mode()
        def forward():
            return self.model(**prompt.inputs, use_cache=True, logits_to_keep=1).logits

        contenders, rows, unavailable = [], [], []

        def enter(name: str, kind: str, call, prepare, skip: float | None = None, **more) -> None:
            prepare()
            _, reason = first_call(call, self.device)
            if reason:
                unavailable.append({"name": name, "reason": reason})
            else:
                contenders.append(Contender(name, call, prepare, ahead=False))
                rows.append({"name": name, "kind": kind, "skip": skip} | more)

        for name, backend in self._dense(len(prompt)).items():
            if dense is not None and name not in dense:
                continue

            def run(backend=backend):
                with nullcontext() if backend is None else sdpa_kernel(backend):
                    return forward()

            enter(name, "dense", run, lambda: self._use("sdpa"))
        for name, library in self._libraries().items():
            if dense is not None and name not in dense:
                continue
            if not isinstance(library, Library):
                unavailable.append({"name": name, "reason": library})
                continue
            handlers = dict.fromkeys(attention_modules(self.model), flash_attention.Handler(library))
            enter(name, "dense", forward, partial(self._use, "bsfa", handlers), library=library.version)
        enter("bsfa, nothing skipped", "bsfa", forward, lambda: self._use("bsfa"), 0.0)
        if self.handlers is not None:
            skip = self._skip(forward)
            scores = next(iter(self.handlers.values())).scores
            instead = [] if scores == EXACT else exact_instead(self.model)
            if instead:
                unavailable.append({"name": with_scores("bsfa", scores), "reason": "; ".join(instead)})
            else:
                prepare = partial(self._use, "bsfa", self.handlers)
                enter(with_scores("bsfa", scores), OURS[scores], forward, prepare, skip)
        timings = measure(contenders, self.device, seconds=seconds, seed=seed, begin=begin)
        self._use("bsfa")
        fastest = min((timings[row["name"]].median for row in rows if row["kind"] == "dense"), default=None)
        for row in rows:
            timing = timings[row["name"]]
            row |= {"speedup": fastest / timing.median if fastest else None} | timing.as_dict()
        return {
            "model": self.loaded.identity["id"],
            "label": self.loaded.label,
            "length": len(prompt),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "point": self.point,
            "data": data,
            "vision": None if prompt.visual is None else "timed",
            "visual_tokens": None if prompt.visual is None else int(prompt.visual.sum()),
            "dense_modules": self._dense_modules(),
            "unavailable": unavailable,
            "contenders": rows,
        }

    def _dense_modules(self) -> dict[str, int]:
        """{reason: number of modules} that ran dense although bsfa was asked for."""
        from collections import Counter

        from bsfa_kernels.integrations.transformers import notes

        return dict(Counter(note.reason for note in notes(self.model) if not note.expected))

    def _prompt(self, data: str, length: int, seed: int) -> Prompt:
        # Generated text is another one than calibration with the same seed saw.
        texts = load_prompts(data, self.loaded, samples=1, length=length, seed=seed + OTHER_TEXTS)
        if falls_short(texts[0], length):
            raise InputError(f"{data}: its longest prompt has {len(texts[0].tokens)} tokens, {length} were asked for")
        return Prompt.of(texts[0], self.model)

    def _dense(self, length: int) -> dict:
        named = CPU_SDPA if self.device.type == "cpu" else SDPA
        found = {name: backend for name, backend in named.items() if name != "math" or length <= MATH_LIMIT}
        return {"the backend PyTorch picks": None, **found}

    def _libraries(self) -> dict[str, Library | str]:
        """FlashAttention's newer versions, or why they are not there."""
        if self.device.type == "cpu":
            return {}
        return {name: flash_attention.find(name) for name in flash_attention.MODULES}

    def _use(self, implementation: str, handlers=None) -> None:
        from bsfa_kernels.integrations.transformers import attach

        if self._attached is not None:
            self._attached.detach()
            self._attached = None
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)
        if handlers is not None:
            self._attached = attach(self.model, handlers)

    def _skip(self, forward) -> float | None:
        """Share of all the model's candidate tiles dropped on the prompt of `forward`; None without a candidate."""
        for handler in self.counting.values():
            handler.reset()
        self._use("bsfa", self.counting)
        with Attending(self.model) as attending:
            _, reason = first_call(forward, self.device)
        kept, candidates = attending.read_counts(self.counting)
        return None if reason or not candidates else 1 - kept / candidates
