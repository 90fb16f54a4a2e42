"""safetensors files written canonically and read with suspicion: one JSON metadata key, and tensors back to back.

A strict subset of safetensors, readable by any of its implementations. The same content always gives the same bytes;
a reader refuses repeated names, gaps and overlaps, unknown fields, and anything larger than it was told to expect.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping

import numpy
import torch

from .words import kind, short

MAX_HEADER_BYTES = 4 << 20
_DTYPES = {
    "F32": ("<f4", torch.float32),
    "F64": ("<f8", torch.float64),
    "I16": ("<i2", torch.int16),
    "I32": ("<i4", torch.int32),
    "I64": ("<i8", torch.int64),
}


ABSENT = object()  # a key that one of two objects lacks


class Malformed(ValueError):
    """The bytes are not what they should be; the message is one clear sentence."""


class Pickled(Malformed):
    """The file is a pickle, which is never loaded."""


def pack(key: str, metadata: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The file: `metadata` as JSON under `key`, then the tensors (a type in _DTYPES) in order of their names.

    Raises Malformed for metadata that JSON cannot hold or that `unpack` would refuse for its size.
    """
    names = {dtype: name for name, (_, dtype) in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {key: canonical_json(dict(metadata))}}
    content, offset = [], 0
    for path in sorted(tensors):
        name = names[tensors[path].dtype]
        raw = tensors[path].detach().cpu().contiguous().numpy().astype(_DTYPES[name][0]).tobytes()
        header[path] = {"dtype": name, "shape": list(tensors[path].shape), "data_offsets": [offset, offset + len(raw)]}
        content.append(raw)
        offset += len(raw)
    head = canonical_json(header).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > MAX_HEADER_BYTES:
        raise Malformed(f"the header would take {len(head):,} bytes, more than the {MAX_HEADER_BYTES:,} that are read")
    return b"".join([struct.pack("<Q", len(head)), head, *content])


def unpack(content: bytes, key: str, max_bytes: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, tensors) of a file made by `pack`. Raises Malformed for everything else."""
    if len(content) > max_bytes:
        raise Malformed(f"the file is larger than the {max_bytes:,} bytes allowed for it")
    if len(content) < 8:
        raise Malformed(f"the file is truncated: {len(content)} bytes cannot hold a safetensors header")
    size = struct.unpack("<Q", content[:8])[0]
    if content[:4] == b"PK\x03\x04" or (content[0] == 0x80 and content[1] < 6 and content[8:9] != b"{"):
        raise Pickled("the file is a pickle (torch.save), which can run code when it is loaded")
    if size > MAX_HEADER_BYTES:
        raise Malformed(f"not a safetensors file of ours: it claims a header of {size:,} bytes")
    if len(content) < 8 + size:
        raise Malformed(f"the file is truncated: it has {len(content):,} bytes, its header alone takes {8 + size:,}")
    header = _loads("the safetensors header", content[8 : 8 + size])
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {key} or not isinstance(metadata[key], str):
        raise Malformed(f"the safetensors metadata must hold the one key {key!r}")
    return _loads(f"the {key} metadata", metadata[key]), _tensors(header, content[8 + size :])


def canonical_json(value) -> str:
    """One spelling per value: sorted keys, no spaces, ASCII. Raises Malformed for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"this cannot be written as JSON: {error}") from error


def exact_keys(what: str, value, keys) -> None:
    """Raise Malformed unless `value` is a mapping with exactly these keys."""
    if not isinstance(value, Mapping):
        raise Malformed(f"{what} must be a JSON object, got {kind(value)}")
    missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing)
        parts += [f"has unknown {short(', '.join(unknown))}"] * bool(unknown)
        raise Malformed(f"{what} {' and '.join(parts)}")


def sequence(what: str, value, least: int, most: int) -> list:
    """`value`, a list of `least` to `most` entries. Raises Malformed otherwise."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        length = f"{least}" if least == most else f"{least} to {most}"
        raise Malformed(f"{what} must be a list of {length} entries, got {short(value)}")
    return value


def integer(what: str, value, low: int, high: int) -> int:
    """`value`, a whole number from `low` to `high`. Raises Malformed otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Malformed(f"{what} must hold whole numbers from {low} to {high}, got {short(value)}")
    return value


def difference(name: str, ours, theirs) -> str | None:
    """What sets two JSON values apart, as "a.b is 1 there and 2 here" (ours there), or None where they are equal.

    Names the first key, in order, of objects that differ in several.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            found = difference(f"{name}.{key}", ours.get(key, ABSENT), theirs.get(key, ABSENT))
            if found:
                return found
        return None
    if ours is not ABSENT and theirs is not ABSENT and canonical_json(ours) == canonical_json(theirs):
        return None
    return f"{short(name)} is {_brief(ours)} there and {_brief(theirs)} here"


def _brief(value) -> str:
    """As `short`, and of a sha256 its first digits."""
    if value is ABSENT:
        return "absent"
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else short(value)


def _tensors(header: dict, body: bytes) -> dict[str, torch.Tensor]:
    entries = []
    for path, entry in header.items():
        exact_keys(f"the header entry of {short(path)}", entry, ("dtype", "shape", "data_offsets"))
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise Malformed(f"{short(path)} must have dtype {', '.join(_DTYPES)}, got {short(entry['dtype'])}")
        shape = sequence(f"{short(path)} shape", entry["shape"], 0, 8)
        offsets = sequence(f"{short(path)} data_offsets", entry["data_offsets"], 2, 2)
        begin, end = (integer(f"{short(path)} data_offsets", n, 0, 1 << 48) for n in offsets)
        elements = spanned = 1
        for n in shape:
            elements *= integer(f"{short(path)} shape", n, 0, 1 << 31)
            spanned *= max(n, 1)  # what strides must reach, also where an axis of none leaves no element
        if spanned > 1 << 48:
            raise Malformed(f"{short(path)} has shape {shape}, which no tensor can have")
        if end - begin != elements * int(_DTYPES[entry["dtype"]][0][2]):
            raise Malformed(f"{short(path)} has shape {shape} of {entry['dtype']}, but {end - begin} bytes")
        entries.append((begin, end, path, shape, entry["dtype"]))
    tensors, end_of_last = {}, 0
    for begin, end, path, shape, dtype in sorted(entries):
        if begin != end_of_last:
            raise Malformed(f"{short(path)} starts at byte {begin}, but the tensor before it ends at {end_of_last}")
        if end > len(body):
            raise Malformed(f"the file is truncated: {short(path)} ends at byte {end:,} of {len(body):,}")
        kind = numpy.dtype(_DTYPES[dtype][0])
        values = numpy.frombuffer(body, kind, (end - begin) // kind.itemsize, begin).astype(kind.newbyteorder("="))
        tensors[path] = torch.from_numpy(values).view(shape)
        end_of_last = end
    if end_of_last != len(body):
        raise Malformed(f"{len(body) - end_of_last:,} bytes follow the last tensor")
    return tensors


def _loads(what: str, text: str | bytes) -> dict:
    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise Malformed(f"{what} has the key '{short(repeated)}' twice")
        return result

    def no_constant(name):
        raise Malformed(f"{what} holds {name}, which is not JSON")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Malformed(f"{what} must be a JSON object, got {kind(value)}")
    return value
