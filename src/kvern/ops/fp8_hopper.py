"""The product of FP8 matrices on Hopper's tensor cores: DeepGEMM where installed, else torch's blockwise `scaled_mm`.

Both take 1x128 tiles on the left and 1x128 tiles or 128x128 blocks on the right, FP32 scales, and promote to FP32 after
every 128 of K. DeepGEMM takes the blocks with BF16 results (Fprop, Dgrad); Wgrad, tiles on both sides, goes to torch.
Sizes are padded with zeros to what the kernels take. Elsewhere on "cuda" (other cards, one scale for a whole tensor,
CUDA before 12.9) the reference computes.

`scaled_mm` has run on an H200 (docs/gpu.md), DeepGEMM never: of it the tests check shapes and strides only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvern.ops import reference_fp8
from kvern.ops.training_kernels import has_triton

BLOCK = 128
ALIGNED_ROWS = 16
CUDA_WITH_BLOCKS = (12, 9)
"""The first CUDA whose cuBLASLt knows these scales."""


def backends(op: str) -> dict[str, Callable[..., Any]]:
    """Device type -> implementation of `op`."""
    return {"cuda": scaled_product} if op == "scaled_product" else {}


def scaled_product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`reference_fp8.scaled_product` on a Hopper card; the reference where that does not apply."""
    if not (_has_blockwise_mm(a.device.index or 0) and _is_blockwise(a, a_scale, b, b_scale)):
        return reference_fp8.scaled_product(a, a_scale, b, b_scale, dtype)
    blocks = not _has_row_scales(b, b_scale)
    rows, outputs = a.shape[0], b.shape[0]
    a, a_scale, b, b_scale = padded(a, a_scale, b, b_scale)
    if blocks and dtype is torch.bfloat16 and _has_deep_gemm():
        return _deep_gemm(a, a_scale, b, b_scale)[:rows, :outputs]
    return torch_product(a, a_scale, b, b_scale, blocks, dtype)[:rows, :outputs]


def padded(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous operands: K and N multiples of 128, M of 16; new codes are zero, new scales one."""
    more_rows, more_columns, more_depth = -a.shape[0] % ALIGNED_ROWS, -b.shape[0] % BLOCK, -a.shape[1] % BLOCK
    return (
        _pad_codes(a, more_rows, more_depth),
        _pad_scale(a_scale, more_rows),
        _pad_codes(b, more_columns, more_depth),
        _pad_scale(b_scale, more_columns) if _has_row_scales(b, b_scale) else b_scale.contiguous(),
    )


def torch_scales(a_scale: Tensor, b_scale: Tensor, blocks: bool) -> tuple[Tensor, Tensor]:
    """Scales as `scaled_mm` wants them: tiles with strides (1, rows); blocks [ceil4(K/128), N/128], strides (1, ..)."""
    left = _by_columns(a_scale)
    if not blocks:
        return left, _by_columns(b_scale)
    return left, _by_columns(_pad_scale(b_scale.T, -b_scale.shape[1] % 4))


def _pad_codes(codes: Tensor, rows: int, columns: int) -> Tensor:
    """With `rows` and `columns` more zeros, as bytes, since FP8 tensors cannot be padded; dense."""
    dense = _dense(codes)
    return F.pad(dense.view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype) if rows or columns else dense


def _by_columns(scale: Tensor) -> Tensor:
    """The same numbers with strides (1, rows), also where there is one column, of which torch would not care."""
    return scale.T.contiguous().T.as_strided(scale.shape, (1, scale.shape[0]))


def _pad_scale(scale: Tensor, rows: int) -> Tensor:
    """With `rows` more rows of ones."""
    return F.pad(scale, (0, 0, 0, rows), value=1.0) if rows else scale


def _dense(codes: Tensor) -> Tensor:
    """Contiguous: of what lies by columns, a copy that a kernel turns."""
    if codes.is_cuda and codes.stride(0) == 1 < codes.stride(1) and has_triton():
        turned: Tensor = import_module("kvern.ops.triton_fp8").transposed(codes.T)
        return turned
    return codes.contiguous()


def _has_row_scales(b: Tensor, b_scale: Tensor) -> bool:
    """Whether b has 1x128 tiles; a single row counts as a block, which is the same."""
    return 1 < b.shape[0] == b_scale.shape[0]


def _is_blockwise(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> bool:
    depth = -(-a.shape[1] // BLOCK)
    return (
        min(*a.shape, *b.shape) > 0
        and a_scale.shape == (a.shape[0], depth)
        and b_scale.shape in ((b.shape[0], depth), (-(-b.shape[0] // BLOCK), depth))
    )


@cache
def _has_blockwise_mm(device: int) -> bool:
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and version >= CUDA_WITH_BLOCKS


@cache
def _has_deep_gemm() -> bool:
    return find_spec("deep_gemm") is not None


def _deep_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    import_module("deep_gemm").fp8_gemm_nt((a, a_scale), (b, b_scale), out)
    return out


def torch_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, blocks: bool, dtype: torch.dtype) -> Tensor:
    """`scaled_mm` of padded operands; `blocks`: b has 128x128 blocks."""
    tiles = F.ScalingType.BlockWise1x128
    right = F.ScalingType.BlockWise128x128 if blocks else tiles
    left_scale, right_scale = torch_scales(a_scale, b_scale, blocks)
    return F.scaled_mm(a, b.T, left_scale, tiles, right_scale, right, output_dtype=dtype)
