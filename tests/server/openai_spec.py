"""What OpenAI's own document says of a body: where it is wrong, and what it holds that the document does not know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

SPEC = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = SPEC["components"]["schemas"]
PLACE = "#/components/schemas/"
INSIDE = {
    "ListModelsResponse data[]": "Model",
    "ListFilesResponse data[]": "OpenAIFile",
    "ListBatchesResponse data[]": "Batch",
    "ResponseStreamEvent response": "Response",
}
"""What a schema holds at a path that has findings of its own."""


def findings(name: str, body: Any) -> dict[str, str]:
    """What is to be said of a body against a schema: by the schema's name and the path, without positions in lists."""
    schema = _branch(name, body)
    leaves = [leaf for error in _validator(schema).iter_errors(body) for leaf in _leaves(error)]
    found = {_path(leaf.absolute_path): leaf.message[:200] for leaf in leaves}
    found |= dict.fromkeys(_undeclared([schema], body, ""), "not declared")
    return {_key(name, path): said for path, said in found.items()}


def _key(name: str, path: str) -> str:
    for place, inner in INSIDE.items():
        if f"{name} {path}".startswith(f"{place}."):
            return f"{inner} {path[len(place) - len(name) :]}"
    return f"{name} {path}"


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """The errors behind an error; of alternatives those of the one that was meant: it fails deepest."""
    if not error.context:
        yield error
        return
    branches: dict[Any, list[ValidationError]] = {}
    for one in error.context:
        branches.setdefault(one.schema_path[0], []).append(one)
    meant = max(branches.values(), key=lambda errors: min(len(one.relative_path) for one in errors))
    for one in meant:
        yield from _leaves(one)


def _branch(name: str, body: Any) -> dict[str, Any]:
    """The schema; of a union over `type`, the member that the body says it is, so that what is wrong with it shows."""
    union = SCHEMAS[name].get("anyOf") or SCHEMAS[name].get("oneOf") or []
    for member in union:
        kinds = _resolved(member).get("properties", {}).get("type", {}).get("enum", [])
        if isinstance(body, dict) and body.get("type") in kinds:
            return _resolved(member)
    return {"$ref": PLACE + name}


def _validator(schema: Any) -> Draft202012Validator:
    return Draft202012Validator({"components": SPEC["components"], "allOf": [schema]})


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = SCHEMAS[schema["$ref"].removeprefix(PLACE)]
    return schema


def _path(parts: Iterable[Any]) -> str:
    return "".join("[]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _undeclared(schemas: Sequence[dict[str, Any]], value: Any, path: str) -> Iterator[str]:
    """The paths of fields that no schema for their object names. Objects that take any field are passed over."""
    parts = [part for schema in schemas for part in _parts(schema, value)]
    if isinstance(value, list):
        items = [part["items"] for part in parts if "items" in part]
        for one in value:
            yield from _undeclared(items, one, f"{path}[]")
    if not isinstance(value, dict) or not parts or any("additionalProperties" in part for part in parts):
        return
    for field, inner in value.items():
        known = [part["properties"][field] for part in parts if field in part.get("properties", {})]
        if known:
            yield from _undeclared(known, inner, f"{path}.{field}".removeprefix("."))
        elif any("properties" in part for part in parts):
            yield f"{path}.{field}".removeprefix(".")


def _parts(schema: dict[str, Any], value: Any) -> Iterator[dict[str, Any]]:
    """What a schema is made of; of alternatives those that fit, or all where none does."""
    schema = _resolved(schema)
    yield schema
    for part in schema.get("allOf", ()):
        yield from _parts(part, value)
    for union in ("anyOf", "oneOf"):
        members = schema.get(union, ())
        for part in [one for one in members if _validator(one).is_valid(value)] or members:
            yield from _parts(part, value)
