"""Annotation files and the images that they name: samples one at a time, and packs of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ...console import note
from ...errors import InputError, UsageError
from .. import texts
from ..samples import MultimodalSample
from . import families, images, records
from .families import Family
from .media import Media
from .pack import TooShort, pack
from .packed import Packed
from .records import Record, shown


@dataclass(frozen=True)
class Annotations:
    """The files that `spec` names (`--data`), and `media`, where their images lie.

    `repeat` draws every pack from all samples, and lets it begin again with its first one where they are too few.
    """

    spec: str
    media: Media
    repeat: bool = False

    def samples(self, seed: int = 0, number: int = 0) -> Iterator[MultimodalSample]:
        """All samples in a seeded order, of which there are many for a seed, files in turns; images are not opened.

        Raises InputError for a file, a record or an image's path that cannot be used, naming it.
        """
        named = self._files()
        turns = {file: self._of_file(file, f"bsfa {seed} {number}", len(named) > 1) for file in named}
        while turns:
            for file in list(turns):
                sample = next(turns[file], None)
                if sample is None:
                    del turns[file]
                else:
                    yield sample

    def packed(self, processor, *, samples: int, length: int, seed: int = 0) -> list[Packed]:
        """Up to `samples` packs of `length` tokens, of different samples each unless they repeat; fewer where the files
        hold no more.

        Raises InputError as `samples` and `pack` do.
        """
        drawn, found = self.samples(seed), []
        for index in range(samples):
            if self.repeat:
                drawn = self.samples(seed, index)
            try:
                packed = pack(processor, drawn, length, repeat=self.repeat)
            except TooShort:
                if found:
                    break
                raise
            if packed is None:
                break
            found.append(packed)
            note(f"{packed.id}: {packed.source}, in {len(packed.tokens):,} tokens")
        if not found:
            raise InputError(f"{self.spec} holds no sample")
        return found

    def check(self) -> None:
        """Raise InputError or UsageError for what can be refused without a model: every file's keys, its first sample
        and the first image of that.
        """
        images.check_pillow()
        for file in self._files():
            found, family = self._records(Path(file))
            for path in islice(families.sample_of(family, found[0], self.media).images(), 1):
                try:
                    images.read(path)
                except InputError as error:
                    raise found[0].refuse(str(error)) from None

    def _files(self) -> list[str]:
        named = texts.sources(self.spec, records.SUFFIXES)
        for source in named:
            if texts.is_generated(source):
                raise UsageError(f"--image-root belongs to annotation files, and {source} is generated text")
        return named

    def _records(self, path: Path) -> tuple[list[Record], Family]:
        found = list(records.read(path))
        if not found:
            raise InputError(f"{path} holds no record")
        family = families.family_of(found[0])
        if family.identity is not None:
            seen: dict[str, str] = {}
            for record in found:
                name = record.name(family.identity) if family.identity in record.fields else None
                if name in seen:
                    raise record.refuse(f"{family.identity!r} {shown(name)} was that of {seen[name]} already")
                if name is not None:
                    seen[name] = record.place
        return found, family

    def _of_file(self, file: str, seed: str, several: bool) -> Iterator[MultimodalSample]:
        found, family = self._records(Path(file))
        order = list(range(len(found)))
        random.Random(seed).shuffle(order)
        for index in order:
            sample = families.sample_of(family, found[index], self.media)
            name = sample.id if family.identity else f"{sample.id}#{index + 1}"
            # Results name files without the folders that they lie in here.
            source = Path(file).name + found[index].place.removeprefix(str(Path(file)))
            facts = sample.metadata | {"source": source}
            yield replace(sample, id=f"{Path(file).name}:{name}" if several else name, metadata=facts)
