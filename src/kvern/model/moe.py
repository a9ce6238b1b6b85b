"""DeepSeekMoE (report eq. 12-16): a sigmoid gate picks 8 of 256 experts a token, one shared expert sees every token.

    y = shared(x) + sum_k g_k expert_k(x),   g from `ops.route`

Experts are separate modules whose weights are mapped views of the checkpoint, so only those that a batch routes to are
ever read: a checkpoint may exceed memory. What it gives up here is the grouped product over all experts of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.config import ModelConfig
from kvern.model.linear import DTYPES, MLP, linear_dtype, parameter


class Gate(nn.Module):
    """Scores every expert in FP32; `e_score_correction_bias` steers the choice and never the weights (eq. 16)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config = config
        self.weight = parameter((config.n_routed_experts, config.hidden_size), DTYPES[config.torch_dtype], device)
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32, device=device)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [T, top_k] float32, experts [T, top_k] int64)."""
        config = self.config
        return ops.route(
            x_TE,
            self.weight,
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )


class MoE(nn.Module):
    """Gate, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        hidden, width, dtype = config.hidden_size, config.moe_intermediate_size, linear_dtype(config)
        self.gate = Gate(config, device)
        self.experts = nn.ModuleList(MLP(hidden, width, dtype, device) for _ in range(config.n_routed_experts))
        if config.n_shared_experts:
            self.shared_experts = MLP(hidden, width * config.n_shared_experts, dtype, device)

    def forward(self, x_TE: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; each expert runs once, over the tokens routed to it."""
        weights_TK, experts_TK = self.gate(x_TE)
        out_TE = torch.zeros_like(x_TE)
        flat = experts_TK.flatten()
        order = flat.argsort(stable=True)
        tokens = order // experts_TK.shape[1]
        used, counts = flat[order].unique_consecutive(return_counts=True)
        scaled = weights_TK.flatten()[order].to(x_TE.dtype)[:, None]
        first = 0
        for expert, count in zip(used.tolist(), counts.tolist(), strict=True):
            rows = slice(first, first + count)
            out_TE.index_add_(0, tokens[rows], self.experts[expert](x_TE[tokens[rows]]) * scaled[rows])
            first += count
        if hasattr(self, "shared_experts"):
            out_TE = out_TE + self.shared_experts(x_TE)
        return out_TE
