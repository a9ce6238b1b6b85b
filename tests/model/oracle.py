"""Random small V3 models, the same weights in transformers and in Kvern."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from kvern.config import ModelConfig, RopeScaling
from kvern.model import Transformer


def random_config(seed: int) -> ModelConfig:
    """A small configuration whose every architectural choice is drawn by `seed`."""
    draw = random.Random(seed)
    groups, kept = draw.choice([(1, 1), (4, 2), (4, 1), (2, 2), (8, 4)])
    rope = draw.choice([8, 16, 32])
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": draw.choice([48, 64]),
        "intermediate_size": draw.choice([96, 80]),
        "moe_intermediate_size": draw.choice([24, 32]),
        "num_hidden_layers": 3,
        "num_attention_heads": draw.choice([2, 3, 4]),
        "kv_lora_rank": draw.choice([16, 24, 32]),
        "q_lora_rank": draw.choice([None, 24, 32]),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": draw.choice([8, 16]),
        "v_head_dim": draw.choice([8, 16, 24]),
        "n_routed_experts": 16,
        "n_shared_experts": draw.choice([1, 2]),
        "num_experts_per_tok": draw.choice([2, 4]),
        "n_group": groups,
        "topk_group": kept,
        "first_k_dense_replace": draw.choice([0, 1, 2]),
        "norm_topk_prob": draw.choice([True, True, False]),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 2560,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_theta": draw.choice([10000.0, 50000.0]),
        "rope_scaling": _random_rope(draw, rope),
        "attention_bias": draw.choice([True, False]),
        "torch_dtype": "float32",
    }
    return ModelConfig(**values)


def _random_rope(draw: random.Random, size: int) -> RopeScaling | None:
    kind = draw.choice(["plain", "yarn", "yarn", "yarn-plain", "longrope"])
    if kind == "plain":
        return None
    if kind == "longrope":
        factors = tuple(1.0 + 3 * draw.random() for _ in range(size // 2))
        return RopeScaling("longrope", 4.0, 640, attention_factor=1.0, short_factor=factors, long_factor=factors)
    mscale = draw.choice([1.0, 0.707]) if kind == "yarn" else 0.0
    return RopeScaling("yarn", 40.0, 64, mscale=1.0 if mscale else 0.0, mscale_all_dim=mscale)


def transformers_model(config: ModelConfig, seed: int) -> DeepseekV3ForCausalLM:
    """transformers' model with weights 0.06 N(0, 1), norms 1 + 0.1 N(0, 1), gate bias 0.05 N(0, 1), in float32."""
    generator = torch.Generator().manual_seed(seed)
    model = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**{k: v for k, v in config.to_dict().items() if k not in ("architectures", "torch_dtype")}),
        attn_implementation="eager",
    ).float()
    fill(model, generator)
    return model.eval()


@torch.no_grad()
def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random values that exercise every parameter and buffer."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.1 * noise)
        elif "e_score_correction_bias" in name:
            tensor.copy_(0.05 * noise)
        elif name in dict(module.named_parameters()):
            tensor.copy_((1.0 if "embed" in name else 0.06) * noise)


def kvern_model(config: ModelConfig, oracle: DeepseekV3ForCausalLM, mtp: MtpModel | None = None) -> Transformer:
    """Kvern's model with the oracle's weights, under the checkpoint's names."""
    model = Transformer(config, device="cpu", mtp=mtp is not None)
    state = checkpoint_names(oracle.state_dict())
    if mtp is not None:
        index = config.num_hidden_layers
        for name, value in checkpoint_names(mtp.layers[0].state_dict()).items():
            official = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            state[f"model.layers.{index}.{official}"] = value
        state[f"model.layers.{index}.embed_tokens.weight"] = state["model.embed_tokens.weight"]
        state[f"model.layers.{index}.shared_head.head.weight"] = state["lm_head.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()


def checkpoint_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers stacks experts in memory; the checkpoint names each one."""
    out = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                out[f"{stem}{expert}.gate_proj.weight"], out[f"{stem}{expert}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                out[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down
        else:
            out[name] = value
    return out


def transformers_mtp(oracle: DeepseekV3ForCausalLM, seed: int) -> MtpModel:
    """transformers' MTP layer over the same model, with random weights."""
    mtp = MtpModel(oracle, num_mtp_layers=1).float()
    fill(mtp.layers, torch.Generator().manual_seed(seed))
    return mtp.eval()
