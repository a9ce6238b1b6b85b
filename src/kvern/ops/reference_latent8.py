"""Cache rows in 8 bits, in plain torch: a latent of `rank` + `rope` numbers as a record of bytes.

    record = rank codes in E4M3 | ceil(rank / 128) scales in FP32 | rope numbers in BF16, without padding
    scale  = max(amax / 448, 2^-126) of 128 numbers (of fewer in the last block);  code = number / scale

Codes are rounded to nearest even. For 512 + 64 these are the 656 bytes of FlashMLA's FP8 cache for DeepSeek-V3. The
rotated part stays in BF16, because key biases of imported models can be large. A block that holds a NaN or an infinity,
which E4M3 lacks, has the scale NaN and comes back as NaNs. What it gives up: a number keeps 3 bits of its mantissa, 6 %
are the most that it is off by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvern.plan.memory import LATENT_BLOCK, latent8_bytes

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
NAN_CODE = 0x7F


def encode_latents(latent: Tensor, rank: int) -> Tensor:
    """latent [T, rank + rope] -> records [T, latent8_bytes(rank, rope)] uint8."""
    low, rope = latent[:, :rank].float(), latent[:, rank:]
    blocks = F.pad(low, (0, -rank % LATENT_BLOCK)).view(len(low), -(-rank // LATENT_BLOCK), LATENT_BLOCK)
    amax = blocks.abs().amax(-1)
    scale = (amax / E4M3_MAX).clamp(min=SMALLEST_SCALE).masked_fill(~amax.isfinite(), float("nan"))
    codes = (blocks / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.masked_fill(scale.isnan()[..., None], NAN_CODE)
    parts = (codes.flatten(1)[:, :rank], scale.view(torch.uint8), rope.bfloat16().contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def decode_latents(records: Tensor, rank: int, rope: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """records [N, latent8_bytes(rank, rope)] uint8 -> [N, rank + rope] in `dtype`, code * scale rounded once."""
    ends = [rank, latent8_bytes(rank, 0)]
    codes, scales, turned = torch.tensor_split(records[:, : latent8_bytes(rank, rope)], ends, dim=1)
    scale = _as(torch.float32, scales).repeat_interleave(LATENT_BLOCK, 1)[:, :rank]
    low = _as(torch.float8_e4m3fn, codes).float() * scale
    return torch.cat([low.to(dtype), _as(torch.bfloat16, turned).to(dtype)], dim=1)


def _as(dtype: torch.dtype, stored: Tensor) -> Tensor:
    """Bytes [N, B] as numbers [N, B / size]; copied first, since they may begin at any address."""
    return stored.flatten().clone().view(dtype).view(len(stored), stored.shape[1] // dtype.itemsize)
