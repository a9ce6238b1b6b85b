"""Full fine-tuning of an exact import (a Llama or Qwen2 model in V3's form): masters without the import's delta.

An import multiplies the rows that make a latent by delta = 2^-24, which makes the latent norms linear
(`checkpoint.gqa`). A step of AdamW moves every number by about its rate, which is far more than a row scaled by 2^-24
holds: one step destroys the model. So while such a model trains
    rows and biases that make a latent are held divided by delta, exactly, for it is a power of two;
    a latent norm multiplies by its weight * delta / sqrt(eps), which is what it does up to 1e-8 (`ScaledNorm`);
    q_b_proj and kv_b_proj, zeros and ones that place heads, are fixed (`Selection`): the source has no such weights.
The fixed tensors are buffers, so no optimizer and no sharding sees them. `scaled_rows` says how a tensor is brought
back into the checkpoint's form. What it gives up: the training of what an import adds to its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from kvern import ops
from kvern.checkpoint.gqa import DELTA, LATENT_NORM_EPS
from kvern.config import ModelConfig
from kvern.model import Transformer
from kvern.model.attention import Attention
from kvern.model.linear import Linear, RMSNorm

LINEAR_NORM = math.sqrt(LATENT_NORM_EPS) / DELTA
"""The weight of an import's latent norm (16777), times what the softmax needs: an ordinary norm's is near 1."""

SCALED_NORM = "scaled_weight"
"""What a run calls the weight of a latent norm that it computes as a factor."""


class ScaledNorm(nn.Module):
    """A latent norm over rows without delta: a factor. It keeps the checkpoint's own weight [size], float32."""

    scaled_weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer(SCALED_NORM, weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., size] -> the same shape and dtype."""
        return (x.float() * (self.scaled_weight / LINEAR_NORM)).to(x.dtype)


class Selection(nn.Module):
    """y = x W^T with a fixed W [out, in] of zeros and ones, float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out] in x.dtype."""
        return ops.linear(x, self.weight, None, None)


def unscale(model: Transformer) -> bool:
    """Bring an import, whose parameters are float32, into the form that trains; False for any other model."""
    imports = imports_of(model)
    for attention in imports:
        rank = attention.config.kv_lora_rank
        _divide(attention.q_a_proj, slice(None))
        _divide(attention.kv_a_proj_with_mqa, slice(rank))
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            setattr(attention, name, ScaledNorm(getattr(attention, name).weight.data))
        for name in ("q_b_proj", "kv_b_proj"):
            _fix(attention, name)
    return bool(imports)


def imports_of(model: Transformer) -> list[Attention]:
    """The attention of every layer that is an exact import's."""
    return [module for module in model.modules() if isinstance(module, Attention) and is_import(module)]


def is_import(attention: Attention) -> bool:
    """Whether a layer's latents are scaled by delta: no part without rotation, and norms far from any trained one."""
    config = attention.config
    if config.qk_nope_head_dim or config.q_lora_rank is None:
        return False
    norms = (attention.q_a_layernorm, attention.kv_a_layernorm)
    return all(isinstance(norm, RMSNorm) and float(norm.weight.min()) > LINEAR_NORM / 4 for norm in norms)


def scaled_rows(name: str, config: ModelConfig) -> Iterator[tuple[slice, float]]:
    """Parts of an import's weight or bias `name`, by rows, and by what power of two a checkpoint multiplies each."""
    module = name.rpartition(".")[0]
    if module.endswith("self_attn.q_a_proj"):
        yield slice(None), DELTA
    elif module.endswith("self_attn.kv_a_proj_with_mqa"):
        yield slice(config.kv_lora_rank), DELTA
        yield slice(config.kv_lora_rank, None), 1.0
    else:
        yield slice(None), 1.0


def _divide(linear: Linear, rows: slice) -> None:
    assert linear.weight is not None
    linear.weight.data[rows] /= DELTA
    if linear.bias is not None:
        linear.bias.data[rows] /= DELTA


def _fix(attention: Attention, name: str) -> None:
    """Make a Linear of zeros and ones a `Selection`; one that was trained once stays trainable."""
    weight = getattr(attention, name).weight.data
    if bool(((weight == 0) | (weight == 1)).all()):
        setattr(attention, name, Selection(weight))
