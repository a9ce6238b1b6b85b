"""Model FLOPs of a training step, counted from the configuration, and the peak they are compared with.

    FLOPs = 6 * (weights that a token is multiplied with) * tokens + 6 * layers * heads * (qk + v sizes) * pairs

Forward and backward; a pair is a query and a key of one document, the key not later. Embedding look-ups and norms count
nothing, recomputation neither: it is work of the machine's, not the model's. MTP counts, with its second use of the
head. Source: the PaLM report's appendix B, with causal attention counted as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kvern.config import ModelConfig

BF16_PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense BF16 FLOP/s of cards, from NVIDIA's data sheets (SXM)."""

MEASURED_SIZE, MEASURED_TIMES = 1024, 5


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one rank's device, and where the figure comes from."""

    flops: float
    source: str


def step_flops(config: ModelConfig, tokens: int, pairs: int) -> float:
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


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The device's dense peak: of a known card in BF16 from its data sheet, else that of a large product, measured."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for card, flops in BF16_PEAKS.items():
            if card in name:
                return Peak(flops, f"data sheet of {card}, dense BF16")
    shown = str(dtype).removeprefix("torch.")
    return Peak(_measured(device, dtype), f"measured: a product of {MEASURED_SIZE} x {MEASURED_SIZE} in {shown}")


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


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    numbers = torch.Generator().manual_seed(0)  # not the run's
    one = torch.randn(MEASURED_SIZE, MEASURED_SIZE, generator=numbers).to(device, dtype)
    best = float("inf")
    for _ in range(MEASURED_TIMES):
        begin = time.perf_counter()
        one @ one
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * MEASURED_SIZE**3 / best
