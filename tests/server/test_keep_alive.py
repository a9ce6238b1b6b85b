"""Comments in a stream that has nothing to say: in the queue, while a prompt is computed, while text is held back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving

from kvern.client import Client
from kvern.llm import LLM
from kvern.server.generate import Answer, EngineHost
from kvern.server.metrics import Metrics

COMMENT = ": keep-alive"
CHAT: dict[str, Any] = {
    "model": "tiny-v3",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "max_tokens": 2,
}


@contextmanager
def silent(folder: Path, engine: ScriptedEngine, seconds: float | None = 0.1) -> Iterator[Serving]:
    chosen = {} if seconds is None else {"stream_keep_alive": seconds}
    with serving(lambda: LLM(folder, engine=engine), settings=chosen) as server:
        yield server


def blocks(server: Serving, path: str = "chat/completions", **body: Any) -> list[str]:
    """The events and comments of one stream, in order."""
    text = httpx.post(f"{server.url}/v1/{path}", json={**CHAT, **body}, timeout=20).text
    assert text.endswith("\n\n")
    return text.split("\n\n")[:-1]


def test_a_stream_without_events_gets_comments_until_its_end(tiny_folder: Path) -> None:
    with silent(tiny_folder, ScriptedEngine(pause=0.45)) as server:
        got = blocks(server)
    assert "assistant" in got[0]
    assert 2 <= got[1:].index(next(one for one in got[1:] if one != COMMENT)) <= 4
    assert 4 <= got.count(COMMENT) <= 8
    assert got[-1] == "data: [DONE]"
    assert all(one == COMMENT or one.startswith("data: ") for one in got)


def test_a_completion_gets_them_before_its_first_event(tiny_folder: Path) -> None:
    body = {"model": "tiny-v3", "prompt": "hi", "stream": True, "max_tokens": 1}
    with silent(tiny_folder, ScriptedEngine(pause=0.45)) as server:
        text = httpx.post(f"{server.url}/v1/completions", json=body).text
    assert text.startswith(f"{COMMENT}\n\n{COMMENT}\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_text_that_is_held_back_is_silence_too(tiny_folder: Path) -> None:
    with silent(tiny_folder, ScriptedEngine(pause=0.03)) as server:
        got = blocks(server, stop=["a" * 30], max_tokens=20)
    assert got.count(COMMENT) >= 2
    assert got.index(COMMENT) == 1


def test_none_where_events_come_in_time(tiny_folder: Path) -> None:
    with silent(tiny_folder, ScriptedEngine(pause=0.02), 0.5) as server:
        assert COMMENT not in blocks(server, max_tokens=40)
    with silent(tiny_folder, ScriptedEngine(pause=0.4), None) as server:
        assert COMMENT not in blocks(server)


def test_none_after_an_error(tiny_folder: Path) -> None:
    engine = ScriptedEngine(pause=0.3)
    engine.fails = True
    with silent(tiny_folder, engine) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvern.engine.service.log.exception", lambda *_: None)
        got = blocks(server)
    assert got[-1].startswith('data: {"error"')
    assert COMMENT in got[:-1]


def test_clients_skip_them(tiny_folder: Path) -> None:
    with silent(tiny_folder, ScriptedEngine(pause=0.25)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", _strict_response_validation=True) as sdk:
            chunks = list(sdk.chat.completions.create(**CHAT))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "aa"
        assert "".join(Client(server.url).stream("hi", max_tokens=2)) == "aa"


def test_a_whole_answer_is_no_stream(tiny_folder: Path) -> None:
    with silent(tiny_folder, ScriptedEngine(pause=0.25)) as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "stream": False})
    assert response.json()["choices"][0]["message"]["content"] == "aa"


def test_an_answer_that_nobody_writes_gives_empty_batches() -> None:
    async def run() -> list[int]:
        answer = Answer(EngineHost(lambda: pytest.fail("not loaded"), Metrics()), 9)
        answer.add(1)
        got = []
        async for batch in answer.batches(0.01):
            got.append(len(batch))
            if len(got) == 3:
                answer.close()
        return got

    assert asyncio.run(run()) == [0, 0, 0]
