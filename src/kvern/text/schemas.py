"""JSON schemas as parts of grammars, and where in a schema lies what cannot be enforced.

llguidance says what it cannot do, not where. So the refusal looks for the place: from the root down, always into the
first part that fails by itself, each tried as `{"$ref": "#/$defs/root/..."}` beside the whole schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import llguidance

from kvern.errors import BadRequestError
from kvern.text.grammar import syntax_error

Schema: TypeAlias = Mapping[str, Any]

OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,40}"}
"""Between two parts of JSON: nothing, a space, or a line break with an indentation. No model can write it forever."""

ANY_OBJECT: Schema = {"type": "object"}
NAMED_PARTS = ("properties", "patternProperties", "$defs", "definitions")
LISTED_PARTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLE_PARTS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
ROOT = "/$defs/root"
UNKNOWN = " can not be enforced"
TRIALS = 500
"""Parts that are tried to find the place of a fault."""


def json_rule(schema: Schema) -> str:
    """A part of a grammar that derives the JSON values which match `schema`."""
    return "%json " + json.dumps({**schema, "x-guidance": OPTIONS})


def check_schema(schema: Schema, param: str) -> None:
    """Raise BadRequestError for a schema that cannot be enforced; its param is `param`, and the path in the schema."""
    fault = schema_fault(schema)
    if fault is not None:
        path, says = fault
        where = f" at {path}" if path else ""
        raise BadRequestError(f"the schema is not supported{where}: {says}", param=f"{param}{path}")


def schema_fault(schema: Schema) -> tuple[str, str] | None:
    """Where a schema holds what cannot be enforced, as a JSON pointer, and what that is; None for a schema that can."""
    says = _fault(schema)
    if says is None:
        return None
    return _Search(schema).deepest("", schema, says)


class _Search:
    """The deepest part of a schema that fails by itself."""

    def __init__(self, root: Schema) -> None:
        self._whole, self._root = root, _moved(root)
        self._left = TRIALS

    def deepest(self, path: str, part: Any, says: str) -> tuple[str, str]:
        if not isinstance(part, Mapping):
            return path, says
        for below, child in _parts(part):
            if self._left and (why := self._why(path + below)) is not None:
                return self.deepest(path + below, child, why)
        for name in part:
            if says.endswith(UNKNOWN) and f'"{name}"' in says:
                return f"{path}/{_escaped(name)}", says
        return self._keyword(path, part, says)

    def _keyword(self, path: str, part: Schema, says: str) -> tuple[str, str]:
        """The keyword without which the part would do."""
        for name in sorted(part, key="type".__eq__):
            rest = {key: value for key, value in part.items() if key != name}
            if self._left and _fault({"$defs": {"root": self._root}, **_moved(rest)}) is None:
                return self._followed(f"{path}/{_escaped(name)}", part[name], says)
            self._left = max(0, self._left - 1)
        return (f"{path}/$ref" if "$ref" in part else path), says

    def _followed(self, path: str, value: Any, says: str) -> tuple[str, str]:
        """A reference within the schema leads on to what it means."""
        target = _target(self._whole, value) if path.endswith("/$ref") else None
        if not isinstance(target, Mapping) or not self._left:
            return path, says
        self._left -= 1
        return self.deepest(value[1:], target, says)

    def _why(self, path: str) -> str | None:
        self._left -= 1
        return _fault({"$defs": {"root": self._root}, "$ref": f"#{ROOT}{path}"})


def _fault(schema: Schema) -> str | None:
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": OPTIONS}))
    except ValueError as error:
        return str(error)
    says = syntax_error(grammar)
    return None if says is None else _worded(says)


def _worded(says: str) -> str:
    if says.startswith("oneOf constraints"):
        return "oneOf can be enforced only where its parts exclude each other; use anyOf"
    unknown = says.removeprefix("Unimplemented keys: ")
    return says.replace(ROOT, "") if unknown == says else f"{unknown.strip('[]')}{UNKNOWN}"


def _parts(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas within a schema, each with its path."""
    for name in NAMED_PARTS:
        if isinstance(schema.get(name), Mapping):
            yield from ((f"/{name}/{_escaped(key)}", part) for key, part in schema[name].items())
    for name in LISTED_PARTS:
        if isinstance(schema.get(name), list):
            yield from ((f"/{name}/{index}", part) for index, part in enumerate(schema[name]))
    for name in SINGLE_PARTS:
        if isinstance(schema.get(name), Mapping):
            yield f"/{name}", schema[name]


def _target(root: Schema, reference: str) -> Any:
    """What a reference means, None if it leads nowhere in this schema."""
    value: Any = root
    for key in reference.split("/")[1:] if reference.startswith("#/") else [""]:
        plain = key.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list):
            value = value[int(plain)] if plain.isdecimal() and int(plain) < len(value) else None
        else:
            value = value.get(plain) if isinstance(value, Mapping) else None
    return value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _moved(value: Any) -> Any:
    """A schema whose references look for its root under #/$defs/root."""
    if isinstance(value, list):
        return [_moved(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    moved = {key: _moved(part) for key, part in value.items()}
    if isinstance(value.get("$ref"), str) and value["$ref"].startswith("#"):
        moved["$ref"] = f"#{ROOT}{value['$ref'][1:]}"
    return moved
