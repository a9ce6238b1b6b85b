"""One decoder layer: x += attention(norm(x)); x += feed-forward(norm(x)), the feed-forward dense or routed."""

from __future__ import annotations

from torch import Tensor, nn

from kvern.config import ModelConfig
from kvern.model.attention import Attention
from kvern.model.batch import ForwardBatch
from kvern.model.linear import DTYPES, MLP, RMSNorm, linear_dtype
from kvern.model.moe import MoE


class DecoderLayer(nn.Module):
    """Layer number `layer`; the first `first_k_dense_replace` have a dense feed-forward."""

    def __init__(self, config: ModelConfig, layer: int, device: str) -> None:
        super().__init__()
        norm = DTYPES[config.torch_dtype]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm, device)
        self.self_attn = Attention(config, layer, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, norm, device)
        if config.is_moe(layer):
            self.mlp: nn.Module = MoE(config, device)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, linear_dtype(config), device)

    def forward(self, x_TE: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        x_TE = x_TE + self.self_attn(self.input_layernorm(x_TE), rotation_TF, batch)
        out: Tensor = x_TE + self.mlp(self.post_attention_layernorm(x_TE))
        return out
