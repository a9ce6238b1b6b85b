"""Cache rows in 8 bits on the CPU kernels of csrc/, bit for bit as `reference_latent8`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvern.errors import KvernError
from kvern.ops.library import loaded
from kvern.plan.memory import latent8_bytes


def encode_latents(latent: Tensor, rank: int) -> Tensor:
    """`reference_latent8.encode_latents`."""
    latent, rope = latent.float().contiguous(), latent.shape[1] - rank
    records = torch.empty(len(latent), latent8_bytes(rank, rope), dtype=torch.uint8)
    code = loaded().kvern_encode_latents(
        records.data_ptr(), records.shape[1], latent.data_ptr(), len(latent), rank, rope
    )
    if code:
        raise KvernError(f"latents {tuple(latent.shape)} have no part of {rank} and a rotated one")
    return records


def decode_latents(records: Tensor, rank: int, rope: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference_latent8.decode_latents`; rows may lie further apart than their bytes."""
    records = records if records.stride(1) == 1 else records.contiguous()
    latent = torch.empty(len(records), rank + rope)
    if records.shape[1] < latent8_bytes(rank, rope):
        raise KvernError(f"records {tuple(records.shape)} do not hold latents of {rank} + {rope} numbers")
    stride = max(records.stride(0), records.shape[1])
    code = loaded().kvern_decode_latents(latent.data_ptr(), records.data_ptr(), stride, len(records), rank, rope)
    assert code == 0, "kvern_decode_latents refused its arguments"
    return latent.to(dtype)
