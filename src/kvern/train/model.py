"""A `Transformer` made trainable: gradients on, experts grouped, MTP's copies shared, the report's Linears in FP8.

Parameters are the FP32 masters; `activation_dtype` is what flows between layers, and what products outside FP8 are
computed in. In higher precision stay the embedding, the head, MTP's eh_proj (BF16 in the official checkpoint, too),
gate, norms and the attention core. What it gives up: the absorbed form of attention, which reads kv_b_proj as a matrix.
Source: DeepSeek-V3 technical report, sections 3.3 and 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.errors import ConfigError
from kvern.model import Transformer
from kvern.model.linear import MLP, Linear
from kvern.model.mtp import MTPLayer
from kvern.ops import Codes, Fp8Recipe
from kvern.train.experts import group_experts

KEPT_PRECISE = ("lm_head", "head", "eh_proj")


class Fp8Linear(Linear):
    """A Linear over the same parameters that computes its three products in FP8."""

    def __init__(self, linear: Linear, recipe: Fp8Recipe) -> None:
        super().__init__(linear.inputs, linear.outputs, torch.float32, "meta")
        self.weight, self.bias, self.recipe = linear.weight, linear.bias, recipe

    def forward(self, x: Tensor, codes: Codes | None = None) -> Tensor:
        """x [.., in] -> [.., out] in x.dtype; codes: x in FP8, where it is there already."""
        assert self.weight is not None
        return ops.fp8_linear(x, self.weight, self.bias, self.recipe, codes)


class Fp8MLP(MLP):
    """An MLP over the same Linears, all in FP8, that quantises the input of gate and up once."""

    def __init__(self, mlp: MLP, recipe: Fp8Recipe) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj, self.recipe = mlp.gate_proj, mlp.up_proj, mlp.down_proj, recipe

    def forward(self, x: Tensor) -> Tensor:
        """x [.., hidden] -> [.., hidden]."""
        codes = ops.fp8_codes(x, self.recipe)
        out: Tensor = self.down_proj(self.activate(self.gate_proj(x, codes), self.up_proj(x, codes)))
        return out


class LossHead(Linear):
    """The head: logits, or with targets the sum of their cross entropies, for which no logits are kept."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.inputs, linear.outputs, torch.float32, "meta")
        self.weight = linear.weight

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [L, in] -> [L, out] in x.dtype; with targets [L] int64, negative ones ignored, a float32 scalar."""
        if targets is None:
            return super().forward(x)
        assert self.weight is not None
        return ops.linear_cross_entropy(x, self.weight, targets)


def make_trainable(model: Transformer, recipe: Fp8Recipe | None = None) -> None:
    """Prepare `model`, whose parameters are float32, for training: with Linears in FP8 where `recipe` is given.

    Names of parameters stay the checkpoint's, but for the routed experts (see `experts.checkpoint_state`). MTP layers
    get the main model's embedding and head, which the checkpoint stores as copies. Raises ConfigError where a weight is
    quantised or not float32.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            stored = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} is stored in {stored}, and training needs float32 masters",
                hint="build the model with torch_dtype float32 and without quantization_config",
            )
    model.lm_head = LossHead(model.lm_head)
    for layer in model.model.layers:
        if isinstance(layer, MTPLayer):
            layer.embed_tokens, layer.shared_head.head = model.model.embed_tokens, model.lm_head
    group_experts(model, recipe)
    if recipe is not None:
        _use_fp8(model, recipe)
    model.requires_grad_(True).train()


def _use_fp8(model: Transformer, recipe: Fp8Recipe) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and name not in KEPT_PRECISE:
                setattr(parent, name, Fp8Linear(child, recipe))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is MLP:
                setattr(parent, name, Fp8MLP(child, recipe))
