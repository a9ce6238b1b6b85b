"""4-bit weights with one BF16 scale for each group of columns: compressed-tensors' `pack-quantized`, symmetric.

    q = clamp(round(w / s), -8, 7),   w ~ q * s           (packing: `ops.reference_int4`)

The scale of a group is searched: s = f * amax / 7 for the factors f of `FACTORS`, either sign, because -8 reaches one
step further than 7. The one with the least squared error is then moved to the least-squares scale of its own q,
sum(w q) / sum(q q), and kept where that is better still. All candidates are rounded to BF16 before they are judged, so
the error counted is the stored one, and never more than plain amax / 7 gives. The factor 7 makes matrices of 0 and 1
exact. What it gives up: no calibration data, every weight counts the same; 8 to 10 % of a weight matrix's RMS in groups
of 32 (amax / 7: 9 to 10 %).
Source of the layout: the compressed-tensors library, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvern import ops
from kvern.checkpoint.save import PlannedTensor
from kvern.errors import CheckpointError
from kvern.ops.reference_int4 import PER_WORD, pack_int4

INT4_WEIGHT = "weight_packed"
INT4_PARTS = (INT4_WEIGHT, "weight_scale", "weight_shape")
LOWEST, HIGHEST = -8, 7
FACTORS = (7.0, *(step / 100 for step in range(60, 106, 5)))
"""Times amax / 7. 7 gives s = amax; 0.875 would be amax / 8."""

PART_ELEMENTS = 1 << 17
"""Weights searched at a time: what a core's cache holds with its copies."""

Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]


def int4_layout(shape: tuple[int, int], group_size: int) -> Layout:
    """(dtype, shape) of weight_packed, weight_scale and weight_shape of a weight [rows, columns]."""
    rows, columns = shape
    packed, scale = (rows, columns // PER_WORD), (rows, columns // group_size)
    return (torch.int32, packed), (torch.bfloat16, scale), (torch.int64, (2,))


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [rows, columns] of floats -> (int32 [rows, columns / 8], bfloat16 [rows, columns / group_size]).

    Raises CheckpointError where a weight is not finite or the columns are no multiple of the group.
    """
    if weight.dim() != 2 or weight.shape[1] % group_size or group_size % PER_WORD:
        raise CheckpointError(f"a weight {list(weight.shape)} has no groups of {group_size} columns")
    (_, packed_shape), (_, scale_shape), _ = int4_layout((weight.shape[0], weight.shape[1]), group_size)
    packed = torch.empty(packed_shape, dtype=torch.int32)
    scale = torch.empty(scale_shape, dtype=torch.bfloat16)
    step = max(1, PART_ELEMENTS // max(1, weight.shape[1]))
    for row in range(0, weight.shape[0], step):
        rows = slice(row, row + step)
        part = weight[rows].float()
        if not torch.isfinite(part).all():
            raise CheckpointError("weight holds NaN or infinity, which 4 bits cannot store")
        groups = part.reshape(-1, group_size)
        found = search_scales(groups)
        values = torch.round(groups / found[:, None]).clamp_(LOWEST, HIGHEST)
        packed[rows] = pack_int4(values.view(part.shape))
        scale[rows] = found.view(part.shape[0], -1).bfloat16()
    return packed, scale


def search_scales(groups: torch.Tensor) -> torch.Tensor:
    """groups [G, group] float32 -> float32 [G] of either sign, numbers of BF16; 1 for a group of zeros."""
    amax = groups.abs().amax(-1) / HIGHEST
    best = stored_scale(amax)
    scratch = torch.empty_like(groups)
    least = squared_error(groups, best, scratch)
    for factor in FACTORS:
        for sign in (1, -1):
            _improve(groups, stored_scale(amax * (sign * factor)), best, least, scratch)
    values = torch.round(groups / best[:, None]).clamp_(LOWEST, HIGHEST)
    fitted = (groups * values).sum(-1) / values.square().sum(-1).clamp_(min=1)
    _improve(groups, stored_scale(fitted), best, least, scratch)
    return best


def stored_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scale as the file will hold it, in float32; 1 where it would be 0."""
    rounded = scale.bfloat16().float()
    return torch.where(rounded == 0, 1.0, rounded)


def squared_error(groups: torch.Tensor, scale: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of (w - q s)^2 for each group [G, group] with the scale [G]."""
    scratch = torch.empty_like(groups) if scratch is None else scratch
    torch.div(groups, scale[:, None], out=scratch)
    scratch.round_().clamp_(LOWEST, HIGHEST).mul_(scale[:, None]).sub_(groups)
    return scratch.square_().sum(-1)


def _improve(
    groups: torch.Tensor, scale: torch.Tensor, best: torch.Tensor, least: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Where `scale` has less error than `best`, put it and its error there."""
    error = squared_error(groups, scale, scratch)
    better = error < least
    torch.where(better, scale, best, out=best)
    torch.where(better, error, least, out=least)


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [rows, columns] in `dtype`, made a part at a time."""
    out = torch.empty((packed.shape[0], packed.shape[1] * PER_WORD), dtype=dtype)
    step = max(1, (1 << 24) // max(1, out.shape[1]))
    for row in range(0, len(out), step):
        rows = slice(row, row + step)
        out[rows] = ops.dequantize_int4(packed[rows], scale[rows], dtype)
    return out


class Int4Weight:
    """A 4-bit weight and its scales, written one after the other: both computed when the first is asked for."""

    def __init__(self, module: str, shape: tuple[int, int], group_size: int, make: Callable[[], torch.Tensor]) -> None:
        self.module, self.shape, self.group_size, self.make = module, shape, group_size, make
        self._scale: torch.Tensor | None = None

    def tensors(self) -> list[PlannedTensor]:
        """What takes the place of `module`.weight."""
        makers = (self.packed, self.scale, lambda: torch.tensor(self.shape))
        layout = int4_layout(self.shape, self.group_size)
        return [
            PlannedTensor(f"{self.module}.{part}", dtype, shape, make)
            for part, (dtype, shape), make in zip(INT4_PARTS, layout, makers, strict=True)
        ]

    def packed(self) -> torch.Tensor:
        """weight_packed; its scales are kept until they are asked for. Raises CheckpointError naming the weight."""
        try:
            packed, self._scale = quantize_int4(self.make(), self.group_size)
        except CheckpointError as error:
            raise CheckpointError(error.message, tensor=f"{self.module}.weight") from error
        return packed

    def scale(self) -> torch.Tensor:
        """weight_scale, which is then let go: a checkpoint has gigabytes of scales."""
        if self._scale is None:
            self.packed()
        scale, self._scale = self._scale, None
        assert scale is not None
        return scale
