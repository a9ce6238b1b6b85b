"""What nano's configuration weighs, and the dense models it is compared with, worked out of the same file.

Both dense models keep attention, depth and MTP, and have one SwiGLU in each layer in the place of gate and experts:
`active` as wide as what one token passes through in nano, `total` as wide as everything that nano stores. Widths are
rounded up to a multiple of 16, in favour of the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvern.config import ModelConfig
from kvern.config.quantization import QuantizationConfig
from kvern.model import Transformer
from kvern.plan.memory import account

Dense = Literal["active", "total"]
EXPERT_KEYS = (
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
    *("norm_topk_prob", "routed_scaling_factor"),
)
MULTIPLE = 16


@dataclass(frozen=True)
class Weight:
    """Parameters, and bytes of the checkpoint in FP8 with MTP's copies of embedding and head."""

    total: int
    active: int
    with_mtp: int
    checkpoint_bytes: int


def dense(model: Mapping[str, Any], like: Dense) -> dict[str, Any]:
    """The [model] table of the dense model that goes with nano's."""
    layers, first = model["num_hidden_layers"], model["first_k_dense_replace"]
    experts = model["num_experts_per_tok"] if like == "active" else model["n_routed_experts"]
    width = (experts + model["n_shared_experts"]) * model["moe_intermediate_size"]
    gate = model["n_routed_experts"] / 3  # rows of its matrix, as columns of a SwiGLU's three
    mean = (first * model["intermediate_size"] + (layers - first) * (width + gate)) / layers
    kept = {key: value for key, value in model.items() if key not in EXPERT_KEYS}
    return {**kept, "first_k_dense_replace": layers, "intermediate_size": -int(-mean // MULTIPLE) * MULTIPLE}


def weigh(model: Mapping[str, Any]) -> Weight:
    """Counted on the meta device, name by name, and by `kvern.plan`, which must agree."""
    config = ModelConfig.from_dict({"model_type": "deepseek_v3", **model})
    counted = account(replace(config, quantization_config=QuantizationConfig()))
    built = Transformer(config, device="meta")
    copies = 2 * config.vocab_size * config.hidden_size * config.num_nextn_predict_layers
    with_mtp = sum(parameter.numel() for parameter in built.parameters()) - copies
    return Weight(counted.parameters, counted.active_parameters, with_mtp, counted.checkpoint_bytes)
