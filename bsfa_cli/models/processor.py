"""What turns images and chats into a model's inputs: a checkpoint's processor, also where torchvision is missing.

transformers builds the processors of several models only with a video processor, which needs torchvision. Images need
none of it, so where it is missing a processor is put together that takes images and no videos.
"""

from __future__ import annotations

from typing import Any


def read_processor(place: str, config) -> Any:
    """The processor of a checkpoint, or the exception that transformers raised where it has none."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(place)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        return _of_images(place, config)


def _of_images(place: str, config) -> Any:
    """The same processor, of images alone."""
    import transformers
    from transformers import AutoTokenizer

    # Not transformers.AutoImageProcessor, which without torchvision only says that it is missing.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])
    options, _ = kind.get_processor_dict(place)
    return images_only(
        kind,
        image_processor=AutoImageProcessor.from_pretrained(place, backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(place),
        **{name: options[name] for name in ("chat_template",) if options.get(name)},
    )


def images_only(kind: type, **parts) -> Any:
    """A processor of class `kind` without a video processor; `parts` are its other parts and its options."""

    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, name, argument):
            if name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(name, argument)

    ImagesOnly.__name__ = kind.__name__
    videos = {"video_processor": None} if "video_processor" in kind.get_attributes() else {}
    return ImagesOnly(**parts, **videos)
