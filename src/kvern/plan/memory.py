"""What a configuration weighs: parameters, active parameters, checkpoint bytes, cache bytes a token. Closed forms.

    attention = h*q_lora + q_lora*H*(n+p) + h*(R+p) + R*H*(n+v) + H*v*h (+ norms)
    MoE layer = attention + (routed + shared) * 3*h*moe + gate;  active: top-k of the routed
    cache     = (R + p) numbers a token and layer, against 2*H*v for multi-head attention of the same heads;
                in FP8 R codes, R / 128 scales in FP32 and p numbers in BF16

Without the MTP layers, as the report counts (671,026,419,200 for V3); those are given apart. "Active" counts the head
and not the embedding, which is a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvern.config import Int4Config, ModelConfig

BFLOAT16 = 2
LATENT_BLOCK = 128
"""Numbers of a latent in an FP8 cache that share a scale."""


def latent8_bytes(rank: int, rope: int) -> int:
    """Bytes of a token's record in one layer of an FP8 cache (the layout: `ops.reference_latent8`)."""
    return rank + 4 * -(-rank // LATENT_BLOCK) + BFLOAT16 * rope


@dataclass(frozen=True)
class Account:
    """Counts of parameters and bytes; caches in BF16, but latent8 in FP8."""

    parameters: int
    active_parameters: int
    mtp_parameters: int
    checkpoint_bytes: int
    latent_bytes_per_token: int
    latent8_bytes_per_token: int
    mha_bytes_per_token: int

    def cache_bytes(self, tokens: int, *, fp8: bool = False) -> int:
        """Latent cache of `tokens` tokens in BF16 or FP8."""
        return tokens * (self.latent8_bytes_per_token if fp8 else self.latent_bytes_per_token)


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
        latent8_bytes_per_token=config.num_hidden_layers * latent8_bytes(config.kv_lora_rank, config.qk_rope_head_dim),
        mha_bytes_per_token=per_layer * config.num_attention_heads * 2 * config.v_head_dim,
    )


def active_mtp_parameters(config: ModelConfig) -> int:
    """Parameters of one MTP layer that a token uses, without embedding and head."""
    layer = config.num_hidden_layers
    return _mtp_layer(config) - (_idle_experts(config) if config.is_moe(layer) else 0)


@dataclass(frozen=True)
class _Linears:
    """`count` Linears of a layer with one shape; `name` is the module's within the layer, of the first where many."""

    name: str
    rows: int
    columns: int
    count: int = 1

    @property
    def numbers(self) -> int:
        return self.count * self.rows * self.columns


def _attention(config: ModelConfig) -> list[_Linears]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    linears = [
        _Linears("self_attn.kv_a_proj_with_mqa", config.latent_dim, hidden),
        _Linears("self_attn.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
        _Linears("self_attn.o_proj", hidden, heads * config.v_head_dim),
    ]
    if config.q_lora_rank is None:
        return [_Linears("self_attn.q_proj", heads * config.qk_head_dim, hidden), *linears]
    return [
        _Linears("self_attn.q_a_proj", config.q_lora_rank, hidden),
        _Linears("self_attn.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank),
        *linears,
    ]


def _mlp(prefix: str, hidden: int, width: int, count: int = 1) -> list[_Linears]:
    return [
        _Linears(f"{prefix}.gate_proj", width, hidden, count),
        _Linears(f"{prefix}.up_proj", width, hidden, count),
        _Linears(f"{prefix}.down_proj", hidden, width, count),
    ]


def _linears(config: ModelConfig, layer: int) -> list[_Linears]:
    """Every quantisable Linear of a layer."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    if not config.is_moe(layer):
        return _attention(config) + _mlp("mlp", hidden, config.intermediate_size)
    routed = _mlp("mlp.experts.0", hidden, width, config.n_routed_experts or 0)
    shared = _mlp("mlp.shared_experts", hidden, width * config.n_shared_experts) if config.n_shared_experts else []
    return _attention(config) + routed + shared


def _layer_linears(config: ModelConfig, layer: int) -> int:
    return sum(linears.numbers for linears in _linears(config, layer))


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
    """Bytes of all tensors as config.json describes them: Linears in FP8 or 4 bits with their scales, or plain."""
    plain = BFLOAT16 if config.torch_dtype == "bfloat16" else 4
    mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    layers = range(config.num_hidden_layers + len(mtp))
    embedding = config.vocab_size * config.hidden_size
    floats = embedding + config.hidden_size
    floats += len(mtp) * (embedding + 2 * config.hidden_size**2 + 3 * config.hidden_size)
    experts = sum(config.n_routed_experts or 0 for layer in layers if config.is_moe(layer))
    floats += sum(_layer_rest(config, layer) for layer in layers) - experts
    heads = ["lm_head", *(f"model.layers.{layer}.shared_head.head" for layer in mtp)]
    head = _Linears("", config.vocab_size, config.hidden_size)
    stored = sum(_stored_bytes(config, head, name, is_head=True) for name in heads)
    for layer in layers:
        prefix = f"model.layers.{layer}."
        stored += sum(_stored_bytes(config, linears, prefix + linears.name) for linears in _linears(config, layer))
    return floats * plain + experts * 4 + stored


def _stored_bytes(config: ModelConfig, linears: _Linears, module: str, *, is_head: bool = False) -> int:
    """Bytes of the weights and scales of Linears; the official FP8 layout keeps a head in floats."""
    quantization = config.quantization_config
    if isinstance(quantization, Int4Config):
        packed, fp8 = quantization.covers(module), quantization.is_fp8(module)
    else:
        packed, fp8 = False, quantization is not None and not is_head and quantization.covers(module)
    if packed:
        assert isinstance(quantization, Int4Config)
        groups = linears.rows * (linears.columns // quantization.group_size)
        return linears.numbers // 2 + linears.count * (BFLOAT16 * groups + 16)
    if fp8:
        blocks = -(-linears.rows // 128) * -(-linears.columns // 128)
        return linears.numbers + linears.count * 4 * blocks
    return linears.numbers * (BFLOAT16 if config.torch_dtype == "bfloat16" else 4)
