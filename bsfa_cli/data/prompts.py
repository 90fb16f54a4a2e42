"""Samples for any model: texts for every one, images and text for vision-language models. What commands call.

    samples = load_prompts(spec, loaded, samples=8, length=32768)     # texts.Sample, with `extra` where there are
    images

`spec` is what --data takes: what texts.py reads, images.ImageData, or "builtin:shapes" (shapes.py).
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from ..errors import InputError, UsageError
from . import frame_tasks, shapes, texts
from .amount import check_amount
from .images import ImageData
from .texts import BUILTIN, Sample

SHAPES = f"{BUILTIN}{shapes.KIND}"


def has_images(spec: str) -> bool:
    """Whether `spec` names images to be packed. Raises UsageError where it names texts as well."""
    if isinstance(spec, ImageData):
        return True
    sources = texts.sources(spec)
    if SHAPES in sources and len(sources) > 1:
        raise UsageError(f"--data names images ({SHAPES}) and texts; give one or the other")
    return SHAPES in sources


def default_data(loaded) -> str:
    """What is read where no data is named: generated images for a vision-language model, else as texts.py says."""
    if loaded.processor is not None and not frame_tasks.is_bundled(loaded.tokenizer):
        return SHAPES
    return texts.default_data(loaded.tokenizer)


def check_source(spec: str | None, length: int, samples: int) -> None:
    """Raise, as `load_prompts`, for what can be refused without a model; None is the default, which is made here."""
    _check_amount(spec, length, samples)
    if spec is None or isinstance(spec, ImageData) or not has_images(spec):
        texts.check_source(spec, length)
        return
    from .multimodal import images

    images.check_pillow()


def load_prompts(spec: str, loaded, *, samples: int, length: int, seed: int = 0, shortest: int = 1) -> list[Sample]:
    """Up to `samples` samples of at most `length` tokens for the model in `loaded` (models.load.LoadedModel); images
    are whole, so that a sample may end up to an image short of it.

    Raises UsageError for more than is made, InputError and UsageError as `load_texts`, and InputError for images where
    the checkpoint has no processor.
    """
    _check_amount(spec, length, samples)
    if not has_images(spec):
        return texts.load_texts(
            spec, samples=samples, length=length, tokenizer=loaded.tokenizer, seed=seed, shortest=shortest
        )
    if loaded.processor is None:
        raise InputError(f"{spec} names images, and {loaded.no_processor or 'this model reads text only'}")
    if isinstance(spec, ImageData):
        packed = spec.annotations.packed(loaded.processor, samples=samples, length=length, seed=seed)
    else:
        packed = _stories(loaded.processor, samples, length, seed)
    # A processor may give more than its model takes.
    taken = inspect.signature(loaded.model.forward).parameters
    found = [replace(pack, extra={name: x for name, x in pack.extra.items() if name in taken}) for pack in packed]
    return [pack for pack in found if len(pack.tokens) >= shortest] or _refuse(spec, found, shortest)


def _check_amount(spec: str | None, length: int, samples: int) -> None:
    """Raise UsageError for more data than is made, or read again. Files hold what they hold."""
    if spec is None or (spec.repeat if isinstance(spec, ImageData) else texts.makes(spec)):
        check_amount(samples, length, "--samples")


def _stories(processor, samples: int, length: int, seed: int) -> list[Sample]:
    """Generated picture stories, each `length` tokens long or up to an image shorter."""
    from .multimodal.pack import pack

    found = []
    for i in range(samples):
        packed = pack(processor, shapes.story(seed * 100_003 + i), length)
        if not packed.images:
            raise InputError(f"--length {length:,} has no room for an image of this model; raise it")
        found.append(replace(packed, id=f"{shapes.KIND}-{i}", source=f"{SHAPES} seed {seed} sample {i}"))
    return found


def _refuse(spec: str, found: list[Sample], shortest: int) -> list[Sample]:
    longest = max(len(sample.tokens) for sample in found)
    raise InputError(
        f"{spec}: every sample is too short: the longest has {longest} tokens, and at least {shortest} are needed (two "
        "tiles)"
    )
