"""The lines of a batch: what an input line must be, and what an output line says.

in   {"custom_id", "method": "POST", "url", "body"}
out  {"id", "custom_id", "response": {"status_code", "request_id", "body"} | null, "error": {"code", "message"} | null}

A line of /v1/responses that does not say `store` is not stored: its answer is in the output file already.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvern.errors import BadRequestError, KvernError
from kvern.wire.reading import parse_object

MAX_ID = 512
RESPONSES = "/v1/responses"
KNOWN = ("custom_id", "method", "url", "body")


class LineError(KvernError):
    """What is wrong with a line; `code` is one of OpenAI's."""

    status = 400

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    custom_id: str
    body: dict[str, Any]


def parse_line(raw: bytes, endpoint: str, serves: Callable[[str], bool]) -> Line:
    """Read an input line. `serves` knows the names of models. Raises LineError."""
    try:
        fields = parse_object(raw)
    except BadRequestError as error:
        raise LineError("invalid_json_line", f"this line is no JSON object: {error.message}") from error
    for name in fields:
        if name not in KNOWN:
            raise LineError("unknown_parameter", f"unknown field {name!r}", name)
    for name in KNOWN:
        if fields.get(name) is None:
            raise LineError("missing_required_parameter", f"{name} is missing", name)
    custom_id = fields["custom_id"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID or not _is_unicode(custom_id):
        raise LineError("invalid_custom_id", f"custom_id must be a text of 1 to {MAX_ID} characters", "custom_id")
    if fields["method"] != "POST":
        raise LineError("invalid_method", f"method must be POST, not {fields['method']!r}", "method")
    if fields["url"] != endpoint:
        raise LineError("mismatched_endpoint", f"url must be the batch's endpoint {endpoint}", "url")
    return Line(custom_id, _body(fields["body"], serves))


def body_asked(raw: bytes, endpoint: str) -> dict[str, Any]:
    """The request of a line that was read before."""
    body: dict[str, Any] = json.loads(raw)["body"]
    return {**body, "store": False} if endpoint == RESPONSES and body.get("store") is None else body


def _body(body: Any, serves: Callable[[str], bool]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be an object", "body")
    model = body.get("model")
    if not isinstance(model, str):
        raise LineError("missing_required_parameter", "body.model is missing", "body.model")
    if not serves(model):
        raise LineError("model_not_found", f"there is no model {model!r}", "body.model")
    if body.get("stream"):
        raise LineError("invalid_body", "a batch does not stream", "body.stream")
    if body.get("background"):
        raise LineError("invalid_body", "a batch's answers are not background ones", "body.background")
    return body


def answer_line(row_id: str, custom_id: str, status: int, request_id: str, body: Any) -> bytes:
    """The line of a row that was answered, with whatever status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line({"id": row_id, "custom_id": custom_id, "response": response, "error": None})


def error_line(row_id: str, custom_id: str, code: str, message: str) -> bytes:
    """The line of a row that never had an answer."""
    return _line({"id": row_id, "custom_id": custom_id, "response": None, "error": {"code": code, "message": message}})


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
