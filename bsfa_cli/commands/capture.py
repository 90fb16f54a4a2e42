"""bsfa capture: keep a model's queries, keys and values, to compare methods on them without the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import InputError, UsageError
from ..imports import importing
from ..options import Config, Data, Device, Dtype, Frames, ImageRoot, Json, RepeatData, joined, parse_layers

DEFAULT_LENGTH = {"cpu": 2048, "cuda": 32768}


def capture(
    model: Annotated[
        str | None, Argument(help="Checkpoint directory or Hub id; the bundled retrieval model when left out.")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="FILE", help="The safetensors file.")] = None,
    data: Data = None,
    image_root: ImageRoot = None,
    frames: Frames = None,
    repeat_data: RepeatData = False,
    length: Annotated[
        int | None, Option(min=1, help="Tokens of the prompt; 32768 on a GPU and 2048 on a CPU by default.")
    ] = None,
    layers: Annotated[str | None, Option(help="Only these layers, e.g. 0-3,8; all by default.")] = None,
    seed: Annotated[int, Option(min=0, help="Seed of generated text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    config: Config = None,
) -> None:
    """Keep a model's Q, K and V, for `bsfa compare --captured`.

    Those of chosen layers for one prompt, as they go into attention (after RoPE).
    """
    if output is None:
        raise UsageError("where should the tensors go? give -o captured.safetensors")
    if layers is not None:
        parse_layers(layers)
    given = joined(data, image_root, frames, repeat_data)

    # First what can be refused without the model: to import transformers takes seconds.
    with importing():
        from ..data.prompts import check_source, default_data, load_prompts
        from ..data.texts import falls_short, remarks
        from ..files import CAPTURE, check_writable, write_whole

    check_source(given, length or min(DEFAULT_LENGTH.values()), 1)
    check_writable(output, CAPTURE)

    with importing():
        from ..calibration.run import chosen_modules
        from ..comparison import tensors
        from ..comparison.capture import capture as run
        from ..comparison.capture import why_dense
        from ..console import note, print_json
        from ..environment import resolve_device
        from ..models.load import check_positions, explain_memory, load_model

    place = resolve_device(device)
    length = length or DEFAULT_LENGTH[place.type]
    positions = partial(check_positions, length=length, flag="--length")
    loaded = load_model(model, device=place, dtype=dtype, check_config=positions)
    if loaded.label:
        note(f"{loaded.identity['id']}: {loaded.label}")
    modules, _ = chosen_modules(loaded.model, layers, plain=True)
    spec = given or default_data(loaded)
    for remark in remarks(given, spec, 1):
        note(remark)
    (text,) = load_prompts(spec, loaded, samples=1, length=length, seed=seed)
    if falls_short(text, length):
        raise InputError(f"{spec}: its longest prompt has {len(text.tokens)} tokens, {length} were asked for")
    with explain_memory("--length or --layers"):
        found = run(loaded, modules, text)
        if not found:
            raise InputError(f"none of the chosen layers can be captured: {why_dense(loaded.model)}")
        facts = {"model": loaded.identity["id"], "label": loaded.label, "data": spec, "seed": seed}
        content = tensors.pack(found, facts)
    write_whole(output, content)
    note(f"written: {output} ({len(content):,} bytes, {len(found)} layers of {len(text.tokens):,} tokens)")
    note(f"next: bsfa compare --captured {output}")
    if json:
        size = {"bytes": len(content), "length": len(text.tokens), "layers": list(found)}
        print_json({"file": str(output), **size, **facts})
