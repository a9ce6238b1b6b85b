"""AdamW as the report trains: FP32 masters and gradients, both moments in BF16, decoupled weight decay, clipping.

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A step computes in FP32 and rounds the moments when it stores them, so they take 4 bytes a parameter instead of 8. With
b2 = 0.95 that leaves v within 8 % of where it would settle: farther off, a step is over half of BF16's spacing.
b1 0.9, b2 0.95, weight decay 0.1 and a norm of at most 1.0 are the report's; eps 1e-8, and no decay on norms and
biases, are ours, for it says neither. An expert without a token has a gradient of zeros, not none: a step is the same
however the batch is split. With kernels (the CPU's or a card's) a step is one pass over memory; elsewhere about ten.
Source: DeepSeek-V3 technical report, sections 3.3.3 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from kvern.errors import ConfigError, TrainingError
from kvern.ops.training_kernels import kernels_for

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(Optimizer):
    """`torch.optim.AdamW` for float32 parameters with moments in `moments`. The rate is `param_groups[..]["lr"]`."""

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
        moments: torch.dtype = torch.bfloat16,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(f"impossible AdamW: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}")
        self.moments = moments
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that asks for a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            for parameter in trained:
                self.moments_of(parameter)["step"] += 1
            self._update_all(trained, group)
        return loss

    def moments_of(self, parameter: Tensor) -> dict[str, Any]:
        """A parameter's moments, and the `step`s they have seen; zeros before the first."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in self.moment_names(parameter):
                state[name] = torch.zeros_like(parameter, dtype=self.moments)
        return state

    def moment_names(self, parameter: Tensor) -> tuple[str, ...]:
        """Which of `MOMENTS` a parameter has."""
        return MOMENTS

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state; moments keep their dtype, which torch would turn into the parameter's."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in state.keys() & MOMENTS:
                state[name] = state[name].to(self.moments)

    def _update_all(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            self._update(parameter, gradient_of(parameter), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if self._update_natively(parameter, gradient, group):
            return
        mean = state["exp_avg"].float().lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].float().mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        below = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(mean, below, value=-group["lr"] / (1 - first ** state["step"]))

    def _update_natively(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> bool:
        """The same in one pass over memory, where the kernels take the tensors (of a sharded one, this rank's)."""
        state = self.state[parameter]
        p, g, mean, square = (local(t.detach()) for t in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"]))
        kernels = kernels_for(p, g, mean, square)
        if kernels is None or not all(t.is_contiguous() for t in (p, g, mean, square)):
            return False
        numbers = step_numbers(group["betas"], state["step"], group["lr"], group["weight_decay"], group["eps"])
        kernels.adamw(p, g, mean, square, numbers)
        return True


def gradient_of(parameter: Tensor) -> Tensor:
    """In float32; zeros where a parameter had no part in the loss."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.float()


def step_numbers(
    betas: tuple[float, float], step: int, rate: float, decay: float, eps: float
) -> tuple[float, float, float, float, float, float]:
    """What the kernels of a step multiply and add: 1 - b1, b2, 1 - lr wd, lr / (1 - b1^t), 1 / (1 - b2^t), eps."""
    first, second = betas
    return 1 - first, second, 1 - rate * decay, rate / (1 - first**step), 1 / (1 - second**step), eps


def parameter_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and norms and biases, which do not. Each parameter once."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def clip_gradients(
    parameters: Mapping[str, nn.Parameter],
    max_norm: float = MAX_NORM,
    reduce: Callable[[Tensor], None] | None = None,
) -> float:
    """Scale all gradients down to a common norm of at most `max_norm`; returns the norm before.

    reduce: adds a tensor over all ranks, in place, where gradients are DTensors that are cut over all of them, each
    number on one rank. Raises TrainingError, on every rank alike, that names the first parameter with a gradient that
    is not finite; nothing is changed then.
    """
    own = {name: local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}
    some = next(iter(parameters.values()))
    nothing = torch.zeros((), dtype=torch.float64, device=some.device)
    squares = torch.stack(
        [torch.linalg.vector_norm(own[name]).double().square() if name in own else nothing for name in parameters]
    )
    if reduce is not None:
        reduce(squares)
    norm = float(squares.sum().sqrt())
    if not math.isfinite(norm):
        for name, finite in zip(parameters, torch.isfinite(squares).tolist(), strict=True):
            if not finite:
                raise TrainingError(f"the gradient of {name} is not finite")
    scale = max_norm / (norm + 1e-6)
    if scale < 1.0:
        for gradient in own.values():
            gradient.mul_(scale)
    return norm


def local(tensor: Tensor) -> Tensor:
    """What of `tensor` lies on this rank: all of it, unless it is a DTensor. A view, without gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
