"""The application: routes, one error envelope for everything, and the model's life from start to stop.

No page here points outside: the interactive documentation that FastAPI would serve from a CDN is off, and there are no
CORS headers, so other web pages cannot read from it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from kvern import __version__
from kvern.errors import BadRequestError, KvernError, NotFoundError, TryLaterError
from kvern.llm import LLM
from kvern.server import openapi
from kvern.server.generate import BUFFER, EngineHost
from kvern.server.metrics import Metrics
from kvern.server.request_id import HEADER, RequestId
from kvern.server.routes import Salt, one_tenant, router
from kvern.settings import ServeSettings
from kvern.store import Store
from kvern.store.database import default_path
from kvern.wire.answers import error_body

log = logging.getLogger(__name__)


class MethodNotAllowedError(BadRequestError):
    """A route that exists, asked with a method it has not."""

    status = 405
    code = "method_not_allowed"


def create_app(
    load: Callable[[], LLM],
    settings: ServeSettings,
    loaded: Callable[[LLM | KvernError], None] = lambda _: None,
    *,
    salt: Salt = one_tenant,
    buffer: int = BUFFER,
) -> FastAPI:
    """Build the application. `load` runs in the background once the server is up; `loaded` then gets its result.

    `salt` tells whose prefixes a request may share; `buffer` bounds the updates that wait for a slow reader. Raises
    ConfigError where the store of the settings can not be opened; it is closed when the application stops.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app.state.host, loaded))
        yield
        await app.state.host.stop()
        await asyncio.gather(loading, return_exceptions=True)
        app.state.store.close()

    app = FastAPI(title="Kvern", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.state.host = EngineHost(load, app.state.metrics, buffer=buffer)
    app.state.salt = salt
    app.state.store = Store(settings.store or default_path())
    app.state.started = int(time.time())
    app.include_router(router)
    app.add_middleware(RequestId)
    app.add_exception_handler(KvernError, _kvern_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.openapi = lambda: openapi.build(app)  # type: ignore[method-assign]
    return app


async def _load(host: EngineHost, loaded: Callable[[LLM | KvernError], None]) -> None:
    try:
        await host.start()
        loaded(host.llm)
    except KvernError as error:
        loaded(error)
    except Exception as error:
        log.exception("the model could not be loaded")
        loaded(KvernError(f"the model could not be loaded: {error!r}"))


def _respond(error: KvernError, headers: dict[str, str] | None = None) -> Response:
    extra = dict(headers or {})
    if isinstance(error, TryLaterError):
        extra["Retry-After"] = str(math.ceil(error.retry_after))
    return JSONResponse(error_body(error).model_dump(), error.status, extra)


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


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """What nobody foresaw; uvicorn logs the traceback, the client learns only that it is not to blame.

    This answer is made outside the middleware, so it carries the request's id by itself.
    """
    request_id = getattr(request.state, "request_id", "")
    log.error("request %s failed", request_id)
    return _respond(KvernError("an error inside the server"), {HEADER: request_id} if request_id else None)
