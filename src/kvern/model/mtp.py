"""Multi-Token Prediction (report eq. 21-25): one more layer that guesses the token after next.

    h' = eh_proj([enorm(Emb(t_{i+1})) ; hnorm(h_i)]) -> decoder layer -> shared_head.norm -> shared_head.head -> t_{i+2}

h is the main model's hidden state after `model.norm`. The layer's index is num_hidden_layers. The checkpoint stores
copies of the embedding and of the head here; they are the main model's, and this module uses them as they come.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvern.config import ModelConfig
from kvern.model.batch import ForwardBatch
from kvern.model.layer import DecoderLayer
from kvern.model.linear import DTYPES, Linear, RMSNorm, embedding


class SharedHead(nn.Module):
    """The norm and head that turn the MTP layer's output into logits."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        dtype = DTYPES[config.torch_dtype]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.head = Linear(config.hidden_size, config.vocab_size, dtype, device)


class MTPLayer(DecoderLayer):
    """A decoder layer over the joined embedding of the next token and hidden state of the current one."""

    def __init__(self, config: ModelConfig, layer: int, device: str) -> None:
        super().__init__(config, layer, device)
        dtype, hidden = DTYPES[config.torch_dtype], config.hidden_size
        self.embed_tokens = embedding(config, device)
        self.enorm = RMSNorm(hidden, config.rms_norm_eps, dtype, device)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps, dtype, device)
        self.eh_proj = Linear(2 * hidden, hidden, dtype, device)
        self.shared_head = SharedHead(config, device)

    def predict(self, hidden_TE: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """hidden [T, hidden] of tokens i and a batch of tokens i + 1 -> [T, hidden], ready for `shared_head.head`."""
        out: Tensor = self.shared_head.norm(self.states(hidden_TE, rotation_TF, batch))
        return out

    def states(self, hidden_TE: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """What `predict` gives, before `shared_head.norm`."""
        embedded = self.embed_tokens(batch.tokens).to(hidden_TE.dtype)
        joined = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden_TE)], dim=-1))
        out: Tensor = self(joined, rotation_TF, batch)
        return out
