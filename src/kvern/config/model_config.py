"""ModelConfig: a V3-family `config.json`, field for field, and nothing that could silently change the maths.

Every key of the file falls into one of three classes: it is a field below; it must hold the one value that Kvern
computes (`REQUIRED`); or it is inert at inference (`INERT`). A key in none of them is refused by name, because ignoring
it could give wrong logits without a word. Reads `rope_scaling` + `rope_theta` (DeepSeek) and `rope_parameters`
(transformers 5), writes the former. What it gives up: configurations that need a `trust_remote_code` model.

Sources: DeepSeek-V3 `inference/configs/config_671B.json`, the hub's config.json of each family member, transformers'
DeepseekV3Config.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kvern.config.checks import is_whole, positive
from kvern.config.quantization import Quantization, quantization_json, read_quantization
from kvern.config.rope import RopeScaling, rope_json, take_rope
from kvern.errors import CheckpointError, ConfigError, NotFoundError, UnsupportedModelError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")

REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True, None),
    "pretraining_tp": (1, None),
    "attention_dropout": (0, None),
    "mlp_bias": (False, None),
    "mtp_hidden_states_first": (False, None),
}
"""Keys whose other values mean other maths."""

INERT = frozenset(
    {
        *("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype", "torch_dtype"),
        *("use_cache", "initializer_range", "output_router_logits", "output_attentions", "output_hidden_states"),
        *("aux_loss_alpha", "seq_aux", "ep_size", "pad_token_id", "return_dict", "is_encoder_decoder"),
        *("num_key_value_heads", "head_dim", "qk_head_dim"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "unsloth_fixed"),
    }
)
"""Keys that do not change what a forward pass computes (the head counts are checked, see `_check_heads`)."""

ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of one V3-family model; names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    moe_intermediate_size: int = 0
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization_config: Quantization | None = None
    model_type: str = field(default="deepseek_v3")

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def qk_head_dim(self) -> int:
        """Numbers in one head's query or key: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers that one token leaves in the cache of one layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-1/2, times m(mscale_all_dim)^2 under YaRN: 0.135234 for V3."""
        scale = 1 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling and self.rope_scaling.mscale_all_dim:
            scale *= self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` routes to experts; the MTP layers (index >= num_hidden_layers) do as well."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    @classmethod
    def load(cls, folder: Path | str) -> ModelConfig:
        """Read `folder`/config.json. Raises CheckpointError when it is missing or no JSON, ConfigError otherwise."""
        return cls.from_dict(read_config_json(folder))

    @classmethod
    def named(cls, name: str) -> ModelConfig:
        """A well-known configuration that ships with Kvern, by name: see `known_configurations`."""
        if name not in known_configurations():
            raise NotFoundError(
                f"no known configuration is called {name!r}", hint="known: " + ", ".join(known_configurations())
            )
        text = (resources.files("kvern") / "config" / "known" / f"{name}.json").read_text()
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Build from the parsed config.json; raises ConfigError or UnsupportedModelError naming the key."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not of the DeepSeek-V3 family",
                hint="`kvern convert` imports Llama and Qwen2 models (folders and GGUF files) exactly",
            )
        data = {ALIASES.get(key, key): value for key, value in raw.items()}
        rope = take_rope(data)
        quantization = read_quantization(data.pop("quantization_config", None))
        names = {f.name for f in fields(cls)}
        _refuse_other_maths({key: value for key, value in data.items() if key not in names})
        values = {key: _coerce(key, value) for key, value in data.items() if key in names and key != "torch_dtype"}
        missing = [f.name for f in fields(cls)[:9] if values.get(f.name) is None]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        _check_heads(raw)
        dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in ("bfloat16", "float32"):
            raise UnsupportedModelError(
                f"torch_dtype {dtype!r} is not supported", hint="V3 checkpoints are bfloat16, float32 or FP8"
            )
        defined = {key: value for key, value in values.items() if value is not None}
        return cls(**{**defined, **rope, "torch_dtype": dtype, "quantization_config": quantization})

    def to_dict(self) -> dict[str, Any]:
        """The complete config.json, which transformers' DeepseekV3Config reads as well."""
        out: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, tuple) else value
        out |= {key: allowed[0] for key, allowed in REQUIRED.items() if key in _WRITTEN}
        out["num_key_value_heads"] = self.num_attention_heads
        out["eos_token_id"] = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id) or None
        out["rope_scaling"] = rope_json(self.rope_scaling)
        out["quantization_config"] = quantization_json(self.quantization_config)
        return {key: value for key, value in out.items() if value is not None or key in _NULLABLE}


_WRITTEN = frozenset({"hidden_act", "scoring_func", "topk_method", "moe_layer_freq", "tie_word_embeddings"})


_NULLABLE = frozenset({"q_lora_rank", "rope_scaling", "bos_token_id", "eos_token_id"})
"""Keys whose absence transformers would fill with V3's value."""


def known_configurations() -> list[str]:
    """Names that `ModelConfig.named` takes."""
    folder = resources.files("kvern") / "config" / "known"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_config_json(folder: Path | str) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder of any model type."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("config.json is missing", file=folder) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot be read as JSON ({error})", file=path) from None
    if not isinstance(raw, dict):
        raise CheckpointError("is not a JSON object", file=path)
    return raw


def _coerce(key: str, value: Any) -> Any:
    """Check the JSON type of a field and bring it into the field's Python type."""
    if key == "eos_token_id":
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(is_whole(i) and i >= 0 for i in ids):
            raise ConfigError(f"eos_token_id must be an id or a list of ids, not {value!r}")
        return tuple(ids)
    if value is None or key == "model_type":
        return value
    if key in ("norm_topk_prob", "attention_bias"):
        if not isinstance(value, bool):
            raise ConfigError(f"{key} must be true or false, not {value!r}")
        return value
    if key in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
        return positive(key, value)
    if not is_whole(value) or value < 0:
        raise ConfigError(f"{key} must be a whole number, not {value!r}")
    return value


def _refuse_other_maths(rest: dict[str, Any]) -> None:
    for key, value in rest.items():
        if key in REQUIRED:
            if value not in REQUIRED[key]:
                raise UnsupportedModelError(
                    f"{key} = {value!r} is not supported", hint=f"supported: {REQUIRED[key][0]!r}"
                )
        elif key not in INERT and value is not None:
            raise UnsupportedModelError(
                f"config.json has the field {key!r}, which Kvern does not know and which could change the maths",
                hint="if it is inert, remove it from config.json",
            )


def _check_heads(raw: dict[str, Any]) -> None:
    """Derived counts that transformers writes must agree with what the architecture implies."""
    heads, nope, rope = raw["num_attention_heads"], raw["qk_nope_head_dim"], raw["qk_rope_head_dim"]
    implied = {"num_key_value_heads": heads, "head_dim": rope, "qk_head_dim": nope + rope}
    for key, expected in implied.items():
        if raw.get(key) not in (None, expected):
            raise UnsupportedModelError(f"{key} = {raw[key]!r} is not supported", hint=f"expected {expected}")


def _check_sizes(config: ModelConfig) -> None:
    positive = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads kv_lora_rank "
        "qk_rope_head_dim v_head_dim max_position_embeddings"
    )
    for name in positive.split():
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    if config.qk_rope_head_dim % 2:
        raise ConfigError(f"qk_rope_head_dim must be even, not {config.qk_rope_head_dim}")
    if config.n_routed_experts is not None and config.first_k_dense_replace < config.num_hidden_layers:
        _check_experts(config, config.n_routed_experts)
    scaling = config.rope_scaling
    if scaling and scaling.type == "longrope" and len(scaling.short_factor) != config.qk_rope_head_dim // 2:
        raise ConfigError(
            f"rope_scaling.short_factor has {len(scaling.short_factor)} entries, "
            f"qk_rope_head_dim needs {config.qk_rope_head_dim // 2}"
        )


def _check_experts(config: ModelConfig, experts: int) -> None:
    if experts <= 0 or config.n_group <= 0 or experts % config.n_group or experts // config.n_group < 2:
        raise ConfigError(
            f"n_routed_experts = {experts} does not split into n_group = {config.n_group} groups of 2 or more"
        )
    if not 0 < config.topk_group <= config.n_group:
        raise ConfigError(f"topk_group = {config.topk_group} must be between 1 and n_group = {config.n_group}")
    reachable = config.topk_group * (experts // config.n_group)
    if not 0 < config.num_experts_per_tok <= reachable:
        raise ConfigError(f"num_experts_per_tok = {config.num_experts_per_tok} must be between 1 and {reachable}")
    if config.moe_intermediate_size <= 0:
        raise ConfigError("moe_intermediate_size must be positive")
