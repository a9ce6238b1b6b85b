"""What the server does around an answer: turns, disconnects, limits, errors in one envelope, start and stop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.serving import Serving, serving, wait_until

from kvern.engine import SamplingParams
from kvern.errors import CheckpointError, KvernError
from kvern.llm import LLM, Piece
from kvern.server.generate import HAND_OVER, _HandOver
from kvern.server.routes import EventStream

CHAT = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}]}


class SlowEngine:
    """Yields the letter `a` every few milliseconds, and keeps account of what it was asked to do."""

    max_context = 1000

    def __init__(self) -> None:
        self.running = 0
        self.most_running = 0
        self.drawn = 0
        self.fails_after: int | None = None

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[int]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for count in range(params.max_tokens):
                if cancelled():
                    return
                if count == self.fails_after:
                    raise RuntimeError("secret detail")
                time.sleep(0.005)
                self.drawn += 1
                yield 64
        finally:
            self.running -= 1


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def server(engine: SlowEngine, tiny_folder: Path) -> Iterator[Serving]:
    with serving(lambda: LLM(tiny_folder, engine=engine)) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def chat(http: httpx.Client, **changes: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={**CHAT, **changes})


def check_envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


def test_requests_take_turns_in_order(http: httpx.Client, engine: SlowEngine) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: chat(http, max_tokens=n), [8, 7, 6, 5]))
    assert [len(answer.json()["choices"][0]["message"]["content"]) for answer in answers] == [8, 7, 6, 5]
    assert engine.most_running == 1


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels(http: httpx.Client, server: Serving, engine: SlowEngine, stream: bool) -> None:
    body = {**CHAT, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            wait_until(lambda: engine.drawn > 3)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: engine.running == 0, seconds=2)
    assert engine.drawn < 200
    assert chat(http, max_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_hanging_up_while_waiting_costs_nothing(http: httpx.Client, server: Serving, engine: SlowEngine) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, http, max_tokens=100)
        wait_until(lambda: engine.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=0.1)
        assert first.result().json()["usage"]["completion_tokens"] == 100
    assert chat(http, max_tokens=2).status_code == 200
    assert engine.drawn == 102


def test_a_reader_that_stops_holds_the_worker() -> None:
    """The hand-over takes HAND_OVER pieces, then the worker waits; closing it lets the worker go."""

    async def run() -> tuple[int, bool]:
        taken = 0

        def pieces() -> Generator[Piece]:
            nonlocal taken
            while True:
                taken += 1
                yield Piece("a", 1)

        hand_over = _HandOver(asyncio.get_running_loop())
        worker = threading.Thread(target=hand_over.fill, args=(pieces(),))
        worker.start()
        await asyncio.sleep(0.3)
        before = taken
        hand_over.closed.set()
        await asyncio.to_thread(worker.join, 5)
        return before, worker.is_alive()

    assert asyncio.run(run()) == (HAND_OVER + 1, False)


def test_a_stream_that_is_cut_while_it_sends_closes_its_source() -> None:
    """Not when the garbage collector comes round: the reference held here keeps it away."""
    closed = False

    async def events() -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            yield b"data: 1\n\n"
        finally:
            closed = True

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    source = events()

    async def run() -> bool:
        await EventStream(source)({"type": "http"}, receive, send)
        return closed

    assert asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_in_the_engine_is_told_without_details(http: httpx.Client, engine: SlowEngine, stream: bool) -> None:
    engine.fails_after = 2
    response = chat(http, stream=stream)
    assert "secret" not in response.text
    if stream:
        lines = [line for line in response.text.split("\n\n") if line]
        assert lines[-1].startswith('data: {"error":')
        assert "[DONE]" not in response.text
    else:
        check_envelope(response, 500)
    engine.fails_after = None
    assert chat(http, max_tokens=1).status_code == 200


def test_the_sdk_raises_an_error_in_the_middle(http: httpx.Client, server: Serving, engine: SlowEngine) -> None:
    import openai

    engine.fails_after = 2
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = sdk.chat.completions.create(**CHAT, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="failed inside the server"):
            list(stream)


def test_every_refusal_has_the_envelope(http: httpx.Client) -> None:
    json_header = {"Content-Type": "application/json"}
    path = "/v1/chat/completions"
    assert "no route GET /v1/nothing" in check_envelope(http.get("/v1/nothing"), 404)["message"]
    refused = http.get(path)
    check_envelope(refused, 405)
    assert refused.headers["allow"] == "POST"
    check_envelope(http.post(path, content=b"{}", headers={"Content-Type": "text/plain"}), 415)
    check_envelope(http.post(path, content=b"{}"), 415)
    check_envelope(http.post(path, content=b"{", headers=json_header), 400)
    check_envelope(http.post(path, content=b"x" * 5000, headers=json_header), 413)
    check_envelope(http.post(path, content=iter([b"x" * 3000] * 2), headers=json_header), 413)
    assert check_envelope(chat(http, temperature="hot"), 400)["param"] == "temperature"
    assert check_envelope(chat(http, model="gpt-4"), 404)["param"] == "model"
    assert check_envelope(chat(http, max_tokens=10_000), 400)["param"] == "max_tokens"
    assert check_envelope(chat(http, surprise=1), 400)["param"] == "surprise"


def test_readiness_follows_the_load(tiny_folder: Path) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(10)
        return LLM(tiny_folder, engine=SlowEngine())

    with serving(load, wait=False) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        assert check_envelope(http.get("/ready"), 503)["code"] == "not_ready"
        check_envelope(http.get("/v1/models"), 503)
        check_envelope(chat(http), 503)
        go.set()
        wait_until(lambda: http.get("/ready").status_code == 200)


@pytest.mark.parametrize("error", [CheckpointError("is damaged", file="x"), MemoryError("none")])
def test_a_load_that_fails_is_reported(error: Exception) -> None:
    def load() -> LLM:
        raise error

    with serving(load) as server:
        assert isinstance(server.results[0], KvernError)
        assert httpx.get(f"{server.url}/ready").status_code == 503


def test_stopping_ends_the_running_answer(tiny_folder: Path) -> None:
    engine = SlowEngine()
    with serving(lambda: LLM(tiny_folder, engine=engine)) as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json={**CHAT, "max_tokens": 50})
        wait_until(lambda: engine.running == 1)
    assert running.result().json()["usage"]["completion_tokens"] == 50
    assert engine.running == 0


def test_openapi_documents_the_body_and_no_422(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert sorted(operation["responses"]) == ["200", "4XX", "5XX"]
    schema = document["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["required"] == ["model", "messages"]
    text = str(document)
    for name in ("RequestMessage", "TextPart", "StreamOptions", "ChatCompletion", "ErrorBody"):
        assert name in document["components"]["schemas"]
    assert "#/$defs/" not in text
    assert http.get("/docs").status_code == 404
