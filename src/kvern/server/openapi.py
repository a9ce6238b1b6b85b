"""/openapi.json: FastAPI's document, with the request bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from kvern.wire.anthropic import CountTokensRequest, MessagesRequest
from kvern.wire.batches import BatchRequest
from kvern.wire.chat import ChatCompletionRequest
from kvern.wire.completions import CompletionRequest
from kvern.wire.responses import ResponsesRequest
from kvern.wire.tokens import DetokenizeRequest, TokenizeRequest

REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    MessagesRequest,
    CountTokensRequest,
    BatchRequest,
    ResponsesRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def build(app: FastAPI) -> dict[str, Any]:
    """The document. Refusals are 4XX with the one envelope, so FastAPI's own 422 is left out."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for kind in BODIES:
        body = kind.model_json_schema(ref_template=REF)
        for name, schema in {**body.pop("$defs", {}), kind.__name__: body}.items():
            if schemas.setdefault(name, schema) != schema:
                raise RuntimeError(f"two models of the wire are called {name}")
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return document
