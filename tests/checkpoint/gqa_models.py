"""Small random Llama and Qwen2 models, and the test's own view of them as sources of an import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2 tied, R=128": ("qwen2", {"num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True}),
    "llama untied": ("llama", {"num_key_value_heads": 4}),
    "llama tied, llama3 rope": (
        "llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama wide heads, R=256": ("llama", {"num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5}),
    "llama wide heads, ragged": ("llama", {"num_key_value_heads": 2, "head_dim": 36}),
    "llama all biases": ("llama", {"num_key_value_heads": 8, "attention_bias": True}),
    "llama yarn": ("llama", {"num_key_value_heads": 2, "rope_parameters": YARN}),
    "llama linear": ("llama", {"num_key_value_heads": 1, "rope_parameters": LINEAR}),
}


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A source model in fp32 with biases, norms and weights away from their defaults."""
    family, changes = MODELS[name]
    values = {**SMALL, **changes}
    generator = torch.Generator().manual_seed(seed)
    if family == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**values))
    else:
        model = LlamaForCausalLM(LlamaConfig(**values))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.1 * noise)
            elif parameter_name.endswith("bias"):
                parameter.copy_(3 * noise)
            else:
                parameter.copy_(0.09 * noise)
    return model.eval()


@dataclass(frozen=True)
class ModelSource:
    """A transformers model in memory as a `SourceModel`."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSource:
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        return cls(model.config.to_dict(), tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found.float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the largest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
