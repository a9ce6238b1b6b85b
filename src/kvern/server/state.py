"""What a route finds on the application: typed, and in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from fastapi import Request

from kvern.server.generate import EngineHost
from kvern.settings import ServeSettings
from kvern.store import Store

Salt: TypeAlias = Callable[[Request], bytes]
"""Whose prefixes a request may share: it is asked on the server's side, and no client can set it."""


def host_of(request: Request) -> EngineHost:
    """What runs the model."""
    host: EngineHost = request.app.state.host
    return host


def settings_of(request: Request) -> ServeSettings:
    """How the server was started."""
    settings: ServeSettings = request.app.state.settings
    return settings


def store_of(request: Request) -> Store:
    """Where files, batches and responses are."""
    store: Store = request.app.state.store
    return store


def salt_of(request: Request) -> bytes:
    """The tenant's salt."""
    salt: Salt = request.app.state.salt
    return salt(request)


def owner_of(request: Request) -> str:
    """Whose files, batches and responses a request may see: the tenant's, told by its salt."""
    return salt_of(request).hex()
