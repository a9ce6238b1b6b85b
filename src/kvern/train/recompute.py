"""What the backward pass computes a second time instead of keeping: gradients stay the same, bit for bit.

    none     everything is kept
    norms    RMSNorms, MLA's up-projections and SwiGLU run again: their results are kept nowhere
    block    each layer keeps its input only, and runs again

"norms" is the report's choice (section 3.2.3), with attention itself between the up-projections run again as well: it
would otherwise keep the queries, keys and values that they make. A norm's or SwiGLU's result is also an input that the
next product keeps for its weights' gradient: while a layer runs, whatever wants to keep such a result keeps how to
compute it instead (`_Layer`). What it gives up: time, about a third of a forward pass for "norms" and a whole one for
"block". Products in FP8 keep their inputs as one byte a number, with or without this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kvern.model import Transformer
from kvern.model.attention import Attention
from kvern.model.linear import MLP, RMSNorm
from kvern.train.experts import GroupedExperts

Activations = Literal["none", "norms", "block"]
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Calls a function whose intermediate results are computed again for the backward pass. Nothing here draws numbers."""


def recompute(model: Transformer, activations: Activations) -> None:
    """Make the layers of `model` recompute. Call it after `make_trainable`, and before weights are sharded."""
    for layer in model.model.layers:
        if activations == "block":
            layer.forward = partial(again, layer.forward)
        elif activations == "norms":
            _Layer().wrap(layer)


class _Result:
    """A tensor that can be computed again."""

    def __init__(self, compute: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self._compute, self._inputs = compute, inputs
        self._uses, self._value = 0, torch.empty(0)

    def keep(self, view: Tensor) -> _View:
        """What to keep in place of a view of the output."""
        self._uses += 1
        return _View(self, view)

    def value(self) -> Tensor:
        """The output, computed for the first that asks and kept until the last one has."""
        if not self._value.numel():
            inputs = [one.detach().requires_grad_(one.requires_grad) for one in self._inputs]
            with torch.enable_grad():  # as in the forward pass, so that the same kernels compute
                self._value = self._compute(*inputs).detach()
        value, self._uses = self._value, self._uses - 1
        if self._uses <= 0:
            self._value = torch.empty(0)
        return value


class _View:
    """A part of a result, by shape and strides."""

    def __init__(self, result: _Result, view: Tensor) -> None:
        self._result, self._place = result, (view.size(), view.stride(), view.storage_offset())

    def tensor(self) -> Tensor:
        """The part, computed again."""
        return self._result.value().as_strided(*self._place)


class _Layer:
    """Runs one layer so that the results of its norms and of SwiGLU are kept nowhere."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, _Result]] = {}

    def wrap(self, layer: nn.Module) -> None:
        """Put this between the layer and its parts."""
        for module in list(layer.modules()):
            if isinstance(module, RMSNorm):
                module.forward = partial(self.run, module.forward)  # type: ignore[method-assign]
            elif isinstance(module, (MLP, GroupedExperts)):
                module.activate = partial(self.run, module.activate)  # type: ignore[method-assign]
            elif isinstance(module, Attention):
                module.attend = partial(again, module.attend)  # type: ignore[method-assign]
        layer.forward = partial(self._forward, layer.forward)

    def run(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """compute(*inputs), to be computed again by whoever needs it."""
        output: Tensor = again(compute, *inputs)
        self._held[output.untyped_storage().data_ptr()] = output, _Result(compute, inputs)
        return output

    def _forward(self, forward: Callable[..., Tensor], *inputs: Any) -> Tensor:
        with saved_tensors_hooks(self._pack, _unpack):
            out = forward(*inputs)
        self._held = {}  # as long as it is held, no other tensor has an output's address
        return out

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        held = self._held.get(tensor.untyped_storage().data_ptr())
        return tensor if held is None else held[1].keep(tensor)


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept
