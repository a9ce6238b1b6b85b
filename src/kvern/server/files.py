"""The routes of OpenAI's files: uploads, and what batches write, which can be read while it grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from kvern.errors import BadRequestError, NotFoundError
from kvern.server.paging import choice, parameters, read_page
from kvern.server.state import owner_of, settings_of, store_of
from kvern.server.uploads import Form, read_form
from kvern.store import Store, batch_rows, batches, files
from kvern.store.files import CHUNK_BYTES, File
from kvern.wire import files as wire
from kvern.wire.answers import ErrorBody

FORM_BYTES = 64 * 2**10
"""Of an upload's form, beside the file."""

PURPOSES = ("batch", "batch_output", "user_data")
UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch", "user_data"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
LIST = parameters(
    purpose={"enum": list(PURPOSES)},
    limit={"type": "integer", "minimum": 1, "maximum": wire.MAX_FILES},
    order={"enum": ["asc", "desc"]},
    after={"type": "string"},
)
router = APIRouter(responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}})


class FileInUseError(BadRequestError):
    """A file that a batch has yet to read, or is still writing."""

    status = 409
    code = "file_in_use"


@router.post(
    "/v1/files",
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": UPLOAD}}}},
)
async def upload(request: Request) -> wire.FileObject:
    """Store a file: the input of a batch, or anything of the user's."""
    settings = settings_of(request)
    form = await read_form(request, settings.max_file_bytes + FORM_BYTES)
    try:
        return file_object(await asyncio.to_thread(_keep, store_of(request), owner_of(request), form))
    finally:
        await form.file.close()


@router.get("/v1/files", openapi_extra=LIST)
async def list_files(request: Request) -> wire.FileList:
    """The files, the newest first unless `order=asc`."""
    page = read_page(request, wire.MAX_FILES, wire.MAX_FILES, ("purpose", "order"))
    purpose = choice(request, "purpose", PURPOSES, "") if "purpose" in request.query_params else None
    newest = choice(request, "order", ("asc", "desc"), "desc") == "desc"
    owner = owner_of(request)

    def read() -> list[File]:
        with store_of(request).read() as connection:
            if page.after is not None:
                _found(files.get(connection, owner, page.after, _now()), page.after, "after")
            return files.page(
                connection, owner, _now(), purpose=purpose, after=page.after, limit=page.limit + 1, newest=newest
            )

    found = await asyncio.to_thread(read)
    data = [file_object(file) for file in found[: page.limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return wire.FileList(data=data, first_id=first, last_id=last, has_more=len(found) > page.limit)


@router.get("/v1/files/{file_id}")
async def retrieve(request: Request, file_id: str) -> wire.FileObject:
    """What is known of a file."""
    return file_object(await asyncio.to_thread(_get, request, file_id))


@router.get("/v1/files/{file_id}/content", response_class=Response, responses=CONTENT)
async def content(request: Request, file_id: str) -> Response:
    """A file's bytes. Of a batch that runs: the rows that have ended so far, in the order of the input."""
    file = await asyncio.to_thread(_get, request, file_id)
    return StreamingResponse(_parts(store_of(request), file), media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
async def delete(request: Request, file_id: str) -> wire.FileDeleted:
    """Forget a file for good."""

    def remove() -> None:
        with store_of(request).write() as connection:
            file = _found(files.get(connection, owner_of(request), file_id, _now()), file_id)
            if batches.reading(connection, file_id):
                raise FileInUseError(f"a batch still needs {file_id}", hint="cancel it, or wait for its end")
            batch_rows.remove_file(connection, file)

    await asyncio.to_thread(remove)
    return wire.FileDeleted(id=file_id)


def file_object(file: File) -> wire.FileObject:
    """A file as OpenAI shows it."""
    return wire.FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def _keep(store: Store, owner: str, form: Form) -> File:
    """Store an upload in one transaction."""
    said = wire.parse_upload(form.fields, form.file.filename or "")
    size = form.file.size or 0
    if size == 0:
        raise BadRequestError("the file is empty", param="file")
    lives = said.expires_after.seconds if said.expires_after else None
    now = _now()
    expires = None if lives is None else now + lives
    file = File(files.new_id(), owner, said.purpose, said.filename, size, now, expires)
    with store.write() as connection:
        files.add(connection, file)
        files.write(connection, file.id, _chunks(form))
    return file


def _chunks(form: Form) -> Iterator[bytes]:
    while data := form.file.file.read(CHUNK_BYTES):
        yield data


async def _parts(store: Store, file: File) -> AsyncGenerator[bytes]:
    """The content, a megabyte or a page of rows at a time."""
    place = 0
    while True:
        data, place = await asyncio.to_thread(_part, store, file, place)
        if data is None:
            return
        yield data


def _part(store: Store, file: File, place: int) -> tuple[bytes | None, int]:
    """The bytes from `place` on (a chunk's number, or the line that came last), and the next place."""
    with store.read() as connection:
        if file.batch_id is None:
            return files.chunk(connection, file.id, place), place + 1
        batch = batches.get(connection, file.batch_id)
        assert batch is not None, "batches are never deleted"
        part: batch_rows.Part = "output" if batch.output_file_id == file.id else "error"
        rows = batch_rows.results(connection, batch.id, [part], place)
        return (b"".join(text + b"\n" for _, text in rows), rows[-1][0]) if rows else (None, place)


def _get(request: Request, file_id: str) -> File:
    with store_of(request).read() as connection:
        return _found(files.get(connection, owner_of(request), file_id, _now()), file_id)


def _found(file: File | None, file_id: str, param: str = "file_id") -> File:
    if file is None:
        raise NotFoundError(f"there is no file {file_id!r}", param=param)
    return file


def _now() -> int:
    return int(time.time())
