"""4-bit weights in plain torch: the specification of the packing and of the product, and the fallback.

    word j of a row = sum_i (q[8 j + i] + 8) << 4 i,   i = 0 .. 7         q in -8 .. 7, the first value lowest
    w[n, k] = q[n, k] * scale[n, k // group]

That is compressed-tensors' `pack-quantized`, symmetric. A group is a multiple of 8 columns and divides a row, so a row
of K weights is K / 8 words and K / group scales, and K and the group follow from the shapes. What it gives up is speed:
the weight is unpacked whole before each product.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

PER_WORD = 8


def pack_int4(values: Tensor) -> Tensor:
    """values [N, K] of whole numbers -8 .. 7 (any dtype) -> int32 [N, K / 8]; K a multiple of 8."""
    nibbles = (values.to(torch.int8) + 8).view(torch.uint8)
    pairs = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return _little_endian(pairs.contiguous()).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 [N, K / 8] -> int8 [N, K] of -8 .. 7."""
    pairs = _little_endian(packed.contiguous().view(torch.uint8))
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)
    return nibbles.to(torch.int8) - 8


def dequantize_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed int32 [N, K / 8] times scale [N, K / group] of its group, computed in FP32 -> [N, K] in `dtype`."""
    values = unpack_int4(packed).float()
    rows, groups = scale.shape
    return (values.view(rows, groups, -1) * scale.float()[..., None]).view(rows, -1).to(dtype)


def linear_int4(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K] times the 4-bit weight [N, K] transposed, plus bias [N]; returns [.., N] in x.dtype.

    packed: int32 [N, K / 8]. scale: bfloat16 or float32 [N, K / group].
    """
    return F.linear(x, dequantize_int4(packed, scale, x.dtype), None if bias is None else bias.to(x.dtype))


def _little_endian(pairs: Tensor) -> Tensor:
    """Bytes of words as a little-endian machine has them (the words of a big-endian one turned round)."""
    return pairs if sys.byteorder == "little" else pairs.view(len(pairs), -1, 4).flip(-1).flatten(1)
