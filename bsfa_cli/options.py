"""Options that several commands share, as Annotated aliases for their signatures."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from . import configuration
from .data.images import ImageData
from .errors import InputError, UsageError
from .streams import is_closed

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N")
    return value


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(DTYPES)}")
    return value


def _data(ctx: typer.Context, values: list[str] | None) -> list[str] | None:
    source = ctx.get_parameter_source("data")
    if values and source is not None and source.name == "ENVIRONMENT":
        # It was split at its blanks, and names of files may hold some.
        return [os.environ[f"{ctx.auto_envvar_prefix}_DATA"]]
    return values


def _json(value: bool) -> bool:
    if value and is_closed("stdout"):
        raise typer.BadParameter("it prints on stdout, which is closed")
    return value


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        help="Read option values from this file; the environment and flags override it.",
        callback=configuration.load,
        is_eager=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.", callback=_json)]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="TEXTS",
        help="Texts: .txt or .jsonl files (text, input_text, input, messages or prompt), folders of them, patterns "
        "like 'data/*.txt', or generated ones, builtin:NAME or tasks:NAME,NAME; several by repeating it or by commas. "
        "Without it tasks:all for the bundled model, generated pictures (builtin:shapes) for a vision-language model, "
        "generated text (builtin:mixed) for others, a bad stand-in: thresholds fitted to it, absolute ones and top-k "
        "above all, cost accuracy on real text.",
        callback=_data,
    ),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the images lie that --data names: annotation files (.json, .jsonl, .csv) of LAVIS, MMLongBench, "
        "LongVideoBench or Video-MME, packed until the length is reached; for a vision-language model.",
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(
        min=1, help="With --image-root: frames shown of a video, spread evenly over its folder; 32 by default."
    ),
]
RepeatData = Annotated[
    bool,
    typer.Option(
        "--repeat-data",
        help="With --image-root: where the samples are too few for the length, repeat them, and say so.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto takes a GPU when there is one.", callback=_device),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help=f"{', '.join(DTYPES)}; auto is the checkpoint's on a GPU and float32 on a CPU.",
        callback=_dtype,
    ),
]


def joined(
    data: list[str] | None, image_root: Path | None = None, frames: int | None = None, repeat: bool = False
) -> str | None:
    """The values of --data as one specification (see `data.texts.sources`), an ImageData where they have images; None
    where there are none.

    Raises UsageError for options of images without images, InputError where the root is no folder.
    """
    spec = ",".join(data) if data else None
    if image_root is None:
        if frames is not None or repeat:
            raise UsageError(f"{'--frames' if frames is not None else '--repeat-data'} belongs to --image-root")
        return spec
    if spec is None:
        raise UsageError("--image-root says where the images lie that --data names: give --data FILE too")
    if not image_root.is_dir():
        raise InputError(f"image root {image_root} is no folder")
    return ImageData.of(spec, image_root, frames, repeat)


def numbers(text: str, kind: type[int] | type[float], rule: str) -> tuple:
    """The numbers of "8192,32_768", in their order. Raises UsageError that begins with `rule` ("--x takes numbers")."""
    try:
        return tuple(kind(part) for part in text.replace("_", "").split(","))
    except ValueError:
        raise UsageError(f"{rule} separated by commas, got {text!r}") from None


def parse_layers(text: str, option: str = "--layers") -> set[int]:
    """Layer indices of "0-3,8". Raises UsageError."""
    result: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise UsageError(f"{option} must be like 0-3,8; got {text!r}") from None
        if not 0 <= low <= high < 1 << 20:
            raise UsageError(f"{option} must be like 0-3,8; got {text!r}")
        result |= set(range(low, high + 1))
    return result
