"""The header of a safetensors file: parsed strictly, and built.

A file is an 8-byte little-endian length n, n bytes of JSON (name -> dtype, shape, data_offsets) and the data. Accepted
is what the format promises and nothing looser: every offset in order and in range, no gap, no overlap, no byte left
over, `end - start = product(shape) * itemsize`, known dtypes, no name twice. It gives up 4-bit and complex dtypes.
Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from kvern.errors import CheckpointError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Where a tensor lies: bytes `start` to `end` of `file`, counted from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


class _Pairs(list[Any]):
    """A JSON object as its (key, value) pairs, so that no key hides another."""


class _Refused(ValueError):
    """A header that breaks the format; `tensor` is the entry at fault, where there is one."""

    def __init__(self, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.tensor = tensor


def read_header(path: Path) -> list[TensorSpec]:
    """The tensors of a safetensors file in the order of their data. CheckpointError names the file and the tensor."""
    try:
        with path.open("rb") as stream:
            return _parse(path, stream)
    except _Refused as refused:
        raise CheckpointError(refused.message, file=path, tensor=refused.tensor) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", file=path) from error


def build_header(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Header bytes and, for each tensor as given, the offset of its data in the file.

    Data is laid out by falling item size, so that every tensor is aligned whatever the byte count of its neighbours.
    """
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i][1].itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = [0] * len(tensors), 0
    for i in order:
        name, dtype, shape = tensors[i]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        offsets[i] = start
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + offset for offset in offsets]


def _parse(path: Path, stream: BinaryIO) -> list[TensorSpec]:
    size = stream.seek(0, 2)
    stream.seek(0)
    prefix = stream.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise _Refused(f"not a safetensors file: {size} bytes are too few for a header")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise _Refused(f"header of {length} bytes does not fit (the file has {size} bytes)")
    data_start = LENGTH_BYTES + length
    specs = [
        _spec(path, name, entry, data_start) for name, entry in _entries(stream.read(length)) if name != "__metadata__"
    ]
    specs.sort(key=lambda spec: (spec.start, spec.end))
    _check_layout(specs, data_start, size)
    return specs


def _entries(text: bytes) -> _Pairs:
    try:
        pairs = json.loads(text.decode(), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise _Refused(f"header is not JSON: {error}") from None
    if not isinstance(pairs, _Pairs):
        raise _Refused("header is not a JSON object")
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise _Refused("tensor is listed twice", name)
        seen.add(name)
    return pairs


def _spec(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    if not isinstance(entry, _Pairs):
        raise _Refused("entry is not a JSON object", name)
    fields = dict(entry)
    if len(fields) != len(entry) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"entry has the fields {[key for key, _ in entry]}, not dtype, shape, data_offsets", name)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"unknown dtype {dtype!r}", name)
    if not _are_counts(shape):
        raise _Refused(f"shape {shape!r} is not a list of counts", name)
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _Refused(f"data_offsets {offsets!r} are not two counts", name)
    start, end = offsets
    if math.prod(max(1, size) for size in shape) * _ITEM_BYTES[dtype] >= 2**63:
        raise _Refused(f"shape {shape} is beyond any memory", name)
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - start != expected:
        raise _Refused(f"{dtype} {shape} takes {expected} bytes, data_offsets hold {end - start}", name)
    return TensorSpec(name, DTYPES[dtype], tuple(shape), path, data_start + start, data_start + end)


def _are_counts(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and value >= 0 for value in values)


def _check_layout(specs: Sequence[TensorSpec], data_start: int, size: int) -> None:
    position = data_start
    for spec in specs:
        if spec.start != position:
            what = "overlaps the tensor before it" if spec.start < position else "leaves a gap before it"
            raise _Refused(f"data {what} (starts at byte {spec.start}, expected {position})", spec.name)
        position = spec.end
        if position > size:
            raise _Refused(f"file is truncated: {size} bytes, the data ends at byte {position}", spec.name)
    if position != size:
        raise _Refused(f"file has {size - position} bytes after the last tensor")
