"""What a client gets where it gets no answer: one error, in the envelope of the dialect that it speaks.

The dialect is known from the path, or from the header that every client of Anthropic's API sends; so errors that no
route raised (an unknown path, a wrong method, a fault) have the right envelope too.
"""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvern.errors import BadRequestError, KvernError, NotFoundError, TryLaterError
from kvern.server.request_id import HEADER
from kvern.wire.answers import error_body
from kvern.wire.anthropic_answers import anthropic_error_body

ANTHROPIC_HEADER = "anthropic-version"
ANTHROPIC_PATHS = ("/v1/messages", "/anthropic")
log = logging.getLogger(__name__)


class MethodNotAllowedError(BadRequestError):
    """A route that exists, asked with a method it has not."""

    status = 405
    code = "method_not_allowed"


def add_handlers(app: FastAPI) -> None:
    """Answer every error of the application in an envelope."""
    app.add_exception_handler(KvernError, _kvern_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


def speaks_anthropic(request: Request) -> bool:
    """Whether the client speaks Anthropic's dialect."""
    path = request.url.path
    return ANTHROPIC_HEADER in request.headers or any(
        path == known or path.startswith(f"{known}/") for known in ANTHROPIC_PATHS
    )


def refusal(request: Request, error: KvernError, headers: dict[str, str] | None = None) -> Response:
    """The response that says an error."""
    extra = dict(headers or {})
    if isinstance(error, TryLaterError):
        extra["Retry-After"] = str(math.ceil(error.retry_after))
    if speaks_anthropic(request):
        body = anthropic_error_body(error, getattr(request.state, "request_id", None)).model_dump()
    else:
        body = error_body(error).model_dump()
    return JSONResponse(body, error.status, extra)


async def _kvern_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvernError)
    return refusal(request, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: an unknown route, a wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return refusal(request, NotFoundError(f"there is no route {request.method} {request.url.path}"))
    if error.status_code == 405:
        known = MethodNotAllowedError(f"{request.url.path} does not answer {request.method}")
        return refusal(request, known, dict(error.headers or {}))
    return refusal(request, BadRequestError(str(error.detail)))


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """What nobody foresaw; uvicorn logs the traceback, the client learns only that it is not to blame.

    This answer is made outside the middleware, so it carries the request's id by itself.
    """
    request_id = getattr(request.state, "request_id", "")
    log.error("request %s failed", request_id)
    headers = {HEADER: request_id} if request_id else None
    return refusal(request, KvernError("an error inside the server"), headers)
