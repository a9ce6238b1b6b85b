"""Cuts OpenAI's OpenAPI document down to the schemas of what our routes answer: `cut_openai_spec.py FULL [CUT]`.

FULL is `openapi.json` of github.com/openai/openai-openapi (MIT, see openai_spec.LICENSE), CUT is openai_spec.json
beside this file, a schema a line. Kept are the schemas in `ANSWERS` and all that they refer to, without what does not
validate: descriptions, examples, titles, defaults, vendors' extensions; of the requests, the names of their fields.
`nullable`, which OpenAPI 3.1 has no more and the document still uses, becomes JSON Schema; recursion in the words of
2019-09 (filters of file search) is left open.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ANSWERS = (
    "CreateChatCompletionResponse",
    "CreateChatCompletionStreamResponse",
    "CreateCompletionResponse",
    "ListModelsResponse",
    "Model",
    "OpenAIFile",
    "ListFilesResponse",
    "DeleteFileResponse",
    "Batch",
    "ListBatchesResponse",
    "Response",
    "ResponseStreamEvent",
    "ResponseItemList",
    "ErrorResponse",
)
REQUESTS = ("CreateChatCompletionRequest", "CreateCompletionRequest", "CreateResponse")
SAYS_NOTHING = (
    *("description", "example", "examples", "title", "default", "deprecated", "discriminator"),
    *("$recursiveRef", "$recursiveAnchor"),
)
PLACE = "#/components/schemas/"


def cut(full: dict[str, Any]) -> dict[str, Any]:
    """The document with only what the answers need, names in order."""
    schemas = full["components"]["schemas"]
    kept: dict[str, Any] = {}
    wanted = list(ANSWERS)
    while wanted:
        name = wanted.pop()
        if name not in kept:
            kept[name] = schema(schemas[name])
            wanted += references(kept[name])
    info = {"title": full["info"]["title"], "version": full["info"]["version"], "license": full["info"]["license"]}
    return {"openapi": full["openapi"], "info": info, "components": {"schemas": dict(sorted(kept.items()))}}


def fields(schemas: dict[str, Any], value: dict[str, Any]) -> set[str]:
    """The names of a request's fields."""
    if "$ref" in value:
        value = schemas[value["$ref"].removeprefix(PLACE)]
    inner = [part for key in ("allOf", "anyOf", "oneOf") for part in value.get(key, ())]
    return set(value.get("properties", ())).union(*(fields(schemas, part) for part in inner))


def schema(value: Any) -> Any:
    """A schema without what does not validate."""
    if not isinstance(value, dict):
        return [schema(one) for one in value] if isinstance(value, list) else value
    kept = {
        key: {name: schema(one) for name, one in inner.items()} if key == "properties" else schema(inner)
        for key, inner in value.items()
        if key not in SAYS_NOTHING and not key.startswith("x-")
    }
    return {"anyOf": [kept, {"type": "null"}]} if kept.pop("nullable", False) is True else kept


def references(value: Any) -> list[str]:
    """The names of schemas that a schema refers to."""
    if isinstance(value, list):
        return [name for one in value for name in references(one)]
    if not isinstance(value, dict):
        return []
    here = [value["$ref"].removeprefix(PLACE)] if isinstance(value.get("$ref"), str) else []
    return here + [name for one in value.values() for name in references(one)]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("openai_spec.json")
    full = json.loads(source.read_text(encoding="utf-8"))
    every = full["components"]["schemas"]
    spec = {"x-fields": {name: sorted(fields(every, every[name])) for name in REQUESTS}, **cut(full)}
    schemas = spec["components"].pop("schemas")
    lines = [f"{json.dumps(name)}: {json.dumps(one, separators=(',', ':'))}" for name, one in schemas.items()]
    head = json.dumps(spec).removesuffix("{}}")
    target.write_text(head + '{"schemas": {\n' + ",\n".join(lines) + "\n}}}\n", encoding="utf-8")
