"""A GGUF file with its weights moved off the grid that they were quantised to, to judge formats on.

    w' = w + u * step,   u uniform in [-1/2, 1/2),   step = the smallest difference between two weights of 16 neighbours

Published files hold weights that are quantised already (Q5_0, Q4_K). A format whose levels lie on the same grid would
reproduce them for nothing, and one whose levels do not would look worse than on a trained model. With the rounding
undone at random the weights fill their cells again, as the trained ones did; the model computes a little differently,
and is the reference itself. Everything but matrices is copied. The noise depends on the tensor's name only.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

NEIGHBOURS = 16
"""Weights in a row that certainly share a scale: every GGUF block is a multiple of this."""


def write_dithered(source: Path, out: Path, *, dither: bool = True) -> None:
    """Write `source` with BF16 matrices to `out`; without `dither` they are dequantised only."""
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture, use_temp_file=True)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
            continue
        stored = quantize(moved(values, tensor.name) if dither else values, GGMLQuantizationType.BF16)
        writer.add_tensor(tensor.name, stored, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def moved(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """values [rows, columns] float32 with noise of their own rounding error."""
    noise = np.random.default_rng(zlib.crc32(name.encode()))
    out = np.empty_like(values)
    for row in range(0, len(values), 1024):
        part = values[row : row + 1024]
        steps = step_sizes(part)
        out[row : row + 1024] = part + steps * (noise.random(part.shape, dtype=np.float32) - 0.5)
    return out


def step_sizes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For each weight of [rows, columns], the smallest difference among its 16 neighbours; 0 where they are equal."""
    groups = np.sort(values.reshape(-1, NEIGHBOURS), axis=-1)
    gaps = np.diff(groups, axis=-1)
    apart = gaps > 1e-4 * np.abs(groups).max(axis=-1, keepdims=True)
    smallest = np.where(apart, gaps, np.inf).min(axis=-1)
    steps = np.where(np.isfinite(smallest), smallest, 0.0).astype(np.float32)
    return np.repeat(steps, NEIGHBOURS).reshape(values.shape)
