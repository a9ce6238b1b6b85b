"""Rotary positions: inverse frequencies (plain, YaRN, longrope) and the rotation of each position.

Plain: f_i = theta^(-2i/d). YaRN (arXiv 2309.00071, as in DeepSeek-V3's model.py): f_i is divided by `factor` where its
wavelength exceeds the original context, kept where it is short, with a linear ramp between. longrope: f_i / factor_i.
The rotation of position p is c * exp(j p f_i), where c is the rotation factor (1 for V3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvern.config import RopeScaling


def inverse_frequencies(theta: float, size: int, scaling: RopeScaling | None) -> Tensor:
    """[size / 2] float32, radians a position, for rotated vectors of `size` numbers."""
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None:
        return plain
    if scaling.type == "longrope":
        return plain / torch.tensor(scaling.short_factor, dtype=torch.float32)
    kept = 1.0 - _yarn_ramp(scaling, size, theta)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _yarn_ramp(scaling: RopeScaling, size: int, theta: float) -> Tensor:
    """[size / 2] in 0..1: 0 where a dimension turns over beta_fast times in the original context, 1 under beta_slow."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def rotations(positions_T: Tensor, frequencies_F: Tensor, factor: float = 1.0) -> Tensor:
    """[T, F] complex64: factor * exp(j * position * frequency); one table a forward pass, shared by all layers."""
    angles = positions_T[:, None].float() * frequencies_F
    return torch.polar(torch.full_like(angles, factor), angles)
