"""A real uvicorn on a free loopback port, in a thread, around any LLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from kvern.errors import KvernError
from kvern.llm import LLM
from kvern.server.app import create_app
from kvern.server.draining import DrainingServer
from kvern.server.generate import EngineHost
from kvern.settings import ServeSettings

LOAD_SECONDS = 60
"""A tiny model loads in less than one; a busy machine may take its time."""


@dataclass(frozen=True)
class Serving:
    url: str
    results: list[LLM | KvernError]
    host: EngineHost
    stop: Callable[[], None]
    """What SIGTERM does."""

    thread: threading.Thread


@contextmanager
def serving(
    load: Callable[[], LLM], *, wait: bool = True, settings: dict[str, Any] | None = None, **options: Any
) -> Iterator[Serving]:
    """Serve until the block ends; with `wait`, the block starts once the model is loaded (or failed to)."""
    results: list[LLM | KvernError] = []
    chosen = ServeSettings(**{"max_body_bytes": 4096, "shutdown_timeout": 5, **(settings or {})})
    app = create_app(load, chosen, results.append, **options)
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="on", timeout_graceful_shutdown=5)
    server = DrainingServer(config, app.state.host, chosen.shutdown_timeout)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started and (bool(results) or not wait), LOAD_SECONDS)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield Serving(url, results, app.state.host, lambda: server.handle_exit(15, None), thread)
    finally:
        if thread.is_alive() and not server.should_exit:
            server.handle_exit(15, None)
        thread.join(20)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Poll until the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
