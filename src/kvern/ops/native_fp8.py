"""What FP8 training adds on the CPU (csrc/train.h): tiles to codes and scales, and the product of two such matrices.

Codes and scales are the reference's bit for bit, in two passes over a strip that stays in the cache instead of torch's
eight over memory. The product is the reference's, too: both operands as float32, then torch's product; only the
dequantising is one pass. What it leaves to the reference: tiles of more than `WIDEST` columns (one scale for a whole
wide tensor), other dtypes and devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvern.ops import native_training as native
from kvern.ops import reference, reference_fp8
from kvern.ops.reference import BLOCK

WIDEST = 512
"""Columns of a tile, and SMALLEST of its largest magnitude: the kernel's limits."""
SMALLEST = 1e-30


def backends(op: str) -> dict[str, Callable[..., Any]]:
    """Device type -> implementation of `op`; empty where there is no library."""
    known: dict[str, Callable[..., Any]] = {
        "quantize_tiles": quantize_tiles,
        "retile": retile,
        "scaled_product": scaled_product,
    }
    return {"cpu": known[op]} if native.kernels() is not None else {}


def quantize_tiles(x: Tensor, tile: tuple[int, int], power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_tiles`, bit for bit but for the sign of NaN."""
    if not (native.takes(x) and x.numel() and tile[1] <= WIDEST and smallest_amax >= SMALLEST):
        return reference.quantize_tiles(x, tile, power_of_two, smallest_amax)
    return native.quantize_tiles(_with_rows_apart(x), tile, power_of_two, smallest_amax)


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`reference_fp8.scaled_product`, bit for bit."""
    return (dense(a, a_scale) @ dense(b, b_scale).T).to(dtype)


def retile(codes: Tensor, scale: Tensor, power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """`reference_fp8.retile`, bit for bit."""
    return quantize_tiles(dense(codes, scale), (BLOCK, 1), power_of_two, smallest_amax)


def dense(codes: Tensor, scale: Tensor) -> Tensor:
    """`reference_fp8.dense`, bit for bit; the transposed of what is stored by rows is stored so, too."""
    if codes.stride(0) == 1 and codes.stride(1) > 1:
        return dense(codes.T, scale.T).T
    if not codes.numel() or codes.stride(1) != 1:
        return reference_fp8.dense(codes, scale)
    tile_rows, tile_columns = (_tile(size, scales) for size, scales in zip(codes.shape, scale.shape, strict=True))
    if tile_columns > WIDEST:
        scale, tile_columns = scale.expand(-1, -(-codes.shape[1] // BLOCK)), BLOCK
    return native.dequantize_tiles(_with_rows_apart(codes), scale.contiguous(), (tile_rows, tile_columns))


def _tile(size: int, scales: int) -> int:
    """How many of `size` numbers share one of so many scales."""
    return 1 if scales == size else size if scales == 1 else BLOCK


def _with_rows_apart(x: Tensor) -> Tensor:
    """x, or a copy where its rows lie in each other (an expanded tensor)."""
    return x if len(x) == 1 or x.stride(0) >= x.shape[1] else x.contiguous()
