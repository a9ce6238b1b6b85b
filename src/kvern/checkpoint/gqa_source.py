"""What a Llama- or Qwen2-family model is, and which of its relatives cannot become a V3 model.

Reads the Hugging Face config.json of the source into the few numbers that the import needs, and refuses by name every
field whose maths DeepSeek-V3 does not have (per-head norms, sliding windows, soft caps, partial rotary, experts).
Any static frequency scaling is reduced to what it is: one list of head_dim / 2 inverse frequencies, computed in float32
with transformers' formulas so that both round alike, and one factor on the scores.

Gives up: frequencies that depend on the length (dynamic NTK, longrope with two lists).
Sources: transformers 5.24 `modeling_rope_utils.py`; YaRN, arXiv 2309.00071; Llama 3.1 model card.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvern.config import read_scaling
from kvern.errors import ConfigError, UnsupportedModelError
from kvern.model.rope import inverse_frequencies as rotary_frequencies

FAMILIES = ("llama", "mistral", "qwen2")
"""`model_type`s whose layers are exactly RoPE + grouped-query attention + RMSNorm + SwiGLU."""

MAX_WIDTH = 1 << 20
"""Heads times head size beyond which a config is taken as damaged (the largest known model has 16,384)."""

_NOT_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_PER_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "chameleon", "cohere", "cohere2")

_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_qk_norm": (None, False),
    "qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "alibi": (None, False),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "attention_multiplier": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "scale_embedding": (None, False),
    "no_rope_layers": (None, []),
    "quantization_config": (None,),
}
"""Fields of config.json that change the maths, with the values under which they do not."""


class SourceModel(Protocol):
    """A model to import: its Hugging Face config, its tensors under Hugging Face names, its other files.

    Rows of q_proj and k_proj are in the half-split rope layout, as Hugging Face stores them. `files` holds what is
    copied beside the weights: tokenizer.json, tokenizer_config.json, generation_config.json.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def files(self) -> Mapping[str, bytes]: ...

    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class GQAShape:
    """A grouped-query model in numbers. `inv_freq` has head_dim / 2 entries; `score_factor` multiplies every score."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    tied_head: bool
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    inv_freq: tuple[float, ...]
    score_factor: float
    bos_token_id: int | None
    eos_token_id: tuple[int, ...]

    @property
    def latent_rank(self) -> int:
        """R = kv_heads * head_dim: the width of the values' latent, and of the keys that all heads share."""
        return self.kv_heads * self.head_dim

    @property
    def q_rank(self) -> int:
        return self.heads * self.head_dim


def read_shape(config: Mapping[str, Any]) -> GQAShape:
    """The numbers of a source config.json. Raises UnsupportedModelError, naming the field, when it cannot be exact."""
    refuse_unsupported(config)
    heads, kv_heads, head_dim = _heads(config)
    rope = _rope(config)
    inv_freq, attention_factor = inverse_frequencies(rope, head_dim, int(_need(config, "max_position_embeddings")))
    qwen = config["model_type"] == "qwen2"
    bias = bool(config.get("attention_bias", qwen))
    eos = config.get("eos_token_id")
    return GQAShape(
        vocab_size=int(_need(config, "vocab_size")),
        hidden_size=int(_need(config, "hidden_size")),
        intermediate_size=int(_need(config, "intermediate_size")),
        layers=int(_need(config, "num_hidden_layers")),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=qwen or bias,
        o_bias=bias and not qwen,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(_need(config, "max_position_embeddings")),
        rope_theta=float(rope["rope_theta"]),
        inv_freq=tuple(inv_freq.double().tolist()),
        score_factor=attention_factor**2,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a model that is not exactly a dense V3 model."""
    family = config.get("model_type")
    if family in _PER_HEAD_NORMS:
        raise _refusal("model_type", family, "it normalises queries and keys per head, which V3 attention cannot")
    if family not in FAMILIES:
        raise _refusal("model_type", family, f"importable are {', '.join(FAMILIES)}")
    for field, harmless in _ONLY.items():
        if field in config and config[field] not in harmless:
            raise _refusal(field, config[field], "V3 layers do not compute it")
    if _window_in_use(config):
        raise _refusal("sliding_window", config["sliding_window"], "V3 attention sees the whole context")


def _window_in_use(config: Mapping[str, Any]) -> bool:
    """Qwen2 configs name a window that `use_sliding_window: false` switches off; Mistral's is on when it is named."""
    window = config.get("sliding_window")
    if window is None or window >= config.get("max_position_embeddings", 0):
        return False
    if "layer_types" in config and config["layer_types"] is not None:
        return "sliding_attention" in config["layer_types"]
    if config["model_type"] == "mistral":
        return True
    return bool(config.get("use_sliding_window", False)) and (
        config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
    )


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    heads = int(_need(config, "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    if kv_heads < 1 or heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = int(config.get("head_dim") or int(_need(config, "hidden_size")) // heads)
    if not 0 < heads * head_dim <= MAX_WIDTH:
        raise ConfigError(f"{heads} heads of size {head_dim} cannot be right", param="num_attention_heads")
    if head_dim % 2:
        raise _refusal("head_dim", head_dim, "rotary pairs need an even head size")
    return heads, kv_heads, head_dim


def _need(config: Mapping[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ConfigError(f"config.json has no {field}", param=field)
    return config[field]


def _refusal(field: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot import a model with {field} = {value!r}: {reason}",
        hint="only models that are exactly a V3 model can be imported; serve this one with its own engine",
        param=field,
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (new) or `rope_scaling` + `rope_theta` (old) as one flat mapping with rope_type, rope_theta."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal("partial_rotary_factor", rope["partial_rotary_factor"], "V3 rotates whole rope slots")
    if not isinstance(rope["rope_theta"], int | float):
        raise _refusal("rope_parameters", rope, "frequencies per layer type are not V3's")
    return rope


def inverse_frequencies(rope: Mapping[str, Any], dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2] float32 and the factor on cos and sin, for any static `rope_type`."""
    kind, theta = rope["rope_type"], rope["rope_theta"]
    plain = rotary_frequencies(theta, dim, None)
    try:
        if kind == "default":
            return plain, 1.0
        if kind == "linear":
            return plain / rope["factor"], 1.0
        if kind == "llama3":
            return _llama3(plain, rope, rope.get("original_max_position_embeddings") or max_positions), 1.0
    except KeyError as missing:
        raise ConfigError(f"rope_scaling of type {kind} has no {missing.args[0]}", param="rope_scaling") from None
    if kind in ("yarn", "longrope"):
        keys = {key: value for key, value in rope.items() if key not in _NOT_SCALING}
        scaling = read_scaling(kind, keys, max_positions)
        return rotary_frequencies(theta, dim, scaling), scaling.rotation_factor
    raise _refusal("rope_scaling.rope_type", kind, "its frequencies are unknown here or change with the length")


def _llama3(plain: torch.Tensor, rope: Mapping[str, Any], original: int) -> torch.Tensor:
    """Divide the slow frequencies by `factor`, keep the fast ones, interpolate between (Llama 3.1)."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    slow, fast = wavelength > original / low, wavelength < original / high
    return torch.where(slow, plain / factor, torch.where(fast, plain, blended))
