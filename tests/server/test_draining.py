"""SIGTERM: nothing new is taken, what runs ends, and after the timeout it is cut with an error."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving, wait_until

from kvern.llm import LLM

CHAT: dict[str, Any] = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}]}


def ask(server: Serving, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, **changes}, timeout=20)


def test_running_answers_end_and_new_ones_are_refused(tiny_folder: Path) -> None:
    engine = ScriptedEngine(pause=0.01)
    with serving(lambda: LLM(tiny_folder, engine=engine)) as server, ThreadPoolExecutor(2) as pool:
        whole, stream = (pool.submit(ask, server, max_tokens=100, stream=stream) for stream in (False, True))
        wait_until(lambda: len(engine.live()) == 2)
        server.stop()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        refused = ask(server)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "stopping" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert whole.result().json()["usage"]["completion_tokens"] == 100
        assert stream.result().text.endswith("data: [DONE]\n\n")
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert engine.finished == {"length": 2}


@pytest.mark.parametrize("stream", [True, False])
def test_after_the_timeout_answers_are_cut_with_an_error(tiny_folder: Path, stream: bool) -> None:
    engine = ScriptedEngine(pause=0.01, max_context=10**6)
    settings = {"shutdown_timeout": 0.2}
    with (
        serving(lambda: LLM(tiny_folder, engine=engine), settings=settings) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(ask, server, stream=stream)
        wait_until(lambda: len(engine.live()) == 1)
        server.stop()
        response = answer.result()
        assert "the server is stopping" in response.text
        assert "[DONE]" not in response.text
        assert response.status_code == (200 if stream else 503)
    assert engine.finished == {"cancelled": 1}


def test_a_second_signal_does_not_wait(tiny_folder: Path) -> None:
    engine = ScriptedEngine(pause=0.01, max_context=10**6)
    with serving(lambda: LLM(tiny_folder, engine=engine)) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, stream=True)
        wait_until(lambda: len(engine.live()) == 1)
        server.stop()
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        server.stop()
        server.thread.join(3)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.HTTPError):
            answer.result()
