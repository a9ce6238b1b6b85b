"""A raw asyncio server on a loopback port, in a thread, that answers chat requests as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Reply = list[bytes | float]
"""Bytes to send, and pauses in seconds between them; the connection ends after the last."""


def event(value: object) -> bytes:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def piece(text: str = "", finish: str | None = None) -> bytes:
    """An event with text, with a finish reason, or with both."""
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


def usage(prompt: int, completion: int) -> bytes:
    """The event that `include_usage` asks for."""
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def head(status: str = "200 OK", *lines: str) -> bytes:
    """Status line and headers."""
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def answer(words: int, prompt_tokens: int, pause: float = 0.0) -> Reply:
    """A whole chunked answer of `words` pieces."""
    reply: Reply = [head("200 OK", "Transfer-Encoding: chunked", "Content-Type: text/event-stream")]
    for number in range(words):
        reply += [chunk(piece(f"w{number} ")), pause]
    last = piece(finish="length") + usage(prompt_tokens, words) + event("[DONE]")
    return [*reply, chunk(last), chunk(b"")]


@contextmanager
def chat_server(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[str]:
    """Serve `reply(body)` for every POST, and a list of the one model `m` for every GET; the value is the URL."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready = threading.Event()
    ports: list[int] = []
    connections: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.partition(":")[2] for line in request.split("\r\n") if line.startswith("Content-Length")]
        body = json.loads(await reader.readexactly(int(lengths[0]))) if lengths else {}
        models = b'{"data": [{"id": "m"}]}'
        parts = (
            reply(body) if request.startswith("POST") else [head("200 OK", f"Content-Length: {len(models)}"), models]
        )
        try:
            for part in parts:
                if isinstance(part, bytes):
                    writer.write(part)
                    await writer.drain()
                elif part:
                    await asyncio.sleep(part)
            writer.close()
            await writer.wait_closed()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = loop.create_task(connection(reader, writer))
        connections.add(task)

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
