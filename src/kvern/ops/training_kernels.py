"""Which kernels compute a training step's ops on given tensors: the CPU's, a card's, or none: then torch computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from torch import Tensor

from kvern.ops import native_training


class TrainingKernels(Protocol):
    """What the modules `native_training` and `triton_training` have, documented there."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def rms_norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]: ...
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...
    def swiglu_backward(self, dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None: ...
    def rotate(self, x: Tensor, rotation: Tensor, back: bool = False) -> Tensor: ...
    def combine(self, rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor: ...
    def combine_backward(self, dy: Tensor, rows: Tensor, weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]: ...
    def cross_entropy(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor: ...
    def adamw(
        self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, numbers: Sequence[float]
    ) -> None: ...


def kernels_for(*tensors: Tensor) -> TrainingKernels | None:
    """Kernels that take all of `tensors`: float32 or bfloat16 on one device, the last dimension dense."""
    if native_training.takes(*tensors):
        return native_training
    if all(tensor.is_cuda for tensor in tensors) and has_triton():
        card = import_module("kvern.ops.triton_training")
        return cast(TrainingKernels, card) if card.takes(*tensors) else None
    return None


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported before a card needs it."""
    return find_spec("triton") is not None
