"""The quantization_config part of config.json: the official 128x128 FP8 layout, 4-bit groups, or none.

4-bit weights are described as compressed-tensors does (quant_method `compressed-tensors`, format `pack-quantized`), so
that other engines load the same files; a head in FP8 beside them makes the format `mixed-precision`. What it gives up:
every other scheme of compressed-tensors (activations, zero points, other widths) is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from kvern.config.checks import is_whole
from kvern.errors import ConfigError, UnsupportedModelError

GROUP_SIZES = (32, 64, 128)
"""Columns that share a scale; 64 is read only because others write it."""


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


@dataclass(frozen=True)
class Int4Config:
    """4-bit weights, symmetric, one BF16 scale for each `group_size` columns of a row (compressed-tensors).

    Entries of `ignore` (floats) and `fp8_modules` (FP8 in 128x128 blocks) are full dotted names, or regular expressions
    after "re:" that match from the beginning of the name. Every other Linear is 4-bit.
    """

    group_size: int
    ignore: tuple[str, ...] = ("lm_head",)
    fp8_modules: tuple[str, ...] = ()
    quant_method: str = "compressed-tensors"

    def covers(self, module: str) -> bool:
        """Whether the Linear called `module` is stored in 4 bits."""
        return not any(_matches(module, entry) for entry in (*self.ignore, *self.fp8_modules))

    def is_fp8(self, module: str) -> bool:
        """Whether the Linear called `module` is stored in FP8."""
        return any(_matches(module, entry) for entry in self.fp8_modules)


Quantization = QuantizationConfig | Int4Config


def _matches(module: str, entry: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], module) is not None
    return module == entry


def read_quantization(raw: Any) -> Quantization | None:
    """The field's value as parsed JSON. Raises ConfigError or UnsupportedModelError naming what is not supported."""
    if raw is None:
        return None
    method = raw.get("quant_method") if isinstance(raw, dict) else raw
    if method == "compressed-tensors":
        return _read_int4(raw)
    if method != "fp8":
        raise UnsupportedModelError(
            f"quantization_config.quant_method {method!r} is not supported", hint="supported: fp8, compressed-tensors"
        )
    return _read_fp8(raw)


def _read_fp8(raw: dict[str, Any]) -> QuantizationConfig:
    if raw.get("weight_block_size") not in ([128, 128], (128, 128)):
        raise UnsupportedModelError("quantization_config.weight_block_size must be [128, 128]")
    if raw.get("fmt", "e4m3") != "e4m3" or raw.get("activation_scheme", "dynamic") != "dynamic":
        raise UnsupportedModelError("quantization_config: only fmt e4m3 with activation_scheme dynamic is supported")
    scale_fmt = raw.get("scale_fmt")
    if scale_fmt not in (None, "ue8m0"):
        raise UnsupportedModelError(f"quantization_config.scale_fmt {scale_fmt!r} is not supported")
    kept = _names(raw.get("modules_to_not_convert") or [], "modules_to_not_convert")
    return QuantizationConfig(scale_fmt=scale_fmt, modules_to_not_convert=kept)


def _read_int4(raw: dict[str, Any]) -> Int4Config:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError("quantization_config.config_groups must be an object of groups")
    _refuse_other("quantization_config", raw, _INT4_MODEL)
    group_size: int | None = None
    fp8_modules: list[str] = []
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        _refuse_other(where, group, {"input_activations": (None,), "output_activations": (None,)})
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise ConfigError(f"{where}.weights must be an object")
        if _is_fp8_blocks(group.get("format"), weights):
            fp8_modules += _names(group.get("targets"), f"config_groups.{name}.targets")
        elif group_size is None:
            group_size = _int4_group_size(where, group, group.get("format") or raw.get("format"), weights)
        else:
            raise UnsupportedModelError(f"{where}: a second group of 4-bit weights is not supported")
    if group_size is None:
        raise UnsupportedModelError("quantization_config has no group of 4-bit weights")
    return Int4Config(group_size, _names(raw.get("ignore") or [], "ignore"), tuple(fp8_modules))


_INT4_MODEL: dict[str, tuple[Any, ...]] = {
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
    "sparsity_config": (None, {}),
    "moe_sparsity_config": (None,),
}
_FP8_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True,),
    "strategy": ("block",),
    "block_structure": ([128, 128],),
    "dynamic": (False, None),
}
_INT4_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group",),
    "dynamic": (False, None),
    "actorder": (None, "weight", "static", False),
}


def _is_fp8_blocks(fmt: Any, weights: dict[str, Any]) -> bool:
    return fmt == "float-quantized" and all(weights.get(key) in allowed for key, allowed in _FP8_WEIGHTS.items())


def _int4_group_size(where: str, group: dict[str, Any], fmt: Any, weights: dict[str, Any]) -> int:
    if fmt != "pack-quantized":
        raise UnsupportedModelError(f"{where}: format {fmt!r} is not supported", hint="supported: pack-quantized")
    if group.get("targets") != ["Linear"]:
        raise UnsupportedModelError(f"{where}.targets must be ['Linear'], not {group.get('targets')!r}")
    _refuse_other(f"{where}.weights", weights, _INT4_WEIGHTS)
    size = weights.get("group_size")
    if not is_whole(size) or size not in GROUP_SIZES:
        raise UnsupportedModelError(
            f"{where}.weights.group_size {size!r} is not supported", hint=f"supported: {GROUP_SIZES}"
        )
    return int(size)


def _refuse_other(where: str, values: dict[str, Any], supported: dict[str, tuple[Any, ...]]) -> None:
    for key, allowed in supported.items():
        if values.get(key) not in allowed:
            raise UnsupportedModelError(
                f"{where}.{key} {values.get(key)!r} is not supported", hint=f"supported: {allowed[0]!r}"
            )


def _names(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"quantization_config.{field} must be a list of names, not {value!r}")
    for name in value:
        try:
            _matches("", name)
        except re.error as error:
            raise ConfigError(f"quantization_config.{field}: {name!r} is no regular expression ({error})") from None
    return tuple(value)


def quantization_json(quantization: Quantization | None) -> dict[str, Any] | None:
    """The field's value for config.json."""
    if quantization is None:
        return None
    if isinstance(quantization, Int4Config):
        return _int4_json(quantization)
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


def _int4_json(quantization: Int4Config) -> dict[str, Any]:
    groups = {"group_0": _group("pack-quantized", ["Linear"], _int4_weights(quantization.group_size))}
    if quantization.fp8_modules:
        groups["group_1"] = _group("float-quantized", list(quantization.fp8_modules), _fp8_weights())
    return {
        "quant_method": quantization.quant_method,
        "format": "mixed-precision" if quantization.fp8_modules else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(quantization.ignore),
        "kv_cache_scheme": None,
    }


def _group(fmt: str, targets: list[str], weights: dict[str, Any]) -> dict[str, Any]:
    unquantized = {"input_activations": None, "output_activations": None}
    return {"targets": targets, "weights": weights, **unquantized, "format": fmt}


def _int4_weights(group_size: int) -> dict[str, Any]:
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }


def _fp8_weights() -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "block",
        "block_structure": [128, 128],
        "dynamic": False,
    }
