"""What the server does around an answer: disconnects, limits, full queues, faults, errors in one envelope."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until

from kvern.errors import CheckpointError, KvernError
from kvern.llm import LLM
from kvern.server.http import EventStream

CHAT: dict[str, Any] = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "tiny-v3", "prompt": "hi"}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(pause=0.005, max_waiting=4)


@pytest.fixture
def server(engine: ScriptedEngine, tiny_folder: Path) -> Iterator[Serving]:
    with serving(lambda: LLM(tiny_folder, engine=engine), settings={"max_waiting": 4}) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def chat(http: httpx.Client, **changes: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={**CHAT, **changes})


def data(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def check_envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    known = {429: "rate_limit_error"}
    assert error["type"] == ("server_error" if status >= 500 else known.get(status, "invalid_request_error"))
    return error


def test_requests_share_the_steps(tiny_folder: Path) -> None:
    """Three answers without an end have begun, and do not keep a fourth from its end."""
    engine = ScriptedEngine(max_context=10**6, pause=0.005)
    endless = {**CHAT, "stream": True, "max_tokens": 900_000}
    with (
        serving(lambda: LLM(tiny_folder, engine=engine)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        ExitStack() as open_streams,
    ):
        streams = [
            open_streams.enter_context(http.stream("POST", "/v1/chat/completions", json=endless)).iter_lines()
            for _ in range(3)
        ]
        assert all(next(stream).startswith("data: ") for stream in streams)
        assert len(chat(http, max_tokens=50).json()["choices"][0]["message"]["content"]) == 50
        assert len(engine.live()) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels(http: httpx.Client, server: Serving, engine: ScriptedEngine, stream: bool) -> None:
    body = {**CHAT, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            wait_until(lambda: engine.drawn > 3)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until(lambda: not engine.live(), seconds=2)
    assert engine.drawn < 200
    assert engine.finished["cancelled"] == 1
    assert chat(http, max_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_hanging_up_before_the_first_token_cancels(server: Serving, engine: ScriptedEngine) -> None:
    engine.pause = 0.5
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=0.1)
    wait_until(lambda: engine.finished["cancelled"] == 1, seconds=3)
    assert engine.drawn <= 2


def test_a_reader_that_stops_is_cancelled(tiny_folder: Path) -> None:
    """The sockets take some megabytes, the buffer 1000 updates; then the request ends, with an error event."""
    engine = ScriptedEngine(max_context=10**6)
    body = json.dumps({**CHAT, "stream": True, "max_tokens": 900_000}).encode()
    with serving(lambda: LLM(tiny_folder, engine=engine), buffer=1000) as server:
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
            wait_until(lambda: engine.finished["cancelled"] == 1, seconds=20)
            received = b""
            while part := connection.recv(1 << 20):
                received += part
        assert len(received) > 500_000
        assert b"read too slowly" in received
        assert b"[DONE]" not in received
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_stream_that_is_cut_while_it_sends_closes_its_source() -> None:
    """Not when the garbage collector comes round: the reference held here keeps it away."""
    closed = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            yield b"data: 1\n\n"
        finally:
            closed.append("events")

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    source = events()

    async def run() -> list[str]:
        await EventStream(source, lambda: closed.append("answer"))({"type": "http"}, receive, send)
        return closed

    assert asyncio.run(run()) == ["answer", "events"]


def test_a_full_queue_says_when_to_come_back(http: httpx.Client, engine: ScriptedEngine) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(chat, http, n=3, max_tokens=60)
        wait_until(lambda: len(engine.live()) == 3)
        refused = chat(http, n=2, stream=True)
        assert check_envelope(refused, 429)["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        assert len(first.result().json()["choices"]) == 3
    wait_until(lambda: not engine.live())
    assert engine.finished == {"length": 3, "cancelled": 1}


def test_what_can_never_fit_is_refused_with_numbers(http: httpx.Client) -> None:
    too_many = check_envelope(chat(http, n=5), 400)
    assert (too_many["param"], too_many["message"]) == (
        "n",
        "the request has 5 choices and the queue holds 4 (ask for fewer)",
    )
    assert "the context holds 1000" in check_envelope(chat(http, max_tokens=1000), 400)["message"]
    assert check_envelope(chat(http, logit_bias={"320": 1}), 400)["param"] == "logit_bias"
    refused = http.post("/v1/completions", json={**COMPLETION, "prompt": [320]})
    assert "token id 320 is outside the vocabulary of 320" in check_envelope(refused, 400)["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_engine(http: httpx.Client, engine: ScriptedEngine, stream: bool) -> None:
    """Those who wait get an error without details, /health tells, and after a pause it serves again."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(chat, http, stream=stream) for _ in range(2)]
        wait_until(lambda: len(engine.live()) == 2)
        engine.fails = True
        for answer in waiting:
            response = answer.result()
            assert "secret" not in response.text
            if stream:
                assert data(response)[-1].startswith('{"error":')
                assert "[DONE]" not in response.text
            else:
                check_envelope(response, 500)
    for path in ("/health", "/ready"):
        down = http.get(path)
        check_envelope(down, 503)
        assert int(down.headers["retry-after"]) >= 1
    check_envelope(chat(http), 503)
    engine.fails = False
    wait_until(lambda: http.get("/health").status_code == 200)
    assert chat(http, max_tokens=1).status_code == 200


def test_the_sdk_raises_an_error_in_the_middle(server: Serving, engine: ScriptedEngine) -> None:
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = sdk.chat.completions.create(**CHAT, stream=True)
        next(iter(stream))
        engine.fails = True
        with pytest.raises(openai.APIError, match="the engine failed"):
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
    assert check_envelope(chat(http, surprise=1), 400)["param"] == "surprise"
    assert "generates text" in check_envelope(http.post("/v1/embeddings", json={"input": "x"}), 400)["message"]


def test_an_alias_is_answered_under_its_own_name(http: httpx.Client) -> None:
    for name in ("deepseek-chat", "claude-sonnet-4-5"):
        assert chat(http, model=name, max_tokens=1).json()["model"] == name
        assert http.get(f"/v1/models/{name}").json()["id"] == "tiny-v3"


def test_refusals_in_anthropics_envelope(http: httpx.Client) -> None:
    for response in (http.get("/v1/messages/no"), http.get("/v1/no", headers={"anthropic-version": "2023-06-01"})):
        assert response.status_code == 404
        body = response.json()
        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
        assert body["request_id"] == response.headers["x-request-id"]


def test_an_answer_carries_the_requests_id(http: httpx.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for strange in ("", "x" * 129, "a b"):
        given = http.get("/nothing", headers={"X-Request-Id": strange}).headers["x-request-id"]
        assert given.startswith("req-")
    assert "x-request-id" in chat(http, max_tokens=1, stream=True).headers


def test_an_error_that_nobody_foresaw(http: httpx.Client, server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.host.llm, "prepare_chat", broken)
    response = http.post("/v1/chat/completions", json=CHAT, headers={"X-Request-Id": "abc-1"})
    assert check_envelope(response, 500)["message"] == "an error inside the server"
    assert response.headers["x-request-id"] == "abc-1"


def test_the_salt_is_the_servers(tiny_folder: Path) -> None:
    engine = ScriptedEngine()
    load, salt = (lambda: LLM(tiny_folder, engine=engine)), (lambda request: request.headers["x-team"].encode())
    with serving(load, salt=salt) as server, httpx.Client(base_url=server.url, headers={"X-Team": "a"}) as http:
        assert chat(http, max_tokens=1, priority=-3).status_code == 200
        assert (engine.salts, engine.priorities) == ([b"a"], [-3])
        assert check_envelope(chat(http, cache_salt="b"), 400)["param"] == "cache_salt"


def test_n_answers_differ_by_seed_and_count_the_prompt_once(http: httpx.Client, engine: ScriptedEngine) -> None:
    answer = chat(http, n=3, seed=2**63 - 1, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [params.seed for params in engine.asked] == [2**63 - 1, -(2**63), -(2**63) + 1]
    one = chat(http, max_tokens=2).json()["usage"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 3 * one["completion_tokens"]


def test_a_stop_string_ends_the_engines_work(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.script = [64, 64, 65]
    answer = chat(http, stop=["ab"]).json()
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("a", "stop")
    wait_until(lambda: engine.finished["cancelled"] == 1)
    assert data(chat(http, stop=["ab"], stream=True))[-1] == "[DONE]"


def test_readiness_follows_the_load(tiny_folder: Path) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(10)
        return LLM(tiny_folder, engine=ScriptedEngine())

    with serving(load, wait=False) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200
        assert check_envelope(http.get("/ready"), 503)["code"] == "unavailable"
        assert http.get("/ready").headers["retry-after"] == "5"
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


def test_openapi_documents_the_bodies_and_no_422(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    assert sorted(operation["responses"]) == ["200", "4XX", "5XX"]
    schemas = document["components"]["schemas"]
    assert sorted(schemas["ChatCompletionRequest"]["required"]) == ["messages", "model"]
    assert sorted(schemas["CompletionRequest"]["required"]) == ["model", "prompt"]
    for name in ("RequestMessage", "TextPart", "StreamOptions", "ChatCompletion", "Completion", "ErrorBody"):
        assert name in schemas
    assert "#/$defs/" not in str(document)


def test_the_docs_page_loads_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert "http" not in page.text.replace("http-equiv", "")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
