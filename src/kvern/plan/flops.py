"""Model FLOPs of a training step, counted from the configuration.

    FLOPs = 6 * (weights that a token is multiplied with) * tokens + 6 * layers * heads * (qk + v sizes) * pairs

Forward and backward; a pair is a query and a key of one document, the key not later. Embedding look-ups and norms count
nothing, recomputation neither: it is work of the machine's, not the model's. MTP counts, with its second use of the
head. Source: the PaLM report's appendix B, with causal attention counted as it is.
"""

from __future__ import annotations

from kvern.config import ModelConfig


def step_flops(config: ModelConfig, tokens: float, pairs: float) -> float:
    """FLOPs of a step over `tokens`, whose documents have `pairs` of a query and an earlier or equal key."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    per_pair = layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6.0 * (active_weights(config) * tokens + per_pair * pairs)


def active_weights(config: ModelConfig) -> int:
    """Weights that one token is multiplied with, in products of matrices."""
    hidden, count = config.hidden_size, config.num_hidden_layers
    head = hidden * config.vocab_size
    layers = sum(_layer(config, layer) for layer in range(count))
    mtp = config.num_nextn_predict_layers * (_layer(config, count) + 2 * hidden * hidden + head)
    return layers + head + mtp


def _layer(config: ModelConfig, layer: int) -> int:
    hidden = config.hidden_size
    if not config.is_moe(layer):
        return _attention(config) + 3 * hidden * config.intermediate_size
    experts = config.num_experts_per_tok + (config.n_shared_experts or 0)
    gate = hidden * (config.n_routed_experts or 0)
    return _attention(config) + 3 * hidden * config.moe_intermediate_size * experts + gate


def _attention(config: ModelConfig) -> int:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    down = config.q_lora_rank
    query = hidden * queries if down is None else (hidden + queries) * down
    expanded = rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + hidden * config.latent_dim + expanded + heads * config.v_head_dim * hidden
