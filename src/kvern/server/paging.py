"""What lists are asked for in the query string, checked by name and range; unknown names are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from kvern.errors import BadRequestError


@dataclass(frozen=True)
class Page:
    """Up to `limit` objects behind the object `after`."""

    after: str | None
    limit: int


def read_page(request: Request, default: int, most: int, known: tuple[str, ...] = ()) -> Page:
    """Read `after` and `limit`; `known`: what else this route reads. Raises BadRequestError."""
    given = request.query_params
    for name in given:
        if name not in ("after", "limit", *known):
            raise BadRequestError(f"unknown parameter {name!r}", param=name)
    return Page(given.get("after"), _limit(given, default, most))


def choice(request: Request, name: str, values: tuple[str, ...], default: str) -> str:
    """A parameter that is one of `values`."""
    given = request.query_params.get(name, default)
    if given not in values:
        raise BadRequestError(f"{name} must be one of {', '.join(values)}", param=name)
    return given


def parameters(**kinds: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI of query parameters that a handler reads itself."""
    return {"parameters": [{"name": n, "in": "query", "required": False, "schema": s} for n, s in kinds.items()]}


def _limit(given: Mapping[str, str], default: int, most: int) -> int:
    text = given.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or not 1 <= int(text) <= most:
        raise BadRequestError(f"limit must be a number between 1 and {most}", param="limit")
    return int(text)
