from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.server.serving import serving

from kvern.client import Client
from kvern.errors import BadRequestError, BusyError, KvernError, NotFoundError, UnreachableError
from kvern.llm import LLM
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.output_format import OutputFormat


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, threads=1)


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Iterator[Client]:
    with serving(lambda: LLM(tiny_folder, threads=1)) as server, Client(server.url) as client:
        yield client


def test_a_server_answers_as_the_model_does(client: Client, llm: LLM) -> None:
    assert client.model == "tiny-v3"
    here, there = (speaker.chat("hi", max_tokens=9, temperature=0) for speaker in (llm, client))
    assert (there.text, there.finish_reason, there.prompt_tokens, there.completion_tokens) == (
        here.text,
        here.finish_reason,
        here.prompt_tokens,
        here.completion_tokens,
    )
    assert "".join(client.stream("hi", max_tokens=9, temperature=0)) == here.text


@pytest.mark.parametrize(
    "form",
    [
        OutputFormat.choice(["left", "right"]),
        OutputFormat.regex("[ab]{3}"),
        OutputFormat.grammar('start: "x" "y"'),
        OutputFormat.json_schema({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}),
    ],
    ids=lambda form: form.kind,
)
def test_forms_reach_the_server(client: Client, llm: LLM, form: OutputFormat) -> None:
    asked = Conversation((Message("user", "hi"),), format=form)
    here, there = (speaker.chat(asked, max_tokens=40, temperature=0) for speaker in (llm, client))
    assert there.text == here.text
    assert there.text != llm.chat("hi", max_tokens=40, temperature=0).text


def test_refusals_keep_their_kind(client: Client) -> None:
    with pytest.raises(BadRequestError, match="the prompt has") as caught:
        client.chat("word " * 500)
    assert caught.value.param == "messages"
    with pytest.raises(BadRequestError, match="the prompt has"):
        list(client.stream("word " * 500))
    with Client(client.url, model="gpt-4") as other, pytest.raises(NotFoundError, match="no model 'gpt-4'"):
        other.chat("hi")


@contextmanager
def answering(status: int, body: str, headers: dict[str, str] | None = None) -> Iterator[Client]:
    """A server that says one thing to every POST."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body.encode())), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with Client(f"http://127.0.0.1:{server.server_port}/v1/", model="m") as client:
                yield client
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (500, "oh no", KvernError, "answered 500: oh no"),
        (401, '{"error": "no key"}', BadRequestError, "answered 401: no key"),
        (404, '{"detail": 1}', NotFoundError, "answered 404"),
        (429, '{"error": {"message": "later"}}', BusyError, "answered 429: later"),
        (200, "<html>", KvernError, "something else than JSON"),
        (200, "[]", KvernError, "something else than a JSON object"),
        (200, "{}", KvernError, "something else than a chat completion"),
    ],
)
def test_strange_answers(status: int, body: str, kind: type[KvernError], message: str) -> None:
    with answering(status, body) as client, pytest.raises(kind, match=message):
        client.chat("hi")


def test_busy_servers_say_when() -> None:
    with answering(429, "", {"Retry-After": "7"}) as client, pytest.raises(BusyError) as caught:
        client.chat("hi")
    assert caught.value.retry_after == 7


PIECE = json.dumps({"choices": [{"delta": {"content": "a"}}]})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"data: {PIECE}\n\n", "before the answer was complete"),
        (f'data: {PIECE}\n\ndata: {{"error": {{"message": "broken"}}}}\n\n', "broken"),
        ("data: {\n\n", "something else than JSON"),
    ],
)
def test_streams_that_break(body: str, message: str) -> None:
    with answering(200, body) as client, pytest.raises(KvernError, match=message):
        list(client.stream("hi"))


def test_streams_may_hold_comments_and_empty_chunks() -> None:
    body = f': keep-alive\n\ndata:{PIECE}\n\ndata: {{"choices": []}}\n\nevent: x\n\ndata: [DONE]\n\n'
    with answering(200, body) as client:
        assert list(client.stream("hi")) == ["a"]


def test_nobody_there() -> None:
    with Client("http://127.0.0.1:9", model="m") as client, pytest.raises(UnreachableError) as caught:
        client.chat("hi")
    assert caught.value.hint == "is the server running? `kvern serve`"


def test_a_url_is_needed() -> None:
    with pytest.raises(BadRequestError, match="is no URL"):
        Client("localhost:8000")
