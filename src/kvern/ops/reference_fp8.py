"""The product of two FP8 matrices, in plain torch: what tensor cores compute with a scale for each 128 of K.

    y[m, n] = sum over K-blocks k of  (sum over the 128 of k of a[m, i] b[n, i])  a_scale[m, k] b_scale[n, k]

On the CPU this is emulated: both operands are dequantised, then multiplied in FP32 in one product. The codes are the
same bytes as on a GPU, and a product of two codes is exact in FP32, so only the rounding of the FP32 sums differs
(3.5e-7 of the result at K = 4096; the tests compare with the loop over K-blocks in float64). Hopper's tensor cores keep
about 14 bits within a block of 128 and promote to FP32 after it: that loss is not emulated.
What it gives up: speed (a training step takes 4.4 times as long as in BF16, with the kernels of `native_fp8` 2.2 times)
and the memory of the dequantised operands.
Source: DeepSeek-V3 technical report, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvern.ops import reference
from kvern.ops.reference import BLOCK


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """a [M, K] times b [N, K] transposed, both E4M3 with their scales; returns [M, N] in `dtype`.

    A scale has, in each dimension, one entry for each row (or column), for each 128 of them, or one for all: a_scale
    [M, ceil(K/128)] for 1x128 tiles, b_scale [N, ceil(K/128)] or, for 128x128 blocks, [ceil(N/128), ceil(K/128)];
    [1, 1] for the whole.
    """
    return (dense(a, a_scale) @ dense(b, b_scale).T).to(dtype)


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [R, C] E4M3 times the scale of their tile, float32 (see `scaled_product`)."""
    return codes.float() * _spread(_spread(scale, 0, codes.shape[0]), 1, codes.shape[1])


def retile(codes: Tensor, scale: Tensor, power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """Codes [T, K] E4M3 in 1x128 tiles -> the same numbers in 128x1 tiles, with scales [ceil(T/128), K]."""
    return reference.quantize_tiles(dense(codes, scale), (BLOCK, 1), power_of_two, smallest_amax)


def _spread(scale: Tensor, dim: int, size: int) -> Tensor:
    """`scale` so that it broadcasts over `size` entries of `dim`."""
    if scale.shape[dim] in (1, size):
        return scale
    return scale.repeat_interleave(BLOCK, dim).narrow(dim, 0, size)
