"""The shared library of CPU kernels (csrc/), loaded through ctypes and declared.

Where it was not built (no compiler at installation) `library` is None and `why_absent` tells why. ctypes drops the GIL,
so a server's event loop runs meanwhile. KVERN_ISA=scalar|avx2|avx512|avx512bf16|amx forces a set of kernels. A process
that forks keeps working: the child starts its own threads with its first call.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvern.errors import ConfigError
from kvern.plan.hardware import default_threads

ABI = 6
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}
ROW_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 5}
"""Of cache rows; bytes are records of `reference_latent8`."""
ISA_ERRORS = {1: "no such instruction set", 2: "this CPU, or this build, lacks it"}


def isa() -> str | None:
    """The instruction set in use: "amx", "avx512bf16", "avx512", "avx2" or "scalar"; None without the library."""
    lib = library()
    return None if lib is None else str(lib.kvern_isa().decode())


@cache
def fingerprint() -> str | None:
    """Hash of the library's file: another build may round differently. None without the library."""
    return None if library() is None else hashlib.sha256(_path().read_bytes()).hexdigest()


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
    return int(loaded().kvern_read(data.data_ptr(), data.numel() * data.element_size()))


def start_workers() -> None:
    """Let the pool start its threads now, not with the first product. Without the library there are none."""
    if library() is not None:
        read_bandwidth(torch.zeros(1 << 20, dtype=torch.uint8))


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
        hint = "use scalar, avx2, avx512, avx512bf16 or amx, or unset it"
        raise ConfigError(f"KVERN_ISA={wanted}: {ISA_ERRORS[error]}", hint=hint)
    lib.kvern_set_threads(default_threads())
    return lib


def _path() -> Path:
    name = "libkvern.dylib" if sys.platform == "darwin" else "libkvern.so"
    return Path(str(files("kvern").joinpath("_native", name)))


def loaded() -> ctypes.CDLL:
    """The library, for code that runs only where there is one."""
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
    lib.kvern_encode_latents.argtypes = [pointer, size, pointer, size, size, size]
    lib.kvern_decode_latents.argtypes = [pointer, pointer, size, size, size, size]
    lib.kvern_sample.argtypes = [pointer, size, pointer]
    lib.kvern_logprobs.argtypes = [pointer, size]
    _declare_packed(lib)


def _declare_packed(lib: ctypes.CDLL) -> None:
    pointer, size, code = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.kvern_packed_order.restype = ctypes.c_char_p
    lib.kvern_packed_bytes.argtypes = [code, size, size]
    lib.kvern_packed_bytes.restype = size
    lib.kvern_scale_bytes.argtypes = [code, size, size, size]
    lib.kvern_scale_bytes.restype = size
    weight: list[Any] = [pointer, code, size, pointer, size]
    lib.kvern_pack.argtypes = [pointer, pointer, code, *weight, size, size, size]
    lib.kvern_multiply.argtypes = [pointer, pointer, size, code, pointer, pointer]
    lib.kvern_hash.argtypes = [pointer, size]
    lib.kvern_hash.restype = ctypes.c_uint64
    lib.kvern_check_layer.argtypes = [pointer]
    lib.kvern_run_layers.argtypes = [pointer, size, pointer, pointer, size]
    frequencies: list[Any] = [pointer, size, ctypes.c_float]
    lib.kvern_begin_step.argtypes = [pointer, *frequencies, pointer, code, size, size, pointer]
    lib.kvern_run_head.argtypes = [pointer, pointer, ctypes.c_float, pointer, size, pointer, size, pointer, pointer]
    q_kv_rope: list[Any] = [pointer, pointer, pointer, pointer, size, code]
    lib.kvern_expanded_attention.argtypes = [*q_kv_rope, size, size, size, size, size, size, ctypes.c_float]


def is_dense(weight: Tensor) -> bool:
    """[N, K] with dense columns; rows may lie further apart (a slice of a larger weight)."""
    return weight.dim() == 2 and (weight.shape[1] <= 1 or weight.stride(1) == 1) and weight.stride(0) >= weight.shape[1]
