"""The latent cache of one sequence: kv_lora_rank + qk_rope_head_dim numbers a token and layer, 98 % under plain MHA.

Memory is reserved for the whole context and touched as it fills, so a long limit costs nothing until it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvern.config import ModelConfig
from kvern.model import ForwardBatch


class SequenceCache:
    """[layers, max_context, latent_dim] in `dtype`, for batches of one sequence."""

    def __init__(self, config: ModelConfig, max_context: int, dtype: torch.dtype) -> None:
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.rows = torch.empty(layers, max_context, config.latent_dim, dtype=dtype)

    def extend(self, layer: int, latent_TD: Tensor, batch: ForwardBatch) -> None:
        """Store the latents at the batch's positions."""
        first = int(batch.positions[0])
        self.rows[layer, first : first + len(latent_TD)] = latent_TD

    def context(self, layer: int, sequence: int, batch: ForwardBatch) -> Tensor:
        """[C, latent_dim] up to the batch's last position."""
        assert sequence == 0, "this cache holds one sequence"
        return self.rows[layer, : int(batch.positions[-1]) + 1]
