"""From the bytes of a body to a typed request, or to a refusal that names the field.

null is absent. A field of OpenAI's that Kvern does not compute is refused by name, never dropped, except where its
value asks for nothing (`tools: []`). Every refusal is a BadRequestError; `param` is the path (`messages.0.content`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from kvern.errors import BadRequestError
from kvern.settings import nearest
from kvern.wire.fields import SamplingFields

Inert = Mapping[str, tuple[Any, ...]]
Body = TypeVar("Body", bound=BaseModel)
Request = TypeVar("Request", bound=SamplingFields)
MAX_FIELDS = 2048
NO_FIELD = re.compile(r"\(.*\)|\[key\]")
"""Parts of pydantic's paths that are no field of the body: the forms of unions."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises BadRequestError for anything else, NaN and endless nesting included."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_bounded)
    except RecursionError as error:
        raise BadRequestError("the body is nested too deeply") from error
    except ValueError as error:  # malformed JSON, malformed UTF-8, integers beyond any use
        raise BadRequestError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError("the body must be a JSON object")
    return value


def drop_inert(fields: dict[str, Any], table: Inert, prefix: str = "") -> dict[str, Any]:
    """Drop nulls, and fields that ask for nothing; refuse those of the table that ask for something."""
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in table:
            kept[name] = value
        elif not any(_same(value, inert) for inert in table[name]):
            raise BadRequestError(f"{name} is not supported yet", param=f"{prefix}{name}")
    return kept


def read(kind: type[Body], fields: dict[str, Any], parts: Mapping[str, type[BaseModel]]) -> Body:
    """Read the fields. `parts`: the models of nested objects, for hints on misspelt names."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        _refuse(error, kind, parts)


def validate(kind: type[Request], fields: dict[str, Any], parts: Mapping[str, type[BaseModel]]) -> Request:
    """Read the fields of a dialect of OpenAI's, with what they say about streams."""
    request = read(kind, fields, parts)
    if request.stream_options is not None:
        if not request.stream:
            raise BadRequestError("stream_options needs stream: true", param="stream_options")
        if request.stream_options.include_obfuscation:
            param = "stream_options.include_obfuscation"
            raise BadRequestError("include_obfuscation is not supported yet", param=param)
    return request


def _bounded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Every unknown field would become an error of its own, at a kilobyte each."""
    if len(pairs) > MAX_FIELDS:
        raise BadRequestError(f"an object of the body has {len(pairs)} fields, and at most {MAX_FIELDS} are read")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _same(value: Any, inert: Any) -> bool:
    """Equality as JSON has it: 0 and 0.0 are one number, but false is not 0."""
    return isinstance(value, bool) == isinstance(inert, bool) and bool(value == inert)


def _refuse(error: ValidationError, kind: type[BaseModel], parts: Mapping[str, type[BaseModel]]) -> NoReturn:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [_shown(part) for index, part in enumerate(first["loc"]) if index == 0 or not NO_FIELD.fullmatch(str(part))]
    param = ".".join(path)
    if first["type"] == "extra_forbidden":
        hint = _did_you_mean(path[-1], parts.get(path[0], kind))
        raise BadRequestError(f"unknown field {param!r}", hint=hint, param=param) from error
    if first["type"] == "missing":
        raise BadRequestError(f"{param} is missing", param=param) from error
    message = first["msg"]
    raise BadRequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param) from error


def _shown(part: int | str) -> str:
    """A part of a path that can be sent back: short, and without half characters."""
    return str(part).encode(errors="backslashreplace").decode()[:256]


def _did_you_mean(name: str, model: type[BaseModel]) -> str | None:
    near = nearest(name, model.model_fields)
    return None if near is None else f"did you mean {near!r}?"
