"""FP8 E4M3 weights with one FP32 scale for each 128x128 block: the official `weight` and `weight_scale_inv`.

Quantise: s = amax(block) / 448, q = e4m3(w / s); with `ue8m0`, s = 2^ceil(log2 s). Dequantise: w = q * s. Blocks at the
right and lower edge are ragged: 576 rows are four blocks of 128 and one of 64. In FP32, dequantising and quantising
again gives the same bytes (with ue8m0 the same values: a block whose maximum rounds down to 224 halves its scale). The
lower bound on amax, 1e-30, only keeps blocks of zeros finite: imported models hold rows scaled by 2^-24, which the
training kernels' 1e-4 would flush. What it gives up: 2.6 % of a normal weight matrix's RMS.
Source: DeepSeek-V3 technical report section 3.3, inference/kernel.py, and the released checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch

from kvern import ops
from kvern.errors import CheckpointError

FP8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"
INT4_SCALE_SUFFIX = "_scale"
"""The suffix of the same scales beside 4-bit weights: the name that compressed-tensors gives them."""

BLOCK = 128
SMALLEST_AMAX = 1e-30
PART_ELEMENTS = 1 << 24


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a weight [rows, columns]: [ceil(rows / 128), ceil(columns / 128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def fp8_scale_name(names: Container[str], weight: str) -> str:
    """What the scales of the FP8 tensor `weight` are called among `names`; the official name where there are none."""
    other = weight + INT4_SCALE_SUFFIX
    return other if other in names else weight + SCALE_SUFFIX


def quantize(weight: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 weight [rows, columns] and its scales, from floats. CheckpointError where a weight is not finite."""
    _check_matrix(weight)
    step = _rows_at_a_time(weight)
    parts = [_quantize_rows(weight[row : row + step], ue8m0) for row in range(0, weight.shape[0], step)]
    return torch.cat([quantized for quantized, _ in parts]), torch.cat([scale for _, scale in parts])


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [rows, columns] in `dtype` from FP8 and scales."""
    _check_matrix(weight)
    if weight.dtype is not FP8 or scale.dtype is not torch.float32:
        raise CheckpointError(f"expected {FP8} with float32 scales, got {weight.dtype} with {scale.dtype}")
    expected = scale_shape(tuple(weight.shape))
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"scales of a weight {list(weight.shape)} have the shape {list(expected)}, not {list(scale.shape)}"
        )
    out = torch.empty(weight.shape, dtype=dtype)
    step = _rows_at_a_time(weight)
    for row in range(0, weight.shape[0], step):
        rows, blocks = slice(row, row + step), slice(row // BLOCK, (row + step) // BLOCK)
        out[rows] = ops.dequantize(weight[rows], scale[blocks], dtype)
    return out


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight, to be made in float32 and multiplied by `factor`, a power of two."""

    make: Callable[[], torch.Tensor]
    factor: float = 1.0

    def scaled(self) -> torch.Tensor:
        """The rows as they count."""
        return self.make() if self.factor == 1.0 else self.make() * self.factor


class QuantizedWeight:
    """An FP8 weight and its scales, which are written one after the other: both are computed once, when asked for.

    The scales carry the factor of their rows, so that a factor of 2^-24 never meets the bound on amax. Every piece but
    the last must be a multiple of 128 rows, or pieces would share blocks.
    """

    def __init__(self, name: str, pieces: Sequence[Rows], *, ue8m0: bool = False) -> None:
        self.name, self.pieces, self.ue8m0 = name, pieces, ue8m0
        self._scale: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The weight in E4M3. Raises CheckpointError, naming it, where a number is not finite."""
        try:
            made = [quantize(piece.make(), ue8m0=self.ue8m0) for piece in self.pieces]
        except CheckpointError as error:
            raise CheckpointError(error.message, tensor=self.name) from error
        self._scale = torch.cat([scale * piece.factor for piece, (_, scale) in zip(self.pieces, made, strict=True)])
        return torch.cat([weight for weight, _ in made])

    def scale(self) -> torch.Tensor:
        """The scales in float32."""
        if self._scale is None:
            self.weight()
        assert self._scale is not None
        return self._scale


def _quantize_rows(rows: torch.Tensor, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.isfinite(rows).all():
        raise CheckpointError("weight holds NaN or infinity, which FP8 cannot store")
    return ops.quantize_blocks(rows.float(), power_of_two=ue8m0, smallest_amax=SMALLEST_AMAX)


def _rows_at_a_time(weight: torch.Tensor) -> int:
    """Whole blocks of rows, few enough that the float32 copies of a step stay under PART_ELEMENTS numbers."""
    return max(1, PART_ELEMENTS // (max(1, weight.shape[1]) * BLOCK)) * BLOCK


def _check_matrix(weight: torch.Tensor) -> None:
    if weight.dim() != 2:
        raise CheckpointError(f"only matrices are quantised in blocks, not the shape {list(weight.shape)}")
