"""The CPU kernels of csrc/ through ctypes: weights are multiplied as they are stored, E4M3, BF16 or F32.

A product with few rows reads its weights once, at the speed of the memory, and never makes a converted copy. With many
rows the weights are converted block by block (a few MiB at a time) and torch multiplies, which is faster there (numbers
in `FEW_ROWS`). ctypes drops the GIL, so a server's event loop runs meanwhile.

What it leaves to the reference: autograd, dtypes other than FP32 and BF16, weights whose columns are not dense. Where
the library was not built (no compiler at installation) nothing is registered, and `why_absent` tells why.

KVERN_ISA=scalar|avx2|avx512 forces a set of kernels. A process that forks keeps working: the child starts its own
threads with its first call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvern.errors import ConfigError
from kvern.ops import reference
from kvern.plan.hardware import default_threads

ABI = 2
BLOCK = reference.BLOCK
FEW_ROWS = {
    (torch.float32, torch.float8_e4m3fn): 128,
    (torch.float32, torch.bfloat16): 128,
    (torch.float32, torch.float32): 32,
    (torch.bfloat16, torch.float8_e4m3fn): 16,
    (torch.bfloat16, torch.bfloat16): 8,
    (torch.bfloat16, torch.float32): 16,
}
"""(x.dtype, weight.dtype) -> rows of x up to which the kernels beat conversion plus torch.

Zen 4, AVX-512, one thread, weight 2048x7168, times faster than conversion plus torch at 4 / 16 / 64 / 128 rows:
FP32 x FP8 6.0 / 2.5 / 1.5 / 1.2, FP32 x BF16 10 / 3.9 / 1.3 / 1.1, FP32 x FP32 3.9 / 1.5 / 0.8 / 1.0,
BF16 x FP8 4.5 / 1.1 / 0.5 / 0.4, BF16 x BF16 1.9 / 1.0 / 0.4 / 0.4 (torch has BF16 dot products there, these kernels
compute in FP32).
"""

DENSE_BYTES = 4 << 20
"""Converted weights held at a time when x has many rows; small enough to stay in the outer cache."""

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
ISA_ERRORS = {1: "no such instruction set", 2: "this CPU, or this build, lacks it"}


def backends(op: str) -> dict[str, Callable[..., Any]]:
    """Device type -> implementation of `op`; empty where there is no library."""
    known: dict[str, Callable[..., Any]] = {
        "linear": linear,
        "dequantize": dequantize,
        "paged_latent_attention": paged_latent_attention,
    }
    return {"cpu": known[op]} if library() is not None and op in known else {}


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`, accumulated in FP32 from the weights as stored: relative error under 2e-6 of sum |x||w|."""
    if not _takes_linear(x, weight, scale, bias):
        return reference.linear(x, weight, scale, bias)
    rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    if rows > FEW_ROWS[x.dtype, weight.dtype]:
        return _linear_many(x, weight, scale, bias)
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    _linear_few(x, weight, scale, bias, out, rows)
    return out


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.dequantize`, bit for bit, in one pass over the bytes."""
    if not (dtype in (torch.float32, torch.bfloat16) and _is_dense(weight) and _is_scale(scale, weight)):
        return reference.dequantize(weight, scale, dtype)
    out = torch.empty(weight.shape, dtype=dtype)
    lib = _loaded()
    code = lib.kvern_dequantize(
        out.data_ptr(),
        CODES[dtype],
        weight.data_ptr(),
        weight.stride(0),
        scale.data_ptr(),
        scale.stride(0),
        *weight.shape,
    )
    assert code == 0, "kvern_dequantize refused its arguments"
    return out


def paged_latent_attention(
    q: Tensor,
    rows: Tensor,
    tables: Tensor,
    contexts: Tensor,
    starts: Tensor,
    block_size: int,
    rank: int,
    scale: float,
) -> Tensor:
    """`reference.paged_latent_attention` in FP32 throughout: relative error under 3e-6 of sum p|v|.

    A query's result depends on its rows alone, bit for bit: not on the rest of the batch, nor on the number of threads.
    """
    if not _takes_attention(q, rows, tables, contexts, starts):
        return reference.paged_latent_attention(q, rows, tables, contexts, starts, block_size, rank, scale)
    q, tables, contexts, starts = (t.contiguous() for t in (q, tables, contexts, starts))
    out = torch.empty(*q.shape[:2], rank, dtype=q.dtype)
    code = _loaded().kvern_paged_latent_attention(
        out.data_ptr(),
        q.data_ptr(),
        CODES[q.dtype],
        q.shape[0],
        rows.data_ptr(),
        CODES[rows.dtype],
        rows.shape[0],
        rows.stride(0),
        tables.data_ptr(),
        tables.shape[1],
        contexts.data_ptr(),
        starts.data_ptr(),
        tables.shape[0],
        block_size,
        q.shape[1],
        q.shape[2],
        rank,
        scale,
    )
    if code:
        raise IndexError(
            "starts are not offsets into q, a context is too short, or a block number is outside the cache"
        )
    return out


def kernel_rows(activations: torch.dtype, weights: torch.dtype) -> int:
    """Rows up to which `linear` runs in the kernels for these dtypes; 0 without the library."""
    return 0 if library() is None else FEW_ROWS.get((activations, weights), 0)


def isa() -> str | None:
    """The instruction set in use: "avx512", "avx2" or "scalar"; None without the library."""
    lib = library()
    return None if lib is None else str(lib.kvern_isa().decode())


def threads() -> int:
    """Threads of the kernels; 1 without the library."""
    lib = library()
    return 1 if lib is None else int(lib.kvern_threads())


def set_threads(count: int) -> None:
    """Let the kernels use `count` threads (1 to 1024), for the whole process. Without the library: nothing to set."""
    lib = library()
    if lib is not None and lib.kvern_set_threads(count) != 0:
        raise ConfigError(f"{count} kernel threads are not possible", hint="give a number from 1 to 1024")


def read_bandwidth(data: Tensor) -> int:
    """Read the bytes of a dense tensor once, with all threads; returns their checksum (time it: that is the limit)."""
    return int(_loaded().kvern_read(data.data_ptr(), data.numel() * data.element_size()))


def why_absent() -> str | None:
    """Why there are no native kernels, or None when there are."""
    path = _path()
    if not path.is_file():
        return "the library was not built: no C++ compiler was found when kvern was installed"
    return None if library() is not None else f"{path} was built for another version of kvern"


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where the installation has none. Raises ConfigError for a wrong KVERN_ISA."""
    path = _path()
    if not path.is_file():
        return None
    lib = ctypes.CDLL(str(path))
    if lib.kvern_abi() != ABI:
        return None
    _declare(lib)
    wanted = os.environ.get("KVERN_ISA")
    error = lib.kvern_select_isa(wanted.encode() if wanted else None)
    if error:
        hint = "use scalar, avx2 or avx512, or unset it"
        raise ConfigError(f"KVERN_ISA={wanted}: {ISA_ERRORS[error]}", hint=hint)
    lib.kvern_set_threads(default_threads())
    return lib


def _path() -> Path:
    name = "libkvern.dylib" if sys.platform == "darwin" else "libkvern.so"
    return Path(str(files("kvern").joinpath("_native", name)))


def _loaded() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "native kernels are registered only with a library"
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    pointer, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.kvern_isa.restype = ctypes.c_char_p
    lib.kvern_select_isa.argtypes = [ctypes.c_char_p]
    lib.kvern_set_threads.argtypes = [code]
    lib.kvern_read.argtypes = [pointer, size]
    lib.kvern_read.restype = ctypes.c_uint64
    lib.kvern_dequantize.argtypes = [pointer, code, pointer, size, pointer, size, size, size]
    y_x_weight: list[Any] = [pointer, code, pointer, code, pointer, code, size]
    lib.kvern_linear.argtypes = [*y_x_weight, pointer, size, pointer, code, size, size, size]
    q_rows: list[Any] = [pointer, pointer, code, size, pointer, code, size, size]
    books: list[Any] = [pointer, size, pointer, pointer, size, size]
    lib.kvern_paged_latent_attention.argtypes = [*q_rows, *books, size, size, size, ctypes.c_float]


def _linear_few(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, rows: int) -> None:
    code = _loaded().kvern_linear(
        out.data_ptr(),
        CODES[out.dtype],
        x.data_ptr(),
        CODES[x.dtype],
        weight.data_ptr(),
        CODES[weight.dtype],
        weight.stride(0),
        None if scale is None else scale.data_ptr(),
        0 if scale is None else scale.stride(0),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else CODES[bias.dtype],
        rows,
        *weight.shape,
    )
    assert code == 0, "kvern_linear refused its arguments"


def _linear_many(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Convert a block of rows of the weight to x.dtype, multiply with torch, next block."""
    if weight.dtype == x.dtype:
        return reference.linear(x, weight, None, bias)
    outputs, inputs = weight.shape
    x_2d = x.reshape(-1, inputs)
    out = torch.empty(x_2d.shape[0], outputs, dtype=x.dtype)
    step = max(1, DENSE_BYTES // max(1, inputs * x.element_size() * BLOCK)) * BLOCK
    for first in range(0, outputs, step):
        rows = slice(first, first + step)
        if scale is None:
            dense = weight[rows].to(x.dtype)
        else:
            dense = dequantize(weight[rows], scale[first // BLOCK : (first + step) // BLOCK], x.dtype)
        torch.mm(x_2d, dense.T, out=out[:, rows])
    if bias is not None:
        out += bias.to(x.dtype)
    return out.view(*x.shape[:-1], outputs)


def _takes_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    is_f8 = weight.dtype is torch.float8_e4m3fn
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() > 0
        and (is_f8 or weight.dtype in (torch.float32, torch.bfloat16))
        and _is_dense(weight)
        and x.shape[-1] == weight.shape[1]
        and is_f8 == (scale is not None)
        and (scale is None or _is_scale(scale, weight))
        and (
            bias is None
            or (
                bias.dtype in (torch.float32, torch.bfloat16)
                and bias.shape == weight.shape[:1]
                and bias.is_contiguous()
            )
        )
    )


def _takes_attention(q: Tensor, rows: Tensor, tables: Tensor, contexts: Tensor, starts: Tensor) -> bool:
    if torch.is_grad_enabled() and (q.requires_grad or rows.requires_grad):
        return False
    return (
        q.dtype in (torch.float32, torch.bfloat16)
        and rows.dtype in (torch.float32, torch.bfloat16)
        and q.dim() == 3
        and _is_dense(rows)
        and q.shape[2] == rows.shape[1]
        and all(books.dtype is torch.int32 for books in (tables, contexts, starts))
        and tables.shape[:1] == contexts.shape
        and starts.shape == (len(contexts) + 1,)
    )


def _is_dense(weight: Tensor) -> bool:
    """[N, K] with dense columns; rows may lie further apart (a slice of a larger weight)."""
    return weight.dim() == 2 and (weight.shape[1] <= 1 or weight.stride(1) == 1) and weight.stride(0) >= weight.shape[1]


def _is_scale(scale: Tensor, weight: Tensor) -> bool:
    blocks = tuple(-(-size // BLOCK) for size in weight.shape)
    return (
        scale.dtype is torch.float32
        and scale.shape == blocks
        and (blocks[1] <= 1 or scale.stride(1) == 1)
        and scale.stride(0) >= blocks[1]
    )
