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

from fastapi import FastAPI

from kvern import __version__
from kvern.errors import KvernError
from kvern.llm import LLM
from kvern.server import batches, deepseek, files, messages, openapi, refusals, responses, tokens
from kvern.server.aliases import Aliases
from kvern.server.batching import Batching
from kvern.server.generate import BUFFER, EngineHost
from kvern.server.inside import with_owners
from kvern.server.metrics import Metrics
from kvern.server.request_id import RequestId
from kvern.server.routes import one_tenant, router
from kvern.server.running_responses import Responses
from kvern.server.state import Salt
from kvern.settings import ServeSettings
from kvern.store import Store
from kvern.store.database import default_path

log = logging.getLogger(__name__)


def create_app(
    load: Callable[[], LLM],
    settings: ServeSettings,
    loaded: Callable[[LLM | KvernError], None] = lambda _: None,
    *,
    salt: Salt = one_tenant,
    store: Store | None = None,
    buffer: int = BUFFER,
) -> FastAPI:
    """Build the application. `load` runs in the background once the server is up; `loaded` then gets its result.

    `salt` tells whose prefixes a request may share; `store` is used instead of the one that the settings name; `buffer`
    bounds the updates that wait for a slow reader. Raises ConfigError where the store can not be opened; it is closed
    when the application stops.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(app, loaded))
        app.state.responses.start()
        yield
        await app.state.batching.stopped()
        await app.state.responses.stop()
        await app.state.host.stop()
        await asyncio.gather(loading, return_exceptions=True)
        app.state.store.close()

    app = FastAPI(title="Kvern", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.state.host = EngineHost(load, app.state.metrics, buffer=buffer)
    app.state.batching = Batching()
    app.state.host.before_draining.append(app.state.batching.stop)
    app.state.salt = with_owners(salt)
    app.state.store = store or Store(settings.store or default_path())
    app.state.responses = Responses(app.state.store, settings.response_ttl)
    app.state.aliases = Aliases(settings.model_alias)
    app.state.started = int(time.time())
    for routes in (router, files.router, batches.router, responses.router, messages.router, tokens.router):
        app.include_router(routes)
    app.include_router(deepseek.router)
    app.add_middleware(RequestId)
    refusals.add_handlers(app)
    app.openapi = lambda: openapi.build(app)  # type: ignore[method-assign]
    return app


async def _load(app: FastAPI, loaded: Callable[[LLM | KvernError], None]) -> None:
    host: EngineHost = app.state.host
    try:
        await host.start()
        if app.state.settings.run_batches:
            app.state.batching.start(app, host.llm)
        loaded(host.llm)
    except KvernError as error:
        loaded(error)
    except Exception as error:
        log.exception("the model could not be loaded")
        loaded(KvernError(f"the model could not be loaded: {error!r}"))
