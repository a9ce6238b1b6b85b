"""Linear, RMSNorm and the SwiGLU MLP: parameters as the checkpoint stores them, maths in `kvern.ops`.

A weight stays in the file's dtype (float32, bfloat16, or E4M3 with one FP32 scale a 128x128 block) and is never
converted here; the activations' dtype decides what the product is computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.config import ModelConfig

FP8 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Parameter:
    """An uninitialised parameter that asks for no gradient; training turns that on for what it trains."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b with W [out, in]; FP8 weights carry `weight_scale_inv` [ceil(out/128), ceil(in/128)] float32."""

    def __init__(
        self, inputs: int, outputs: int, dtype: torch.dtype, device: str, *, bias: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = parameter((outputs, inputs), dtype, device)
        self.bias = parameter((outputs,), bias, device) if bias is not None else None
        self.weight_scale_inv: nn.Parameter | None = None
        if dtype == FP8:
            self.weight_scale_inv = parameter((-(-outputs // 128), -(-inputs // 128)), torch.float32, device)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in x.dtype."""
        return ops.linear(x, self.weight, self.weight_scale_inv, self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`; a view where it is stored so."""
        if self.weight_scale_inv is None:
            return self.weight.to(dtype)
        return ops.dequantize(self.weight, self.weight_scale_inv, dtype)

    def store_as(self, dtype: torch.dtype) -> None:
        """Replace the weight by an uninitialised one of a float `dtype`, without block scales."""
        self.weight = parameter(tuple(self.weight.shape), dtype, self.weight.device.type)
        self.weight_scale_inv = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in FP32."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = parameter((size,), dtype, device)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] -> the same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): a dense layer's feed-forward, one routed expert, or the shared experts."""

    def __init__(self, hidden: int, intermediate: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, dtype, device)
        self.up_proj = Linear(hidden, intermediate, dtype, device)
        self.down_proj = Linear(intermediate, hidden, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., hidden] -> [.., hidden]."""
        out: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


def linear_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype in which the official layout stores a Linear of a layer."""
    return FP8 if config.quantization_config else DTYPES[config.torch_dtype]
