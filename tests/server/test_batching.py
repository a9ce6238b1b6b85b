"""Batches beside everything else: owners, interactive traffic, stops, faults, the one process that works."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until

from kvern.engine.request import BACKGROUND
from kvern.llm import LLM

URL = "/v1/chat/completions"
CHAT: dict[str, Any] = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}]}


def tenant(request: Request) -> bytes:
    """Who asks, as a gateway would tell it."""
    return request.headers.get("x-tenant", "").encode()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(pause=0.002, max_waiting=8)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"settings": {"max_waiting": 8, "store": str(tmp_path / "store")}, "salt": tenant}


@pytest.fixture
def server(engine: ScriptedEngine, tiny_folder: Path, options: dict[str, Any]) -> Iterator[Serving]:
    with serving(lambda: LLM(tiny_folder, engine=engine), **options) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def start(http: httpx.Client, count: int, who: str = "", **body: Any) -> dict[str, Any]:
    lines = [{"custom_id": str(n), "method": "POST", "url": URL, "body": {**CHAT, **body}} for n in range(count)]
    content = "\n".join(json.dumps(line) for line in lines).encode()
    headers = {"x-tenant": who}
    file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("i.jsonl", content)}, headers=headers)
    asked = {"input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "24h"}
    made: dict[str, Any] = http.post("/v1/batches", json=asked, headers=headers).json()
    return made


def get(http: httpx.Client, batch: dict[str, Any], who: str = "") -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/batches/{batch['id']}", headers={"x-tenant": who}).json()
    return found


def wait(http: httpx.Client, batch: dict[str, Any], who: str = "", status: str = "completed") -> dict[str, Any]:
    wait_until(lambda: get(http, batch, who)["status"] == status, seconds=20)
    return get(http, batch, who)


def test_everybody_sees_their_own(http: httpx.Client, engine: ScriptedEngine) -> None:
    batch = start(http, 2, "anna", max_tokens=2, temperature=0)
    done = wait(http, batch, "anna")
    assert set(engine.salts) == {b"anna"}
    for path in (
        f"/v1/batches/{batch['id']}",
        f"/v1/files/{batch['input_file_id']}",
        f"/v1/files/{done['output_file_id']}",
        f"/v1/files/{done['output_file_id']}/content",
    ):
        assert http.get(path, headers={"x-tenant": "anna"}).status_code == 200
        assert http.get(path, headers={"x-tenant": "bert"}).status_code == 404
    for path in (f"/v1/batches?after={batch['id']}", f"/v1/files?after={done['output_file_id']}"):
        assert http.get(path, headers={"x-tenant": "bert"}).status_code == 404
    bert = {"x-tenant": "bert"}
    assert http.delete(f"/v1/files/{batch['input_file_id']}", headers=bert).status_code == 404
    assert http.post(f"/v1/batches/{batch['id']}/cancel", headers=bert).status_code == 404
    assert http.get("/v1/batches", headers=bert).json()["data"] == []
    assert http.get("/v1/files", headers=bert).json()["data"] == []
    asked = {"input_file_id": batch["input_file_id"], "endpoint": URL, "completion_window": "24h"}
    assert http.post("/v1/batches", json=asked, headers=bert).status_code == 404
    again = wait(http, start(http, 2, "bert", max_tokens=2, temperature=0), "bert")
    assert again["reused_requests"] < 2  # what anna had answered is not bert's


def test_rows_are_behind_all_interactive_requests(http: httpx.Client, engine: ScriptedEngine) -> None:
    wait(http, start(http, 1, max_tokens=1))
    wait(http, start(http, 1, max_tokens=1, priority=-5))
    wait(http, start(http, 1, max_tokens=1, priority=2**31 - 1))
    assert engine.priorities == [BACKGROUND, BACKGROUND, 2**31 - 1]
    done = wait(http, start(http, 1, max_tokens=1, priority="high"))
    assert done["request_counts"]["failed"] == 1


def test_a_batch_takes_half_of_the_queue_at_most(http: httpx.Client, engine: ScriptedEngine) -> None:
    batch = start(http, 40, max_tokens=50)
    wait_until(lambda: len(engine.live()) == 4)
    for _ in range(20):
        assert http.post(URL, json={**CHAT, "max_tokens": 1}).status_code == 200
        assert len(engine.live()) <= 4
    http.post(f"/v1/batches/{batch['id']}/cancel")
    wait(http, batch, status="cancelled")
    wait_until(lambda: not engine.live())


def test_a_full_queue_is_waited_for(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.max_waiting = 0
    batch = start(http, 3, max_tokens=1)
    wait_until(lambda: get(http, batch)["status"] == "in_progress", seconds=20)
    time.sleep(0.5)  # long enough for rows that were not held back to be answered
    assert get(http, batch)["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    engine.max_waiting = 8
    assert wait(http, batch)["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


def test_a_fault_of_the_engine_loses_no_row(http: httpx.Client, engine: ScriptedEngine) -> None:
    batch = start(http, 12, max_tokens=30)
    wait_until(lambda: bool(engine.live()))
    engine.fails = True
    time.sleep(0.1)
    engine.fails = False
    assert wait(http, batch)["request_counts"] == {"total": 12, "completed": 12, "failed": 0}


def test_a_server_that_stops_lets_go_of_its_batches(
    engine: ScriptedEngine, tiny_folder: Path, options: dict[str, Any]
) -> None:
    with (
        serving(lambda: LLM(tiny_folder, engine=engine), **options) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        batch = start(http, 30, max_tokens=100)
        wait_until(lambda: get(http, batch)["request_counts"]["completed"] > 2)
        begun = time.monotonic()
        server.stop()
        server.thread.join(20)
        assert time.monotonic() - begun < 10
    again = ScriptedEngine()
    with (
        serving(lambda: LLM(tiny_folder, engine=again), **options) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        done = wait(http, batch)
        assert done["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
        assert again.drawn < 30 * 100
        content = http.get(f"/v1/files/{done['output_file_id']}/content").text
        assert [json.loads(line)["custom_id"] for line in content.splitlines()] == [str(n) for n in range(30)]


def test_one_server_works_at_a_time(
    server: Serving, tiny_folder: Path, options: dict[str, Any], http: httpx.Client
) -> None:
    other = ScriptedEngine(max_waiting=8)
    with serving(lambda: LLM(tiny_folder, engine=other), **options) as second, httpx.Client(base_url=second.url) as two:
        batch = start(two, 5, max_tokens=2)
        wait(two, batch)
        assert other.asked == []
        server.stop()
        server.thread.join(20)
        later = start(two, 5, max_tokens=2)
        wait(two, later)
        assert len(other.asked) == 5


def test_while_the_model_loads_there_are_files_and_no_batches(tiny_folder: Path, options: dict[str, Any]) -> None:
    def load() -> LLM:
        time.sleep(1)
        return LLM(tiny_folder, engine=ScriptedEngine())

    with serving(load, wait=False, **options) as server, httpx.Client(base_url=server.url) as http:
        file = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("i.jsonl", b"{}")})
        assert file.status_code == 200
        asked = {"input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "24h"}
        refused = http.post("/v1/batches", json=asked)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]


@pytest.mark.parametrize(
    ("headers", "body", "status", "says"),
    [
        ({"content-type": "application/json"}, b"{}", 415, "must be a form"),
        ({"content-type": "multipart/form-data"}, b"x", 400, "boundary"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"x", 400, "cannot be read"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"--b--\r\n", 400, "file is missing"),
        (
            {"content-type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
            400,
            "file is missing",
        ),
        (
            {"content-type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"y" * 5000 + b"\r\n--b--\r\n",
            400,
            "cannot be read",
        ),
        (
            {"content-type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nx\r\n' * 2 + b"--b--\r\n",
            400,
            "cannot be read",
        ),
    ],
)
def test_forms_that_are_none(http: httpx.Client, headers: Any, body: bytes, status: int, says: str) -> None:
    refused = http.post("/v1/files", content=body, headers=headers)
    assert refused.status_code == status
    assert says in refused.json()["error"]["message"]
