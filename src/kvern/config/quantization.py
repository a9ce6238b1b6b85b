"""The quantization_config part of config.json: the official 128x128 FP8 layout, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvern.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class QuantizationConfig:
    """The official FP8 layout: E4M3 weights with one FP32 `weight_scale_inv` for each 128x128 block."""

    weight_block_size: tuple[int, int] = (128, 128)
    fmt: str = "e4m3"
    quant_method: str = "fp8"
    activation_scheme: str = "dynamic"
    scale_fmt: str | None = None
    modules_to_not_convert: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether the Linear called `module` is stored in FP8 (entries match a full dotted name or its end)."""
        return not any(module == name or module.endswith("." + name) for name in self.modules_to_not_convert)


def read_quantization(raw: Any) -> QuantizationConfig | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("quant_method") != "fp8":
        method = raw.get("quant_method") if isinstance(raw, dict) else raw
        raise UnsupportedModelError(
            f"quantization_config.quant_method {method!r} is not supported", hint="supported: fp8"
        )
    if raw.get("weight_block_size") not in ([128, 128], (128, 128)):
        raise UnsupportedModelError("quantization_config.weight_block_size must be [128, 128]")
    if raw.get("fmt", "e4m3") != "e4m3" or raw.get("activation_scheme", "dynamic") != "dynamic":
        raise UnsupportedModelError("quantization_config: only fmt e4m3 with activation_scheme dynamic is supported")
    scale_fmt = raw.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0"):
        raise UnsupportedModelError(f"quantization_config.scale_fmt {scale_fmt!r} is not supported")
    kept = raw.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise ConfigError(f"quantization_config.modules_to_not_convert must be a list of names, not {kept!r}")
    return QuantizationConfig(scale_fmt=scale_fmt, modules_to_not_convert=tuple(kept))


def quantization_json(quantization: QuantizationConfig | None) -> dict[str, Any] | None:
    if quantization is None:
        return None
    out: dict[str, Any] = {
        "activation_scheme": quantization.activation_scheme,
        "fmt": quantization.fmt,
        "quant_method": quantization.quant_method,
        "weight_block_size": list(quantization.weight_block_size),
    }
    if quantization.scale_fmt:
        out["scale_fmt"] = quantization.scale_fmt
    if quantization.modules_to_not_convert:
        out["modules_to_not_convert"] = list(quantization.modules_to_not_convert)
    return out
