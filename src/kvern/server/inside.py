"""Asks the application's own routes without a socket: a row of a batch takes the path of every other request.

So it gets the status and the body that its owner would have got over HTTP, whatever the route. Two things are not its
own to say: whose prefixes it shares (its batch's owner's; a client cannot write into the scope), and that all others go
first (`priority` is moved behind every interactive request).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.types import Message

from kvern.engine.request import BACKGROUND
from kvern.jobs.asking import Answer, Ask, Question

OWNER = "kvern.owner"
LAST_PRIORITY = 2**31 - 1


def with_owners(salt: Callable[[Request], bytes]) -> Callable[[Request], bytes]:
    """Whose prefixes a request may share: the owner's of a request from inside, else what `salt` says."""

    def owned(request: Request) -> bytes:
        owner: str | None = request.scope.get(OWNER)
        return salt(request) if owner is None else bytes.fromhex(owner)

    return owned


def inside(app: FastAPI) -> Ask:
    """What asks the routes of `app`. Cancelling the call cancels the request."""

    async def ask(question: Question) -> Answer:
        body, sent = _behind_all(question.body), False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                await asyncio.Event().wait()  # nobody hangs up
            sent = True
            return {"type": "http.request", "body": body}

        answer: dict[str, Any] = {"body": b""}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["headers"] = {name.lower().decode(): value.decode() for name, value in message["headers"]}
            else:
                answer["body"] += message.get("body", b"")

        await app(_scope(question, len(body)), receive, send)
        headers = answer["headers"]
        retry_after = headers.get("retry-after")
        seconds = None if retry_after is None else float(retry_after)
        return Answer(answer["status"], answer["body"], headers.get("x-request-id", ""), seconds)

    return ask


def _behind_all(body: bytes) -> bytes:
    fields = json.loads(body)
    given = fields.get("priority")
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        fields["priority"] = max(BACKGROUND, min(BACKGROUND + (given or 0), LAST_PRIORITY))
    return json.dumps(fields).encode()


def _scope(question: Question, length: int) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": question.url,
        "raw_path": question.url.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
        OWNER: question.owner,
    }
