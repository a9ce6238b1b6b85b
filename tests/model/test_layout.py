"""The 671B configuration on the meta device is the official checkpoint, name for name and byte for byte."""

from __future__ import annotations

import torch

from kvern.config import ModelConfig
from kvern.model import Transformer
from kvern.plan.memory import account

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32

OFFICIAL = {
    "model.embed_tokens.weight": ((129280, 7168), BF16),
    "lm_head.weight": ((129280, 7168), BF16),
    "model.norm.weight": ((7168,), BF16),
    "model.layers.0.mlp.gate_proj.weight": ((18432, 7168), FP8),
    "model.layers.3.self_attn.q_a_proj.weight": ((1536, 7168), FP8),
    "model.layers.3.self_attn.q_a_proj.weight_scale_inv": ((12, 56), F32),
    "model.layers.3.self_attn.q_b_proj.weight": ((24576, 1536), FP8),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), FP8),
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv": ((5, 56), F32),
    "model.layers.3.self_attn.kv_b_proj.weight": ((32768, 512), FP8),
    "model.layers.3.self_attn.o_proj.weight": ((7168, 16384), FP8),
    "model.layers.3.mlp.gate.weight": ((256, 7168), BF16),
    "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), F32),
    "model.layers.3.mlp.experts.255.down_proj.weight": ((7168, 2048), FP8),
    "model.layers.3.mlp.experts.255.down_proj.weight_scale_inv": ((56, 16), F32),
    "model.layers.3.mlp.shared_experts.up_proj.weight": ((2048, 7168), FP8),
    "model.layers.61.eh_proj.weight": ((7168, 14336), BF16),
    "model.layers.61.embed_tokens.weight": ((129280, 7168), BF16),
    "model.layers.61.shared_head.head.weight": ((129280, 7168), BF16),
    "model.layers.61.shared_head.norm.weight": ((7168,), BF16),
}


def test_names_shapes_dtypes_bytes_and_parameters_of_671b() -> None:
    config = ModelConfig.named("deepseek-v3")
    state = Transformer(config).state_dict()
    assert len(state) == 91_991
    assert sum(t.numel() * t.element_size() for t in state.values()) == 688_574_839_360
    for name, (shape, dtype) in OFFICIAL.items():
        assert (tuple(state[name].shape), state[name].dtype) == (shape, dtype), name
    main = [t.numel() for name, t in state.items() if ".layers.61." not in name and "scale_inv" not in name]
    assert sum(main) == 671_026_419_200 == account(config).parameters
