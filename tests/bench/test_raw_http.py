"""The raw client: any cut of the bytes gives the same response and the same events, and damage is named."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.bench.chat_server import Reply, answer, chat_server, chunk, event, head, piece, usage

from kvern.bench.raw_http import Address, EventParser, ProtocolError, ResponseParser, request, request_json
from kvern.errors import BadRequestError, KvernError, UnreachableError

EVENTS = [piece("déf"), piece("\n\n"), b": a comment\r\n\r\n", event("two\ndata: lines"), usage(3, 2), event("[DONE]")]
STREAM = b"".join(EVENTS)
DATA = [part.decode()[6:-2] for part in (EVENTS[0], EVENTS[1])] + ["two\nlines", EVENTS[4].decode()[6:-2], "[DONE]"]
CHUNKED = b"HTTP/1.1 100 Continue\r\n\r\n" + head("200 OK", "transfer-encoding: Chunked", "X-Id:  7 ")
CHUNKED += b"".join(chunk(part) for part in EVENTS) + b"5;ext=1\r\n\n\ndat\r\n" + chunk(b"a: x\n\n") + chunk(b"")


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[first:last] for first, last in pairwise(places)]


def parse(parts: Sequence[bytes]) -> tuple[ResponseParser, bytes, list[str]]:
    parser, events = ResponseParser(), EventParser()
    body, found = b"", []
    for part in parts:
        got = parser.feed(part)
        body += got
        found += events.feed(got)
    return parser, body, found


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cut_of_a_chunked_stream_gives_the_same_events(cuts: list[int]) -> None:
    parser, body, events = parse(pieces(CHUNKED, cuts))
    assert (parser.status, parser.headers["x-id"], parser.complete) == (200, "7", True)
    assert body == STREAM + b"\n\ndata: x\n\n"
    assert events == [*DATA, "x"]


def test_byte_by_byte() -> None:
    parser, _, events = parse([bytes([byte]) for byte in CHUNKED])
    assert parser.complete
    assert events == [*DATA, "x"]


@given(st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_every_line_end_of_events(cuts: list[int], end: bytes) -> None:
    stream = end.join([b"id: 1", b"data: one", b"data:two", b"", b"", b"data: three", b"", b":"])
    parser = EventParser()
    assert [one for part in pieces(stream, cuts) for one in parser.feed(part)] == ["one\ntwo", "three"]


@given(st.binary(max_size=60), st.lists(st.integers(0, 10_000), max_size=5))
def test_content_length(body: bytes, cuts: list[int]) -> None:
    data = head("200 OK", f"Content-Length: {len(body)}") + body + b"more"
    parser, found, _ = parse(pieces(data, cuts))
    assert (found, parser.complete) == (body, True)


def test_a_body_that_the_end_delimits() -> None:
    parser, body, _ = parse([head("200 OK") + b"all", b" of it"])
    assert not parser.complete
    parser.end()
    assert (body, parser.complete) == (b"all of it", True)


@given(st.integers(0, len(CHUNKED) - 1))
def test_a_stream_that_breaks_off_is_an_error(length: int) -> None:
    parser, _, _ = parse([CHUNKED[:length]])
    with pytest.raises(ProtocolError, match="ended before the response did"):
        parser.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        head("200 OK", "Content-Length: -1"),
        head("200 OK", "Content-Length: 1_0"),
        head("200 OK", "Transfer-Encoding: chunked") + b"xyz\r\n",
        head("200 OK", "Transfer-Encoding: chunked") + b"2\r\nabcd\r\n",
        head("200 OK", "Transfer-Encoding: chunked") + b"1" * 70_000,
        b"x" * 70_000,
    ],
)
def test_what_is_not_http(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ResponseParser().feed(data)


@given(st.binary(max_size=200))
def test_noise_never_surprises(noise: bytes) -> None:
    EventParser().feed(noise)
    for start in (b"", head("200 OK", "Transfer-Encoding: chunked")):
        with suppress(ProtocolError):
            ResponseParser().feed(start + noise)


@pytest.mark.parametrize(
    ("url", "shown", "loopback"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("http://127.8.9.1:1/v1/", "http://127.8.9.1:1", True),
        ("http://[::1]:80/api/v1", "http://[::1]:80/api", True),
        ("http://localhost", "http://localhost:80", True),
        ("https://models.example.org", "https://models.example.org:443", False),
        ("http://127.0.0.1.example.org", "http://127.0.0.1.example.org:80", False),
        ("http://10.0.0.1", "http://10.0.0.1:80", False),
    ],
)
def test_addresses(url: str, shown: str, loopback: bool) -> None:
    address = Address.of(url)
    assert (str(address), address.is_loopback) == (shown, loopback)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://[::1"])
def test_no_url(url: str) -> None:
    with pytest.raises(BadRequestError, match="is no URL"):
        Address.of(url)


async def events_of(url: str) -> list[str]:
    async with request(Address.of(url), "POST", "/v1/chat/completions", {"n": 1}) as response:
        return [one async for one in response.events()]


def test_a_request_and_its_events() -> None:
    asked = []

    def reply(body: dict[str, object]) -> list[bytes | float]:
        asked.append(body)
        return answer(2, 5)

    with chat_server(reply) as url:
        found = asyncio.run(events_of(url))
        assert asyncio.run(request_json(Address.of(url), "GET", "/v1/models")) == {"data": [{"id": "m"}]}
    assert asked == [{"n": 1}]
    assert len(found) == 5
    assert found[-1] == "[DONE]"


def test_an_error_status_becomes_an_error() -> None:
    reply = [head("503 Busy", "Content-Length: 4"), b"wait"]
    with chat_server(lambda _: [*reply]) as url, pytest.raises(KvernError, match="answered 503 to POST /x: wait"):
        asyncio.run(request_json(Address.of(url), "POST", "/x", {}))


def _same(reply: Reply, body: dict[str, Any]) -> Reply:
    return reply


def test_a_server_that_hangs_up() -> None:
    replies: list[Reply] = [[head("200 OK", "Transfer-Encoding: chunked"), chunk(piece("a"))], [b""]]
    for reply in replies:
        with chat_server(partial(_same, reply)) as url, pytest.raises(ProtocolError, match="ended before"):
            asyncio.run(events_of(url))


def test_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UnreachableError, match=f"nobody answers at http://127.0.0.1:{port}"):
        asyncio.run(events_of(f"http://127.0.0.1:{port}"))
