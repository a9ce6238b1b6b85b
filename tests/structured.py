"""A tiny random model with room for long answers, and random JSON schemas."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.tiny import text_files, tiny_config, tiny_model

from kvern.checkpoint.save import save_model

CONTEXT = 2048
NAMES = ("id", "name", "größe", "a b", 'quo"te', "path/x", "$x", "tags")
PATTERNS = ("^[a-c]{2,5}$", "^[0-9]{3}-[0-9]{2}$", "^(on|off)$", "[xyz]")
FORMATS = ("date", "date-time", "uuid", "ipv4", "time")


def write_long_checkpoint(folder: Path) -> Path:
    """A random model of one dense layer, which costs little, with a context of 2,048 tokens; returns its folder."""
    config = tiny_config(
        max_position_embeddings=CONTEXT,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        hidden_size=16,
        intermediate_size=16,
    )
    save_model(tiny_model(config), folder, config=config, files=text_files())
    return folder


def random_schema(seed: int) -> dict[str, Any]:
    """A schema whose values are an object, with at most three levels, and a recursive definition now and then."""
    rng = random.Random(seed)
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        node = {
            "type": "object",
            "properties": {"value": _scalar(rng), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        schema["$defs"] = {"node": node}
        schema["properties"]["list"] = {"$ref": "#/$defs/node"}
        schema["required"].append("list")
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_scalar] * 3 + ([_array, _object, _either] if depth else [])
    kind = rng.choice(kinds)
    return kind(rng) if kind is _scalar else kind(rng, depth - 1)  # type: ignore[call-arg]


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
    }
    rest = rng.random()
    if rest < 0.7:
        schema["additionalProperties"] = False
    elif rest < 0.85:
        schema["additionalProperties"] = _scalar(rng)
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if rng.random() < 0.3:
        return {**schema, "prefixItems": [_any(rng, depth), _scalar(rng)], "items": _scalar(rng)}
    return {**schema, "items": _any(rng, depth)}


def _either(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"allOf": [_object(rng, 0), {"description": "as it is"}]}
    return {"anyOf": [_any(rng, depth), _scalar(rng)]}


def _scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-200, 200)
    return rng.choice(
        [
            {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
            {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 12},
            {"type": "string", "format": rng.choice(FORMATS)},
            {"enum": [1, "one", None, True, [1, {"a": 2}], "zwölf"]},
            {"const": rng.choice(["x", 7, None, {"k": [1]}])},
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
            {"type": "integer", "exclusiveMinimum": low, "multipleOf": rng.choice([2, 5])},
            {"type": "number"},
            {"type": "number", "minimum": low / 4, "exclusiveMaximum": low / 4 + 1.5},
            {"type": "boolean"},
            {"type": ["null", "boolean"]},
        ]
    )
