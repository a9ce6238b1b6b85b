"""config.json of the V3 family as frozen dataclasses, and the well-known configurations by name. No torch."""

from kvern.config.model_config import MODEL_TYPES, ModelConfig, known_configurations, read_config_json
from kvern.config.quantization import Int4Config, Quantization, QuantizationConfig
from kvern.config.rope import RopeScaling, read_scaling

__all__ = [
    "MODEL_TYPES",
    "Int4Config",
    "ModelConfig",
    "Quantization",
    "QuantizationConfig",
    "RopeScaling",
    "known_configurations",
    "read_config_json",
    "read_scaling",
]
