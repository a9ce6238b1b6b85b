"""DeepSeekMoE (report eq. 12-16): a sigmoid gate picks 8 of 256 experts a token, one shared expert sees every token.

    y = shared(x) + sum_k g_k expert_k(x),   g from `ops.route`

Experts see the tokens sorted by expert, each its own rows. Here they are separate modules whose weights are mapped
views of the checkpoint, so only those that a batch routes to are ever read: a checkpoint may exceed memory. What that
gives up is the grouped product over all experts of a batch, which training has (`train.experts`).
"""

from __future__ import annotations

from collections.abc import Sequence

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


class SeparateExperts(nn.ModuleList):
    """N MLPs, each with a module and weights of its own."""

    def forward(self, x_RE: Tensor, counts: Sequence[int]) -> Tensor:
        """x [R, hidden], sorted by expert, the first counts[0] of expert 0 -> [R, hidden]."""
        rows_of = torch.split(x_RE, list(counts))
        return torch.cat([expert(rows) for expert, rows in zip(self, rows_of, strict=True) if len(rows)] or [x_RE])


class MoE(nn.Module):
    """Gate, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        hidden, width, dtype = config.hidden_size, config.moe_intermediate_size, linear_dtype(config)
        self.gate = Gate(config, device)
        self.experts = SeparateExperts(MLP(hidden, width, dtype, device) for _ in range(config.n_routed_experts))
        if config.n_shared_experts:
            self.shared_experts = MLP(hidden, width * config.n_shared_experts, dtype, device)

    def forward(self, x_TE: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]; each expert runs once, over the tokens routed to it."""
        weights_TK, experts_TK = self.gate(x_TE)
        order_R = experts_TK.flatten().argsort(stable=True)
        counts = experts_TK.flatten().bincount(minlength=len(self.gate.weight)).tolist()
        rows_RE = self.experts(ops.expert_rows(x_TE, order_R, experts_TK.shape[1]), counts)
        out_TE = ops.combine_experts(rows_RE, weights_TK, order_R, counts)
        if hasattr(self, "shared_experts"):
            out_TE = out_TE + self.shared_experts(x_TE)
        return out_TE
