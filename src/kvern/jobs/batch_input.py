"""Checks the input of a batch, every line of it, before any of them runs.

Either each line is a request that the batch's endpoint takes, and the rows have their places, or there is a list of
what is wrong, with the numbers of the lines. What is wrong inside a body (a field out of range, a prompt that is too
long) is that row's own failure, in the error file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvern.jobs.prefixes import arrange, key
from kvern.store.batch_rows import Row
from kvern.wire.batch_lines import Line, LineError, parse_line
from kvern.wire.batches import BatchError

MOST_ERRORS = 100


@dataclass(frozen=True)
class Limits:
    """Of one input."""

    lines: int
    line_bytes: int


def check(
    lines: Iterable[bytes], endpoint: str, serves: Callable[[str], bool], limits: Limits
) -> tuple[list[Row], list[BatchError]]:
    """The rows, without their requests (`with_requests` adds them), or what is wrong. Empty lines do not count."""
    ids: dict[str, int] = {}
    keys: list[str] = []
    errors: list[BatchError] = []
    for number, raw in _numbered(lines):
        if len(ids) + len(errors) >= limits.lines:
            errors.append(_error("too_many_lines", f"a batch has at most {limits.lines} lines", number))
            break
        try:
            line = _line(raw, endpoint, serves, limits)
            if line.custom_id in ids:
                first = ids[line.custom_id]
                raise LineError("duplicate_custom_id", f"custom_id is that of line {first} already", "custom_id")
            ids[line.custom_id] = number
            keys.append(key(line.body))
        except LineError as error:
            errors.append(_error(error.code, error.message, number, error.param))
    if not ids and not errors:
        errors.append(BatchError(code="empty_file", message="the input has no line"))
    if errors:
        return [], _bounded(errors)
    places = arrange(keys)
    return [
        Row(number, custom_id, place.rank, place.prefix, b"")
        for (custom_id, number), place in zip(ids.items(), places, strict=True)
    ], []


def with_requests(rows: Iterable[Row], lines: Iterable[bytes]) -> Iterator[Row]:
    """The rows with their lines, read a second time."""
    for row, (_, raw) in zip(rows, _numbered(lines), strict=True):
        yield Row(row.line, row.custom_id, row.rank, row.prefix, raw)


def _line(raw: bytes, endpoint: str, serves: Callable[[str], bool], limits: Limits) -> Line:
    if len(raw) > limits.line_bytes:
        raise LineError("line_too_long", f"the line has {len(raw)} bytes, and at most {limits.line_bytes} are read")
    return parse_line(raw, endpoint, serves)


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if raw.strip():
            yield number, raw


def _error(code: str, message: str, line: int, param: str | None = None) -> BatchError:
    return BatchError(code=code, message=message, line=line, param=param)


def _bounded(errors: list[BatchError]) -> list[BatchError]:
    if len(errors) <= MOST_ERRORS:
        return errors
    more = BatchError(code="more_errors", message=f"{len(errors) - MOST_ERRORS} more lines are wrong")
    return [*errors[:MOST_ERRORS], more]
