"""The rope part of config.json, in both spellings: plain, YaRN and longrope; anything else is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvern.config.checks import is_whole, positive
from kvern.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of RoPE. `yarn` as in V3; `longrope` with one factor a frequency (imports use it).

    `mscale`, `mscale_all_dim`: YaRN's two attention factors. cos and sin are multiplied by
    m(mscale) / m(mscale_all_dim), the softmax scale by m(mscale_all_dim)^2, with m(x) = 0.1 x ln(factor) + 1.
    """

    type: Literal["yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def magnitude(self, mscale: float) -> float:
        """m(mscale) = 0.1 * mscale * ln(factor) + 1, and 1 without extension (transformers `yarn_get_mscale`)."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotation_factor(self) -> float:
        """The number that cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.type == "longrope":
            if self.factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)


def take_rope(data: dict[str, Any]) -> dict[str, Any]:
    """Take the rope keys of either spelling out of `data`; returns the fields rope_theta and rope_scaling."""
    parameters, scaling = data.pop("rope_parameters", None), data.pop("rope_scaling", None)
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name} must be an object, not {value!r}")
    raw = {**(scaling or {}), **(parameters or {})}
    theta = positive("rope_theta", raw.pop("rope_theta", None) or data.pop("rope_theta", None) or 10000.0)
    data.pop("rope_theta", None)
    kind = raw.pop("rope_type", None) or raw.pop("type", None) or "default"
    raw.pop("type", None)
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    return {"rope_theta": theta, "rope_scaling": read_scaling(kind, raw, data.get("max_position_embeddings"))}


def read_scaling(kind: str, raw: dict[str, Any], longest: Any) -> RopeScaling:
    """Check the keys of a `rope_scaling` of type `kind`; `longest` is max_position_embeddings, the default context."""
    if kind not in ("yarn", "longrope"):
        raise UnsupportedModelError(f"rope_scaling type {kind!r} is not supported", hint="supported: yarn, longrope")
    known = {f.name for f in fields(RopeScaling)} - {"type"}
    for key in raw.keys() - known:
        if not (key == "truncate" and raw[key] is True):
            raise UnsupportedModelError(f"rope_scaling.{key} is not supported")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items() if v is not None}
    values.pop("truncate", None)
    if values.get("short_factor") != values.get("long_factor"):
        raise UnsupportedModelError("rope_scaling.long_factor differs from short_factor, which is not supported")
    original: Any = values.setdefault("original_max_position_embeddings", longest)
    if not is_whole(original) or original <= 0:
        raise ConfigError("rope_scaling.original_max_position_embeddings must be a positive whole number")
    if "factor" not in values:
        values["factor"] = positive("max_position_embeddings", longest) / original
    for key, value in values.items():
        listed = key in ("short_factor", "long_factor")
        if listed and not isinstance(value, tuple):
            raise ConfigError(f"rope_scaling.{key} must be a list of numbers, not {value!r}")
        for number in value if listed else (value,):
            positive(f"rope_scaling.{key}", number, zero=key.startswith("mscale"))
    return RopeScaling(type="yarn" if kind == "yarn" else "longrope", **values)


def rope_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.type == "yarn":
        keys = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
    else:
        keys = ["factor", "original_max_position_embeddings", "short_factor", "long_factor"]
    out: dict[str, Any] = {"type": scaling.type}
    for key in keys:
        value = getattr(scaling, key)
        out[key] = list(value) if isinstance(value, tuple) else value
    if scaling.attention_factor is not None:
        out["attention_factor"] = scaling.attention_factor
    return out
