"""OpenAI's files, field for field: what an upload says beside its content, and what a file looks like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints

from kvern.errors import BadRequestError
from kvern.wire.fields import Strict, Text
from kvern.wire.reading import read

Purpose = Literal["batch", "user_data"]
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000
"""Seconds that a file may be told to live."""

MAX_FILES = 10_000
"""Of one page."""

FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
FileName = Annotated[Text, StringConstraints(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]


class ExpiresAfter(Strict):
    """When a file goes by itself."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)


class Upload(Strict):
    """What is said about a file that is uploaded."""

    purpose: Purpose
    filename: FileName
    expires_after: ExpiresAfter | None = None


class FileObject(BaseModel):
    """A file. `status` is OpenAI's, deprecated and still required; `expires_at` is left out where there is no end."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = Field(default=None, exclude_if=lambda value: value is None)
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def parse_upload(fields: dict[str, str], filename: str) -> Upload:
    """Read the form's fields. Raises BadRequestError that names one."""
    for name in fields:
        if name not in FIELDS:
            raise BadRequestError(f"unknown field {name!r}", hint=f"known: {', '.join(FIELDS)}", param=name)
    lives = {
        name: fields[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in fields
    }
    said: dict[str, object] = {"filename": filename, **{name: fields[name] for name in ("purpose",) if name in fields}}
    if lives:
        said["expires_after"] = {name: _number(value) if name == "seconds" else value for name, value in lives.items()}
    upload = read(Upload, said, {"expires_after": ExpiresAfter})
    if upload.purpose == "batch" and not filename.endswith(".jsonl"):
        raise BadRequestError("a file for a batch must be .jsonl", hint=f"not {filename!r}", param="file")
    return upload


def _number(text: str) -> object:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else text
