"""Reads a form with one file, in bounded memory: what is over a megabyte waits in a temporary file."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from kvern.errors import BadRequestError
from kvern.server.http import BodyTooLargeError, MediaTypeError

FIELD_BYTES = 4096
MAX_FIELDS = 8


@dataclass(frozen=True)
class Form:
    """The fields that are text, and the file, which the reader closes."""

    fields: dict[str, str]
    file: UploadFile


async def read_form(request: Request, limit: int) -> Form:
    """Read a form of at most `limit` bytes. Raises MediaTypeError, BodyTooLargeError, BadRequestError."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise MediaTypeError("the body must be a form", hint="send the header Content-Type: multipart/form-data")
    parser = MultiPartParser(
        request.headers, _bounded(request, limit), max_files=1, max_fields=MAX_FIELDS, max_part_size=FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise BadRequestError(f"the form cannot be read: {error.message}") from error
    file = form.get("file")
    if not isinstance(file, UploadFile):
        await form.close()
        raise BadRequestError("file is missing", hint="a part of the form, with a filename", param="file")
    return Form({name: value for name, value in form.multi_items() if isinstance(value, str)}, file)


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes]:
    total = 0
    async for part in request.stream():
        total += len(part)
        if total > limit:
            raise BodyTooLargeError(f"the upload is larger than {limit} bytes", hint="see --max-file-bytes")
        yield part
