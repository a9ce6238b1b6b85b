"""One op, one dict: device type -> implementation.

A backend takes every dtype and shape that the reference takes, or it is not registered; so a call is one look-up on the
device of its first tensor and no forest of conditions. The reference computes wherever no backend is registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """A named op. `backends` maps "cpu" or "cuda" to an implementation with the reference's signature."""

    def __init__(
        self, name: str, reference: Callable[P, R], backends: Mapping[str, Callable[P, R]] | None = None
    ) -> None:
        self.name = name
        self.reference = reference
        self.backends = dict(backends or {})

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the device of the first argument, which is a tensor."""
        first = args[0]
        assert isinstance(first, torch.Tensor)
        return self.backends.get(first.device.type, self.reference)(*args, **kwargs)

    def backend(self, device: str) -> str:
        """Where calls on `device` go: the module that computes them, "native" or "reference" for instance."""
        return self.backends.get(device, self.reference).__module__.rpartition(".")[2]
