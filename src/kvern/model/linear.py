"""Linear, RMSNorm and the SwiGLU MLP: parameters as the checkpoint stores them, maths in `kvern.ops`.

A weight stays in the file's form (float32, bfloat16, E4M3 with one FP32 scale a 128x128 block, or 4-bit groups with one
BF16 scale each) and is never converted here; the activations' dtype decides what the product is computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.config import ModelConfig, QuantizationConfig

FP8 = torch.float8_e4m3fn
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> nn.Parameter:
    """An uninitialised parameter that asks for no gradient; training turns that on for what it trains."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def embedding(config: ModelConfig, device: str) -> nn.Embedding:
    """An uninitialised table [vocab_size, hidden] that asks for no gradient.

    Given its table, torch does not fill it, which on the meta device would import all of torch's compiler.
    """
    dtype = DTYPES[config.torch_dtype]
    table = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    return nn.Embedding(config.vocab_size, config.hidden_size, _weight=table).requires_grad_(False)


class Linear(nn.Module):
    """y = x W^T + b with W [out, in], in one of three forms.

    Floats: `weight`. FP8: `weight` and `weight_scale_inv` [ceil(out/128), ceil(in/128)] float32. 4-bit groups, with no
    `weight`: `weight_packed` int32 [out, in/8] (see `ops.reference_int4`), `weight_scale` bfloat16 [out, in/group] and
    `weight_shape` int64 [2] = (out, in).
    """

    def __init__(
        self, inputs: int, outputs: int, dtype: torch.dtype, device: str, *, bias: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight: nn.Parameter | None = parameter((outputs, inputs), dtype, device)
        self.bias = parameter((outputs,), bias, device) if bias is not None else None
        self.weight_scale_inv = self._block_scales(device) if dtype == FP8 else None
        self.weight_packed: nn.Parameter | None = None
        self.weight_scale: nn.Parameter | None = None
        self.weight_shape: nn.Parameter | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the weight is stored in; int32 for 4-bit groups."""
        return self._stored().dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in x.dtype."""
        if self.weight is not None:
            return ops.linear(x, self.weight, self.weight_scale_inv, self.bias)
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        return ops.linear_int4(x, self.weight_packed, self.weight_scale, self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`; a view where it is stored so."""
        if self.weight_packed is not None:
            assert self.weight_scale is not None
            return ops.dequantize_int4(self.weight_packed, self.weight_scale, dtype)
        assert self.weight is not None
        if self.weight_scale_inv is None:
            return self.weight.to(dtype)
        return ops.dequantize(self.weight, self.weight_scale_inv, dtype)

    def store_as(self, dtype: torch.dtype) -> None:
        """Replace the weight by an uninitialised one: of a float `dtype`, or of E4M3 with its scales."""
        device = self._stored().device.type
        scale = self._block_scales(device) if dtype == FP8 else None
        self.hold(torch.empty((self.outputs, self.inputs), dtype=dtype, device=device), scale)

    def store_int4(self, group_size: int) -> None:
        """Replace the weight by an uninitialised one of 4-bit groups; `group_size` divides the inputs."""
        assert self.inputs % group_size == 0
        device = self._stored().device.type
        packed = torch.empty((self.outputs, self.inputs // 8), dtype=torch.int32, device=device)
        scale = torch.empty((self.outputs, self.inputs // group_size), dtype=torch.bfloat16, device=device)
        self.hold_int4(packed, scale, torch.tensor((self.outputs, self.inputs), device=device))

    def hold(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """Take this weight in floats, or in E4M3 with its block scales, in place of the one there was."""
        self.weight, self.weight_scale_inv = _held(weight), _held(scale)
        if self.weight_packed is not None:
            self.weight_packed = self.weight_scale = self.weight_shape = None

    def hold_int4(self, packed: Tensor, scale: Tensor, shape: Tensor) -> None:
        """Take this weight of 4-bit groups in place of the one there was."""
        self.weight = self.weight_scale_inv = None
        self.weight_packed, self.weight_scale, self.weight_shape = _held(packed), _held(scale), _held(shape)

    def _stored(self) -> Tensor:
        stored = self.weight if self.weight is not None else self.weight_packed
        assert stored is not None
        return stored

    def _block_scales(self, device: str) -> nn.Parameter:
        return parameter((-(-self.outputs // 128), -(-self.inputs // 128)), torch.float32, device)


def _held(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


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
        out: Tensor = self.down_proj(self.activate(self.gate_proj(x), self.up_proj(x)))
        return out

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """What the down-projection multiplies."""
        return ops.swiglu(gate, up)


def linear_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype in which a layer's Linears are built: the official layout's; those in 4 bits change form later."""
    return FP8 if isinstance(config.quantization_config, QuantizationConfig) else DTYPES[config.torch_dtype]
