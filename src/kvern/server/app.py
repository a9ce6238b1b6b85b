"""The application: routes, one error envelope for everything, and the model's life from start to stop.

No page here points outside: the interactive documentation that FastAPI would serve from a CDN is off, and there are no
CORS headers, so other web pages cannot read from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvern.errors import BadRequestError, KvernError, NotFoundError
from kvern.llm import LLM
from kvern.server.generate import EngineWorker
from kvern.server.routes import router
from kvern.settings import ServeSettings
from kvern.wire.openai import ChatCompletionRequest, error_body

log = logging.getLogger(__name__)
REF = "#/components/schemas/{model}"


class MethodNotAllowedError(BadRequestError):
    """A route that exists, asked with a method it has not."""

    status = 405
    code = "method_not_allowed"


def create_app(
    load: Callable[[], LLM], settings: ServeSettings, loaded: Callable[[LLM | KvernError], None] = lambda _: None
) -> FastAPI:
    """Build the application. `load` runs in the background once the server is up; `loaded` then gets its result."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app.state.worker, loaded))
        yield
        await asyncio.to_thread(app.state.worker.stop)
        await asyncio.gather(loading, return_exceptions=True)

    app = FastAPI(title="Kvern", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.worker = EngineWorker(load)
    app.state.started = int(time.time())
    app.include_router(router)
    app.add_exception_handler(KvernError, _kvern_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _load(worker: EngineWorker, loaded: Callable[[LLM | KvernError], None]) -> None:
    try:
        await worker.start()
    except KvernError as error:
        loaded(error)
    except Exception as error:
        log.exception("the model could not be loaded")
        loaded(KvernError(f"the model could not be loaded: {error!r}"))
    else:
        loaded(worker.llm)


def _respond(error: KvernError, headers: dict[str, str] | None = None) -> Response:
    retry_after = getattr(error, "retry_after", None)
    extra = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(error_body(error).model_dump(), error.status, {**(headers or {}), **extra})


async def _kvern_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, KvernError)
    return _respond(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: an unknown route, a wrong method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _respond(NotFoundError(f"there is no route {request.method} {request.url.path}"))
    if error.status_code == 405:
        known = MethodNotAllowedError(f"{request.url.path} does not answer {request.method}")
        return _respond(known, dict(error.headers or {}))
    return _respond(BadRequestError(str(error.detail)))


async def _unexpected_error(_: Request, error: Exception) -> Response:
    """What nobody foresaw; uvicorn logs the traceback, the client learns only that it is not to blame."""
    return _respond(KvernError("an error inside the server"))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the request body that we read ourselves."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    body = ChatCompletionRequest.model_json_schema(ref_template=REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(body.pop("$defs"))
    schemas["ChatCompletionRequest"] = body
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return document
