"""What a configuration weighs: parameters, active parameters, checkpoint bytes, cache bytes a token. Closed forms.

    attention = h*q_lora + q_lora*H*(n+p) + h*(R+p) + R*H*(n+v) + H*v*h (+ norms)
    MoE layer = attention + (routed + shared) * 3*h*moe + gate;  active: top-k of the routed
    cache     = (R + p) numbers a token and layer, against 2*H*v for multi-head attention of the same heads

Without the MTP layers, as the report counts (671,026,419,200 for V3); those are given apart. "Active" counts the head
and not the embedding, which is a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvern.config import ModelConfig

BFLOAT16 = 2


@dataclass(frozen=True)
class Account:
    """Counts of parameters and bytes; caches in BF16."""

    parameters: int
    active_parameters: int
    mtp_parameters: int
    checkpoint_bytes: int
    latent_bytes_per_token: int
    mha_bytes_per_token: int

    def cache_bytes(self, tokens: int) -> int:
        """Latent cache of `tokens` tokens in BF16."""
        return tokens * self.latent_bytes_per_token


def account(config: ModelConfig) -> Account:
    """Count everything about `config`; checkpoint_bytes include the MTP layers and the FP8 scales."""
    layers = range(config.num_hidden_layers)
    ends = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    linear = sum(_layer_linears(config, layer) for layer in layers)
    rest = sum(_layer_rest(config, layer) for layer in layers)
    idle = sum(_idle_experts(config) for layer in layers if config.is_moe(layer))
    embedding = config.vocab_size * config.hidden_size
    per_layer = BFLOAT16 * config.num_hidden_layers
    return Account(
        parameters=linear + rest + ends,
        active_parameters=linear + rest + ends - idle - embedding,
        mtp_parameters=config.num_nextn_predict_layers * _mtp_layer(config),
        checkpoint_bytes=_checkpoint_bytes(config),
        latent_bytes_per_token=per_layer * config.latent_dim,
        mha_bytes_per_token=per_layer * config.num_attention_heads * 2 * config.v_head_dim,
    )


def _attention_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(outputs, inputs) of the attention's Linears."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    shapes = [
        (config.latent_dim, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]
    if config.q_lora_rank is None:
        return [(heads * config.qk_head_dim, hidden), *shapes]
    return [(config.q_lora_rank, hidden), (heads * config.qk_head_dim, config.q_lora_rank), *shapes]


def _mlp_shapes(hidden: int, width: int) -> list[tuple[int, int]]:
    return [(width, hidden), (width, hidden), (hidden, width)]


def _linear_shapes(config: ModelConfig, layer: int) -> list[tuple[int, int, int]]:
    """(how many, outputs, inputs) of every quantisable Linear of a layer."""
    hidden = config.hidden_size
    shapes = [(1, *shape) for shape in _attention_shapes(config)]
    if not config.is_moe(layer):
        return shapes + [(1, *shape) for shape in _mlp_shapes(hidden, config.intermediate_size)]
    width, shared = config.moe_intermediate_size, config.n_shared_experts or 0
    routed = config.n_routed_experts or 0
    shapes += [(routed, *shape) for shape in _mlp_shapes(hidden, width)]
    return shapes + [(1, *shape) for shape in _mlp_shapes(hidden, width * shared)]


def _layer_linears(config: ModelConfig, layer: int) -> int:
    return sum(count * rows * columns for count, rows, columns in _linear_shapes(config, layer))


def _layer_rest(config: ModelConfig, layer: int) -> int:
    """Norms, biases and the gate of a layer."""
    norms = 2 * config.hidden_size + config.kv_lora_rank + (config.q_lora_rank or 0)
    biases = 0
    if config.attention_bias:
        biases = config.latent_dim + config.hidden_size + (config.q_lora_rank or 0)
    gate = (config.n_routed_experts or 0) * (config.hidden_size + 1) if config.is_moe(layer) else 0
    return norms + biases + gate


def _idle_experts(config: ModelConfig) -> int:
    """Parameters of a MoE layer's experts that one token does not use."""
    idle = (config.n_routed_experts or 0) - config.num_experts_per_tok
    return idle * 3 * config.hidden_size * config.moe_intermediate_size


def _mtp_layer(config: ModelConfig) -> int:
    """Parameters that one MTP layer adds; its embedding and head are the main model's."""
    layer, hidden = config.num_hidden_layers, config.hidden_size
    return _layer_linears(config, layer) + _layer_rest(config, layer) + 2 * hidden * hidden + 3 * hidden


def _checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors in the official layout: FP8 Linears with FP32 scales, or all in torch_dtype."""
    plain = BFLOAT16 if config.torch_dtype == "bfloat16" else 4
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    copies = 2 * config.vocab_size * config.hidden_size
    floats = copies + config.hidden_size
    floats += config.num_nextn_predict_layers * (copies + 2 * config.hidden_size**2 + 3 * config.hidden_size)
    experts = sum(config.n_routed_experts or 0 for layer in layers if config.is_moe(layer))
    floats += sum(_layer_rest(config, layer) for layer in layers) - experts
    linears = sum(_linear_bytes(config, layer, plain) for layer in layers)
    return floats * plain + experts * 4 + linears


def _linear_bytes(config: ModelConfig, layer: int, plain: int) -> int:
    if config.quantization_config is None:
        return plain * _layer_linears(config, layer)
    shapes = _linear_shapes(config, layer)
    return sum(count * (rows * cols + 4 * -(-rows // 128) * -(-cols // 128)) for count, rows, cols in shapes)
