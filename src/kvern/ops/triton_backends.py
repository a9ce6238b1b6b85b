"""Which ops have Triton kernels for "cuda", said without importing Triton.

Triton is imported with the first call on a card. Where it is not installed nothing is registered and the reference
computes. The kernels run under Triton's interpreter, too (`TRITON_INTERPRET=1`, tensors on the CPU): call the functions
of `triton_linear`, `triton_experts`, `triton_attention` and `triton_fp8` themselves there, since only "cuda" is
registered. The kernels of training steps, `triton_training`, are chosen by `training_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

MODULES = {
    "linear": "kvern.ops.triton_linear",
    "grouped_experts": "kvern.ops.triton_experts",
    "paged_latent_attention": "kvern.ops.triton_attention",
    "quantize_tiles": "kvern.ops.triton_fp8",
    "retile": "kvern.ops.triton_fp8",
}
"""Op -> module whose function of the op's name computes it."""


def backends(op: str) -> dict[str, Callable[..., Any]]:
    """Device type -> implementation of `op`; empty where Triton is not installed."""
    return {"cuda": _late(op)} if op in MODULES and find_spec("triton") is not None else {}


def _late(op: str) -> Callable[..., Any]:
    @cache
    def kernel() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(import_module(MODULES[op]), op)
        return found

    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel()(*args, **kwargs)

    call.__module__ = MODULES[op]
    return call
