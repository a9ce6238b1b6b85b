"""A weight as numbers, whatever form the checkpoint stores it in: FP8 with block scales, 4-bit groups, or floats."""

from __future__ import annotations

import torch

from kvern.checkpoint.int4 import INT4_WEIGHT, dequantize_int4
from kvern.checkpoint.quantize import FP8, INT4_SCALE_SUFFIX, dequantize, fp8_scale_name
from kvern.checkpoint.reader import SafetensorsFolder


def read_floats(reader: SafetensorsFolder, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers of the tensor stored as `name`: in `dtype` where it is quantised, otherwise as it is, a view."""
    stored = reader.tensor(name)
    if stored.dtype is FP8:
        return dequantize(stored, reader.tensor(fp8_scale_name(reader, name)), dtype)
    if name.endswith("." + INT4_WEIGHT):
        return dequantize_int4(stored, reader.tensor(name.removesuffix("_packed") + INT4_SCALE_SUFFIX), dtype)
    return stored
