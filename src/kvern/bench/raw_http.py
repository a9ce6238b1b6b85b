"""A small HTTP/1.1 client over asyncio streams: one request a connection, bodies as they arrive, server-sent events.

The parsers do no I/O: bytes in, whatever is complete out, however the bytes were cut. A general client spends more time
on an event than a small model's server does; this one leaves the cores to the server that is being measured. It gives
up what a benchmark does not need: redirects, compression, keep-alive, proxies, trailers.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from kvern.errors import BadRequestError, KvernError, UnreachableError

READ_BYTES = 1 << 16
HEAD_LIMIT = 1 << 16
"""Most bytes of a status line with its headers, and of the size line of a chunk."""


class ProtocolError(KvernError):
    """The server sent something that is not HTTP/1.1, or stopped in the middle."""

    status = 502
    code = "protocol_error"


@dataclass(frozen=True)
class Address:
    """A server: where to connect, and the path that precedes every route."""

    host: str
    port: int
    base: str
    tls: bool = False

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse http(s)://host[:port][/v1]. Raises BadRequestError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BadRequestError(f"{url!r} is no URL: {error}", param="url") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequestError(f"{url!r} is no URL", hint="an example: http://127.0.0.1:8000", param="url")
        tls = parts.scheme == "https"
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), base, tls)

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine, by name or by number; no name is looked up."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.base}"


class ResponseParser:
    """Status, headers and body of one response. `feed` returns the body bytes that became available."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.complete = False
        self._buffer = bytearray()
        self._left: int | None = None
        """Bytes left of the body, or of the chunk with the line end after it; None: a size line comes, or the end."""
        self._chunked = False
        self._last_chunk = False

    def feed(self, data: bytes) -> bytes:
        """Take what was received. Raises ProtocolError for anything that is not HTTP/1.1."""
        self._buffer += data
        if self.status is None and not self._head():
            return b""
        if self.complete:
            return b""
        return b"".join(self._chunks()) if self._chunked else self._plain()

    def end(self) -> None:
        """The server closed the connection: fine after the whole body, or where only the end delimits it."""
        if self.complete or (self.status is not None and not self._chunked and self._left is None):
            self.complete = True
            return
        raise ProtocolError("the connection ended before the response did")

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ProtocolError("the headers do not end")
            return False
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
            raise ProtocolError(f"not an HTTP response: {first[:80]!r}")
        if rest.startswith("1"):  # 100 Continue and its like precede the real one
            return self._head()
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked and "content-length" in self.headers:
            self._left = _size(self.headers["content-length"], 10)
        self.status = int(rest[:3])
        return True

    def _plain(self) -> bytes:
        take = len(self._buffer) if self._left is None else min(self._left, len(self._buffer))
        body = bytes(self._buffer[:take])
        del self._buffer[:take]
        if self._left is not None:
            self._left -= take
            self.complete = self._left == 0
        return body

    def _chunks(self) -> Iterator[bytes]:
        while not self.complete:
            if self._left is None and not self._chunk_starts():
                return
            assert self._left is not None
            take = min(max(self._left - 2, 0), len(self._buffer))
            if take:
                yield bytes(self._buffer[:take])
                del self._buffer[:take]
                self._left -= take
            if self._left > 2 or len(self._buffer) < 2:
                return
            if self._buffer[:2] != b"\r\n":
                raise ProtocolError("a chunk is longer than it says")
            del self._buffer[:2]
            self._left, self.complete = None, self._last_chunk

    def _chunk_starts(self) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT:
                raise ProtocolError("the size of a chunk does not end")
            return False
        size = _size(bytes(self._buffer[:end]).partition(b";")[0].decode("latin-1").strip(), 16)
        del self._buffer[: end + 2]
        self._left, self._last_chunk = size + 2, size == 0
        return True


def _size(text: str, base: int) -> int:
    try:
        if text.isalnum():
            return int(text, base)
    except ValueError:
        pass
    raise ProtocolError(f"{text[:40]!r} is no size")


@dataclass
class EventParser:
    """Server-sent events: `feed` returns the data of each event that became complete. Other fields are ignored."""

    _rest: bytearray = field(default_factory=bytearray)
    _data: list[str] = field(default_factory=list)

    def feed(self, data: bytes) -> list[str]:
        """Lines end in LF, CR or CR LF; an empty line ends an event; a CR at the very end waits for its LF."""
        self._rest += data
        cut = max(self._rest.rfind(b"\n"), self._rest.rfind(b"\r", 0, max(len(self._rest) - 1, 0))) + 1
        whole = bytes(self._rest[:cut])
        del self._rest[:cut]
        events = []
        for line in whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events


@dataclass(frozen=True)
class Response:
    """A response whose body is still coming."""

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([part async for part in self.body])

    async def events(self) -> AsyncIterator[str]:
        """The data of each server-sent event, as it arrives."""
        parser = EventParser()
        async for part in self.body:
            for event in parser.feed(part):
                yield event


@asynccontextmanager
async def request(
    address: Address, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Response]:
    """Send one request (`body` as JSON) on a connection of its own. Leaving the block hangs up.

    Raises UnreachableError when nobody answers, ProtocolError when the answer breaks off.
    """
    context = ssl.create_default_context() if address.tls else None
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
    except OSError as error:
        raise UnreachableError(f"nobody answers at {address}: {error}", hint="is the server running?") from error
    try:
        writer.write(_request_bytes(address, method, path, body, headers or {}))
        parser = ResponseParser()
        first = b""
        while parser.status is None:
            first = parser.feed(await _receive(reader, parser))
        yield Response(parser.status, parser.headers, _body(reader, parser, first))
    finally:
        writer.transport.abort()


async def request_json(
    address: Address, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Send one request and return the JSON object that answers it. Raises KvernError for an error status."""
    async with request(address, method, path, body, headers) as response:
        text = await response.read()
    if response.status >= 400:
        raise KvernError(
            f"{address} answered {response.status} to {method} {path}: {text[:300].decode(errors='replace')}"
        )
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ProtocolError(f"{address} answered {path} with something else than a JSON object")
    return value


def _request_bytes(address: Address, method: str, path: str, body: object, headers: Mapping[str, str]) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    host = f"[{address.host}]" if ":" in address.host else address.host
    sent = {"Host": f"{host}:{address.port}", "Connection": "close", "Accept": "*/*", **headers}
    if body is not None:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    return f"{method} {address.base}{path} HTTP/1.1\r\n{lines}\r\n".encode() + content


async def _receive(reader: asyncio.StreamReader, parser: ResponseParser) -> bytes:
    try:
        data = await reader.read(READ_BYTES)
    except OSError as error:
        raise ProtocolError(f"the connection broke: {error}") from error
    if not data:
        parser.end()
    return data


async def _body(reader: asyncio.StreamReader, parser: ResponseParser, first: bytes) -> AsyncIterator[bytes]:
    if first:
        yield first
    while not parser.complete:
        data = await _receive(reader, parser)
        if part := parser.feed(data):
            yield part
