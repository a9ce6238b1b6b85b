"""The routes of OpenAI's batches. They note what is to be done; `jobs.batch` does it."""

from __future__ import annotations

import asyncio
import secrets
import time

from fastapi import APIRouter, Request

from kvern.errors import BadRequestError, NotFoundError
from kvern.server.batching import Batching
from kvern.server.http import read_body
from kvern.server.paging import parameters, read_page
from kvern.server.routes import json_body
from kvern.server.state import host_of, owner_of, settings_of, store_of
from kvern.store import batches, files
from kvern.store.batches import Batch, Status
from kvern.wire import batches as wire
from kvern.wire.answers import ErrorBody

LIST = parameters(limit={"type": "integer", "minimum": 1, "maximum": wire.MAX_BATCHES}, after={"type": "string"})
DEFAULT_LIMIT = 20
router = APIRouter(responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})


@router.post("/v1/batches", openapi_extra=json_body("BatchRequest"))
async def create(request: Request) -> wire.BatchObject:
    """Have all requests of an uploaded file answered, beside what else is asked."""
    settings = settings_of(request)
    host = host_of(request)
    body = wire.parse_batch_request(await read_body(request, settings.max_body_bytes))
    batch = await asyncio.to_thread(_note, request, body, host.open().name)
    _batching(request).wake()
    return batch_object(batch)


@router.get("/v1/batches", openapi_extra=LIST)
async def list_batches(request: Request) -> wire.BatchList:
    """The batches, the newest first."""
    page, owner = read_page(request, DEFAULT_LIMIT, wire.MAX_BATCHES), owner_of(request)

    def read() -> list[Batch]:
        with store_of(request).read() as connection:
            if page.after is not None:
                _found(batches.get(connection, page.after, owner), page.after, "after")
            return batches.page(connection, owner, after=page.after, limit=page.limit + 1)

    found = await asyncio.to_thread(read)
    data = [batch_object(batch) for batch in found[: page.limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return wire.BatchList(data=data, first_id=first, last_id=last, has_more=len(found) > page.limit)


@router.get("/v1/batches/{batch_id}")
async def retrieve(request: Request, batch_id: str) -> wire.BatchObject:
    """How far a batch is."""

    def read() -> Batch:
        with store_of(request).read() as connection:
            return _found(batches.get(connection, batch_id, owner_of(request)), batch_id)

    return batch_object(await asyncio.to_thread(read))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(request: Request, batch_id: str) -> wire.BatchObject:
    """Stop a batch: what has an answer keeps it, the rest goes into the error file."""

    def change() -> Batch:
        with store_of(request).write() as connection:
            before = _found(batches.get(connection, batch_id, owner_of(request)), batch_id)
            open_still: tuple[Status, ...] = ("validating", "in_progress")
            if before.status in open_still:
                batches.move(connection, batch_id, open_still, "cancelling", int(time.time()))
            elif before.status not in ("cancelling", "cancelled"):
                raise BadRequestError(f"a batch that is {before.status} cannot be cancelled", param="batch_id")
            return _found(batches.get(connection, batch_id), batch_id)

    batch = await asyncio.to_thread(change)
    _batching(request).wake()
    return batch_object(batch)


def batch_object(batch: Batch) -> wire.BatchObject:
    """A batch as OpenAI shows it."""
    same = {name: getattr(batch, name) for name in wire.BatchObject.model_fields if hasattr(batch, name)}
    errors = None if batch.errors is None else wire.BatchErrors(data=[wire.BatchError(**one) for one in batch.errors])
    return wire.BatchObject(
        **{
            **same,
            "errors": errors,
            "metadata": batch.tags,
            "reused_requests": batch.reused,
            "request_counts": wire.RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
            "usage": wire.BatchUsage(
                input_tokens=batch.input_tokens,
                input_tokens_details=wire.InputTokensDetails(cached_tokens=batch.cached_tokens),
                output_tokens=batch.output_tokens,
                output_tokens_details=wire.OutputTokensDetails(reasoning_tokens=batch.reasoning_tokens),
                total_tokens=batch.input_tokens + batch.output_tokens,
            ),
        }
    )


def _note(request: Request, body: wire.BatchRequest, model: str) -> Batch:
    """Store a new batch. Raises BadRequestError, NotFoundError."""
    now, owner = int(time.time()), owner_of(request)
    lives = body.output_expires_after
    batch = Batch(
        id=f"batch_{secrets.token_hex(12)}",
        owner=owner,
        model=model,
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + body.seconds,
        tags=body.metadata,
        output_expires=None if lives is None else lives.seconds,
    )
    with store_of(request).write() as connection:
        file = files.get(connection, owner, body.input_file_id, now)
        if file is None:
            raise NotFoundError(f"there is no file {body.input_file_id!r}", param="input_file_id")
        if file.purpose != "batch":
            hint = "upload it with purpose batch"
            raise BadRequestError(f"{file.id} was uploaded for {file.purpose}", hint=hint, param="input_file_id")
        batches.add(connection, batch)
    return batch


def _found(batch: Batch | None, batch_id: str, param: str = "batch_id") -> Batch:
    if batch is None:
        raise NotFoundError(f"there is no batch {batch_id!r}", param=param)
    return batch


def _batching(request: Request) -> Batching:
    batching: Batching = request.app.state.batching
    return batching
