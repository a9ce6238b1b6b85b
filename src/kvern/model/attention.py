"""Multi-head Latent Attention (report eq. 1-11): a small latent is cached instead of keys and values.

    (c | kr) = x Wkva;  c = RMSNorm(c);  kr = RoPE(kr), shared by all heads       cache: 512 + 64 numbers a token
    q = RMSNorm(x Wqa) Wqb -> per head (q_nope | q_rope);  q_rope = RoPE(q_rope)
    expanded: (k_nope | v) = c Wkvb per head;   s = q_nope.k_nope + q_rope.kr;   o = softmax(s * scale) v
    absorbed: qa = q_nope Wuk;  s = qa.c + q_rope.kr;  o = (softmax(s * scale) c) Wuv^T;  Wkvb = (Wuk | Wuv) per head

Both give the same numbers. Expanded costs a pass of Wkvb over the whole context and little a query; absorbed nothing a
context row and 3.4x more a (query, row) pair at V3's sizes: `cheaper_form` counts and picks.

Shape letters: T tokens, C context rows, H heads, D latent_dim, R kv_lora_rank, P rope, N nope, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kvern import ops
from kvern.config import ModelConfig
from kvern.model.batch import BatchLatents, ForwardBatch, LatentCache, MLAForm
from kvern.model.linear import DTYPES, Linear, RMSNorm, linear_dtype

LATENT_EPS = 1e-6
"""Both latent norms use 1e-6 whatever rms_norm_eps says (DeepSeek's model.py and transformers agree)."""


class Attention(nn.Module):
    """One layer's MLA over the latents in `batch.cache`, or over the batch itself where there is no cache."""

    def __init__(self, config: ModelConfig, layer: int, device: str) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads = config.hidden_size, config.num_attention_heads
        dtype, norm = linear_dtype(config), DTYPES[config.torch_dtype]
        bias = norm if config.attention_bias else None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, dtype, device)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, dtype, device, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS, norm, device)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, dtype, device)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, dtype, device, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_EPS, norm, device)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype, device
        )
        self.o_proj = Linear(heads * config.v_head_dim, hidden, dtype, device, bias=bias)

    def forward(self, x_TE: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; stores the batch's latents in its cache."""
        attended = self.attend(self._query_latent(x_TE), self._latents(x_TE, rotation_TF), rotation_TF, batch)
        projected: Tensor = self.o_proj(attended)
        return projected

    def attend(self, query: Tensor, latent_TD: Tensor, rotation_TF: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, heads * V]: queries, keys and values made of latents, and attention between them.

        query: what `q_b_proj` (or `q_proj`) multiplies.
        """
        q_THN, q_THP = self._queries(query, rotation_TF)
        if batch.cache is None and batch.form is MLAForm.EXPANDED and torch.is_grad_enabled():
            return self._documents(q_THN, q_THP, latent_TD, batch).flatten(1)
        cache = batch.cache or BatchLatents()
        cache.extend(self.layer, latent_TD)
        absorbed, expanded = split_forms(self.config, batch)
        if not expanded:
            out_THV = self._absorbed(q_THN, q_THP, absorbed, cache, batch)
        else:
            out_THV = self._mixed(q_THN, q_THP, absorbed, expanded, cache, batch)
        return out_THV.flatten(1)

    def _documents(self, q_THN: Tensor, q_THP: Tensor, latent_TD: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, H, V] of whole documents, in training: keys and values of all of them in one product."""
        config = self.config
        c_TR, key_TP = torch.split(latent_TD, [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(c_TR).view(len(c_TR), config.num_attention_heads, -1)
        q_THK = torch.cat([q_THN, q_THP], dim=-1)
        return ops.document_attention(q_THK, kv, key_TP, batch.query_starts, config.softmax_scale)

    def _mixed(
        self,
        q_THN: Tensor,
        q_THP: Tensor,
        absorbed: Sequence[int],
        expanded: Sequence[int],
        cache: LatentCache,
        batch: ForwardBatch,
    ) -> Tensor:
        """[T, H, V]: the absorbed sequences together, the expanded ones one by one."""
        parts: dict[int, Tensor] = {}
        if absorbed:
            spans = [batch.span(sequence) for sequence in absorbed]
            rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
            together = self._absorbed(q_THN[rows], q_THP[rows], absorbed, cache, batch)
            counts = [span.stop - span.start for span in spans]
            parts |= zip(absorbed, torch.split(together, counts), strict=True)
        for sequence in expanded:
            span = batch.span(sequence)
            context_CD = cache.context(self.layer, sequence, span).to(q_THN.dtype)
            parts[sequence] = self._expanded(q_THN[span], q_THP[span], context_CD)
        return torch.cat([parts[sequence] for sequence in sorted(parts)])

    def _query_latent(self, x_TE: Tensor) -> Tensor:
        """[T, q_lora_rank], or x itself where queries have no latent."""
        if self.config.q_lora_rank is None:
            return x_TE
        latent: Tensor = self.q_a_layernorm(self.q_a_proj(x_TE))
        return latent

    def _queries(self, query: Tensor, rotation_TF: Tensor) -> tuple[Tensor, Tensor]:
        """(q_nope [T, H, N], rotated q_rope [T, H, P])."""
        config = self.config
        q = self.q_proj(query) if config.q_lora_rank is None else self.q_b_proj(query)
        q_THK = q.view(len(query), config.num_attention_heads, config.qk_head_dim)
        q_THN, q_THP = torch.split(q_THK, [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_THN, ops.apply_rope(q_THP, rotation_TF)

    def _latents(self, x_TE: Tensor, rotation_TF: Tensor) -> Tensor:
        """[T, D]: the normed latent and the rotated shared key of each token."""
        rank, rope = self.config.kv_lora_rank, self.config.qk_rope_head_dim
        c_TR, key_TP = torch.split(self.kv_a_proj_with_mqa(x_TE), [rank, rope], dim=-1)
        return torch.cat([self.kv_a_layernorm(c_TR), ops.apply_rope(key_TP, rotation_TF)], dim=-1)

    def _kv_b(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(Wuk [H, N, R], Wuv [H, V, R]) in `dtype`."""
        config = self.config
        weight = self.kv_b_proj.dense(dtype).view(config.num_attention_heads, -1, config.kv_lora_rank)
        nope, value = torch.split(weight, [config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return nope, value

    def _absorbed(
        self, q_THN: Tensor, q_THP: Tensor, sequences: Sequence[int], cache: LatentCache, batch: ForwardBatch
    ) -> Tensor:
        """[T, H, V] of `sequences`, attending in latent space."""
        key_HNR, value_HVR = self._kv_b(q_THN.dtype)
        q_THD = torch.cat([torch.einsum("thn,hnr->thr", q_THN, key_HNR), q_THP], dim=-1)
        rank, scale = self.config.kv_lora_rank, self.config.softmax_scale
        out_THR = cache.attend(self.layer, q_THD, sequences, batch, rank, scale)
        return torch.einsum("thr,hvr->thv", out_THR, value_HVR)

    def _expanded(self, q_THN: Tensor, q_THP: Tensor, context_CD: Tensor) -> Tensor:
        """[T, H, V], attending over keys and values rebuilt from the latents."""
        config = self.config
        c_CR, key_CP = torch.split(context_CD, [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        kv = self.kv_b_proj(c_CR).view(len(c_CR), config.num_attention_heads, -1)
        return ops.expanded_attention(torch.cat([q_THN, q_THP], dim=-1), kv, key_CP, config.softmax_scale)


def split_forms(config: ModelConfig, batch: ForwardBatch) -> tuple[Sequence[int], Sequence[int]]:
    """(sequences that attend absorbed, sequences that attend expanded)."""
    sequences = range(len(batch.query_starts) - 1)
    if batch.form is MLAForm.ABSORBED or (batch.form is None and batch.longest == 1):
        return sequences, ()
    if batch.form is MLAForm.EXPANDED:
        return (), sequences
    forms = [
        cheaper_form(config, last - first, context)
        for (first, last), context in zip(pairwise(batch.query_starts), batch.contexts, strict=True)
    ]
    return (
        [sequence for sequence in sequences if forms[sequence] is MLAForm.ABSORBED],
        [sequence for sequence in sequences if forms[sequence] is MLAForm.EXPANDED],
    )


def cheaper_form(config: ModelConfig, tokens: int, context: int) -> MLAForm:
    """The form with fewer multiplications for `tokens` queries over `context` rows (heads divide out)."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    nope_and_value = config.qk_nope_head_dim + config.v_head_dim
    expanded = context * rank * nope_and_value + tokens * context * (nope_and_value + rope)
    absorbed = tokens * rank * nope_and_value + tokens * context * (2 * rank + rope)
    return MLAForm.EXPANDED if expanded < absorbed else MLAForm.ABSORBED
