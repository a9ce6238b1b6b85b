"""One op, one dict: device type -> implementation.

A backend takes every dtype and shape that the reference takes, or it is not registered; so a call is one look-up on the
device of its first tensor and no forest of conditions. The reference computes wherever no backend is registered. Where
a gradient is wanted, the op's `training` form computes, if it has one: what serves never does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """A named op. `backends` maps "cpu" or "cuda" to an implementation; all have the reference's signature."""

    def __init__(
        self,
        name: str,
        reference: Callable[P, R],
        backends: Mapping[str, Callable[P, R]] | None = None,
        training: Callable[P, R] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.backends = dict(backends or {})
        self.training = training

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run on the device of the first argument, which is a tensor."""
        first = args[0]
        assert isinstance(first, torch.Tensor)
        if self.training is not None and torch.is_grad_enabled() and _wants_gradient(args):
            return self.training(*args, **kwargs)
        return self.backends.get(first.device.type, self.reference)(*args, **kwargs)

    def backend(self, device: str) -> str:
        """Where calls on `device` go: the module that computes them, "native" or "reference" for instance."""
        return self.backends.get(device, self.reference).__module__.rpartition(".")[2]


def _wants_gradient(arguments: tuple[object, ...]) -> bool:
    return any(isinstance(one, torch.Tensor) and one.requires_grad for one in arguments)
