"""What FP8 training adds on a card: numbers to E4M3 codes with a scale for each tile, in one pass over memory.

    s = amax of the tile / 448, up to a power of two where wanted;   code = E4M3(x / s)

Codes and scales are the reference's bit for bit (but for the sign of NaN, and codes beside an infinity). Cards without
FP8 and Triton's interpreter round by bit arithmetic, others by an instruction. What the products of `fp8_hopper`
multiply next is laid out for them: codes in tiles of 128x1 lie with their columns dense, since Wgrad sums along those,
and rows of zeros fill the last tile; scales of 1x128 tiles lie by columns, too. `retile` goes from 1x128 to 128x1 tiles
without the numbers between. What it gives up: tiles of other sizes, which the reference makes; a block of 128x128 is
held by one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvern.ops import reference, reference_fp8
from kvern.ops.reference import BLOCK, E4M3_MAX
from kvern.ops.triton_linear import FLOATS, INTERPRETED, decode_e4m3

SHAPES = {(1, BLOCK): (64, BLOCK), (BLOCK, 1): (BLOCK, 64), (BLOCK, BLOCK): (BLOCK, BLOCK)}
"""Tile -> rows and columns of a program."""
CORNER = 64
"""Rows and columns that `transposed` turns at a time."""


@triton.jit
def encode_e4m3(x):
    """float32 -> uint8, rounded to the nearest, ties to even, and cut off at 448; NaN stays."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    cut = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((cut + 0x7FFFF + ((cut >> 20) & 1)) >> 20) - 960
    small = (tl.abs(x) * 512.0 + 8388608.0).to(tl.uint32, bitcast=True) & 0xF  # 2^-9 is the unit below 2^-6
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _divided(x, scale, POWER_OF_TWO: tl.constexpr, BY_HAND: tl.constexpr):
    """x / scale, rounded once: a reciprocal and a correction where that is exact, `div_rn` where fma is not one."""
    if BY_HAND:
        return tl.div_rn(x, scale)
    inverse = tl.div_rn(1.0, scale)
    y = x * inverse
    if not POWER_OF_TWO:
        left = tl.fma(-y, scale, x)
        y = tl.where(left == 0.0, y, tl.fma(left, inverse, y))  # a zero keeps its sign
    return y


@triton.jit
def _scale_of(x, AXIS: tl.constexpr, smallest, most, POWER_OF_TWO: tl.constexpr):
    """The scale of each tile of x [BM, BN]: along AXIS, or 2 for one."""
    if AXIS == 2:
        amax = tl.max(tl.max(tl.abs(x), 1), 0)
        is_nan = tl.max(tl.max((x != x).to(tl.int32), 1), 0)
    else:
        amax = tl.max(tl.abs(x), AXIS)
        is_nan = tl.max((x != x).to(tl.int32), AXIS)
    scale = tl.div_rn(tl.maximum(amax, smallest), most)
    if POWER_OF_TWO:
        bits = scale.to(tl.uint32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(is_nan > 0, float("nan"), scale)


@triton.jit
def _quantize_kernel(
    codes_ptr, scale_ptr, x_ptr, known_ptr, R, C, x_stride, known_row_stride, known_column_stride,
    code_row_stride, code_column_stride, scale_row_stride, scale_column_stride, smallest, most,
    AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    BY_HAND: tl.constexpr, HAS_FP8: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    exists = (rows < R)[:, None] & (columns < C)[None, :]
    x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
    if known_ptr is None:
        x = tl.load(x_at, mask=exists, other=0.0).to(tl.float32)
    else:
        at = rows[:, None] * known_row_stride + (columns // SCALE_BLOCK)[None, :] * known_column_stride
        x = decode_e4m3(tl.load(x_at, mask=exists, other=0)) * tl.load(known_ptr + at, mask=exists, other=0.0)
    scale = _scale_of(x, AXIS, smallest, most, POWER_OF_TWO)
    if AXIS == 0:
        by = tl.broadcast_to(scale[None, :], BM, BN)
        at = tl.program_id(0) * scale_row_stride + columns * scale_column_stride
        tl.store(scale_ptr + at, scale, mask=columns < C)
    elif AXIS == 1:
        by = tl.broadcast_to(scale[:, None], BM, BN)
        tl.store(scale_ptr + rows * scale_row_stride + tl.program_id(1) * scale_column_stride, scale, mask=rows < R)
    else:
        by = tl.zeros((BM, BN), dtype=tl.float32) + scale
        tl.store(scale_ptr + tl.program_id(0) * scale_row_stride + tl.program_id(1) * scale_column_stride, scale)
    y = _divided(x, by, POWER_OF_TWO, BY_HAND)
    if HAS_FP8:
        codes = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = encode_e4m3(y)
    at = rows[:, None] * code_row_stride + columns[None, :] * code_column_stride
    if AXIS == 0:  # the tile's last rows, too: zeros
        tl.store(codes_ptr + at, codes, mask=(columns < C)[None, :])
    else:
        tl.store(codes_ptr + at, codes, mask=exists)


@triton.jit
def _transpose_kernel(out_ptr, x_ptr, R, C, x_stride, SIDE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    columns = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    exists = (rows < R)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=exists, other=0)
    tl.store(out_ptr + columns[:, None] * R + rows[None, :], tl.trans(x), mask=tl.trans(exists))


def quantize_tiles(x: Tensor, tile: tuple[int, int], power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """`reference.quantize_tiles`: x [R, C] -> (codes [R, C] E4M3, scale [ceil(R/r), ceil(C/c)] float32).

    For tiles of 128x1 the codes are [128 ceil(R/128), C]: zeros fill the last tile.
    """
    if not (tile in SHAPES and x.dtype in FLOATS and x.numel()):
        return reference.quantize_tiles(x, tile, power_of_two, smallest_amax)
    return _quantized(x if _has_dense_rows(x) else x.contiguous(), None, tile, power_of_two, smallest_amax)


def retile(codes: Tensor, scale: Tensor, power_of_two: bool, smallest_amax: float) -> tuple[Tensor, Tensor]:
    """Codes [T, K] E4M3 in 1x128 tiles -> the same numbers in 128x1 tiles, as `quantize_tiles` gives them."""
    if not codes.numel():
        return reference_fp8.retile(codes, scale, power_of_two, smallest_amax)
    dense = codes if _has_dense_rows(codes) else codes.contiguous()
    return _quantized(dense.view(torch.uint8), scale, (BLOCK, 1), power_of_two, smallest_amax)


def transposed(codes: Tensor) -> Tensor:
    """codes [R, C], one byte each, rows dense -> [C, R], rows dense: a copy."""
    rows, columns = codes.shape
    out = torch.empty(columns, rows, dtype=torch.uint8, device=codes.device)
    grid = triton.cdiv(rows, CORNER), triton.cdiv(columns, CORNER)
    with torch.cuda.device_of(codes):
        _transpose_kernel[grid](out, codes.view(torch.uint8), rows, columns, codes.stride(0), SIDE=CORNER)
    return out.view(codes.dtype)


def _quantized(
    x: Tensor, known: Tensor | None, tile: tuple[int, int], power_of_two: bool, smallest: float
) -> tuple[Tensor, Tensor]:
    """known: the scales of 1x128 tiles that x, then E4M3 as bytes, has already."""
    (rows, columns), (height, width) = x.shape, SHAPES[tile]
    shape = -(-rows // tile[0]), -(-columns // tile[1])
    if tile == (BLOCK, 1):
        codes = x.new_empty((columns, shape[0] * BLOCK), dtype=torch.uint8).T
    else:
        codes = x.new_empty((rows, columns), dtype=torch.uint8)
    if tile == (1, BLOCK):
        scale = x.new_empty(shape[::-1], dtype=torch.float32).T
    else:
        scale = x.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _quantize_kernel[triton.cdiv(rows, height), triton.cdiv(columns, width)](
            codes, scale, x, known, rows, columns, x.stride(0), *((0, 0) if known is None else known.stride()),
            *codes.stride(), *scale.stride(), smallest, E4M3_MAX, {(1, BLOCK): 1, (BLOCK, 1): 0}.get(tile, 2),
            power_of_two, BM=height, BN=width, SCALE_BLOCK=BLOCK, BY_HAND=INTERPRETED, HAS_FP8=_has_fp8(x),
            num_warps=8,
        )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scale


def _has_fp8(x: Tensor) -> bool:
    """Whether the card rounds to E4M3 itself."""
    return not INTERPRETED and torch.cuda.get_device_capability(x.device) >= (8, 9)


def _has_dense_rows(x: Tensor) -> bool:
    """Rows may be apart, and none lies in another."""
    return x.stride(1) == 1 and (len(x) == 1 or x.stride(0) >= x.shape[1])
