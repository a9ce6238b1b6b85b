"""OpenAI's batches, field for field: what creates one, and what it looks like."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field, StringConstraints

from kvern.errors import BadRequestError
from kvern.wire.fields import Strict, Text
from kvern.wire.files import ExpiresAfter
from kvern.wire.reading import drop_inert, parse_object, read

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
LONGEST_WINDOW = 30 * UNITS["d"]
MAX_LINES = 50_000
MAX_BATCHES = 100
"""Of one page."""

Key = Annotated[Text, StringConstraints(min_length=1, max_length=64)]
Value = Annotated[Text, StringConstraints(max_length=512)]


class BatchRequest(Strict):
    """The body of POST /v1/batches. `completion_window`: a number and s, m, h or d, up to 30 days."""

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    endpoint: Endpoint
    completion_window: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,7}[smhd]$")]
    metadata: dict[Key, Value] | None = Field(default=None, max_length=16)
    output_expires_after: ExpiresAfter | None = None

    @property
    def seconds(self) -> int:
        """The window."""
        return int(self.completion_window[:-1]) * UNITS[self.completion_window[-1]]


class BatchError(BaseModel):
    """What is wrong with a line of the input."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(BaseModel):
    """All that is wrong with the input."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    """Rows."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    """Tokens that the prefix cache held."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens of reasoning."""

    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens of all rows that have an answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(BaseModel):
    """A batch. `reused_requests` is ours: rows that an equal earlier request had answered."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    reused_requests: int


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def parse_batch_request(body: bytes) -> BatchRequest:
    """Read a body. Raises BadRequestError that names the field."""
    fields = drop_inert(parse_object(body), {})
    endpoint, window = fields.get("endpoint"), fields.get("completion_window")
    if isinstance(endpoint, str) and endpoint not in ENDPOINTS:
        raise BadRequestError(f"no batches for {endpoint!r}", hint=f"known: {', '.join(ENDPOINTS)}", param="endpoint")
    if isinstance(window, str) and not re.fullmatch(r"[1-9][0-9]{0,7}[smhd]", window):
        raise BadRequestError(f"{window!r} is no window", hint="24h, 90m, 7d", param="completion_window")
    request = read(BatchRequest, fields, {"output_expires_after": ExpiresAfter})
    if request.seconds > LONGEST_WINDOW:
        raise BadRequestError("a window has at most 30 days", param="completion_window")
    return request
