"""Clients of DeepSeek's API: its addresses, its names, prefixes, usage in streams, empty lines while waiting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request
from tests.scripted import ScriptedEngine
from tests.server.serving import Serving, serving
from tests.tiny import text_files

from kvern.llm import LLM
from kvern.server.inside import OWNER
from kvern.server.routes import patience
from kvern.text.conversation import Conversation
from kvern.text.messages import Message
from kvern.text.options import SamplingOptions

CHAT: dict[str, Any] = {"model": "tiny-v3", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
BEGUN = [*CHAT["messages"], {"role": "assistant", "content": "def add(", "prefix": True}]
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine, tiny_folder: Path) -> Iterator[Serving]:
    settings = {"stream_keep_alive": 0.05}
    with serving(lambda: LLM(tiny_folder, engine=engine), settings=settings) as running:
        yield running


@pytest.fixture
def http(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


def chunks(response: httpx.Response) -> list[Any]:
    *data, done = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert done == "[DONE]"
    return [json.loads(one) for one in data]


@pytest.mark.parametrize("prefix", ["", "/beta", "/v1"])
def test_addresses(http: httpx.Client, prefix: str) -> None:
    assert http.post(f"{prefix}/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"] == "aaa"
    middle = {"model": "deepseek-chat", "prompt": "def f(", "suffix": "):", "max_tokens": 2}
    assert http.post(f"{prefix}/completions", json=middle).json()["choices"][0]["text"] == "aa"
    assert http.get(f"{prefix}/models").json()["data"][0]["id"] == "tiny-v3"


def test_anthropics_dialect_below_its_address(http: httpx.Client) -> None:
    answer = http.post("/anthropic/v1/messages", json={**CHAT, "model": "deepseek-chat"}).json()
    assert answer["content"] == [{"type": "text", "text": "aaa"}]
    assert http.post("/anthropic/v1/messages", json={}).json()["error"]["type"] == "invalid_request_error"
    assert http.post("/anthropic/v1/messages/count_tokens", json={k: CHAT[k] for k in ("model", "messages")}).json()


def test_a_prefix_is_continued(http: httpx.Client, tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, engine=ScriptedEngine())
    turns = (Message("user", "hi"), Message("assistant", "def add("))
    there = llm.prepare_chat(Conversation(turns, continues=True), SamplingOptions())
    answer = http.post("/beta/chat/completions", json={**CHAT, "messages": BEGUN}).json()
    assert answer["usage"]["prompt_tokens"] == len(there.prompt)
    assert llm.tokenizer.decode(there.prompt).endswith("assistant\ndef add(")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x", "prefix": True}],
        [*BEGUN, *CHAT["messages"]],
        [
            {
                "role": "assistant",
                "prefix": True,
                "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}],
            }
        ],
    ],
)
def test_a_prefix_elsewhere_is_refused(http: httpx.Client, messages: list[Any]) -> None:
    error = http.post("/beta/chat/completions", json={**CHAT, "messages": messages}).json()["error"]
    assert error["param"].endswith(".prefix")


@pytest.mark.parametrize("change", [{"model": "deepseek-chat"}, {"stream_options": {"include_usage": True}}, {}])
def test_usage_in_streams(http: httpx.Client, change: dict[str, Any]) -> None:
    address = "/beta/chat/completions" if "model" not in change else "/v1/chat/completions"
    *others, last = chunks(http.post(address, json={**CHAT, "stream": True, **change}))
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["prompt_cache_miss_tokens"] == last["usage"]["prompt_tokens"]
    assert all(one.get("usage") is None and ("usage" in one) is ("stream_options" in change) for one in others)


def test_names_and_the_switch_say_whether_to_think(tiny_folder: Path, tmp_path: Path) -> None:
    folder = thinking_folder(tiny_folder, tmp_path)
    engine = ScriptedEngine()
    with serving(lambda: LLM(folder, engine=engine)) as running, httpx.Client(base_url=running.url) as http:

        def thinks(**change: Any) -> bool:
            body = {**CHAT, **change}
            message = http.post("/chat/completions", json=body).json()["choices"][0]["message"]
            assert (message.get("reasoning_content") or message["content"]) == "aaa"
            return bool(message["content"] != "aaa")

        assert thinks(model="deepseek-reasoner")
        assert not thinks(model="deepseek-chat")
        assert thinks(model="deepseek-chat", thinking={"type": "enabled"})
        assert not thinks(model="deepseek-reasoner", thinking={"type": "disabled"})
        usage = http.post("/chat/completions", json={**CHAT, "model": "deepseek-reasoner"}).json()["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 3}


def thinking_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, with the tokens and the template of a model that can think or not."""
    import tokenizers

    folder = tmp_path / "tiny-v3"
    shutil.copytree(tiny_folder, folder)
    tokenizer = tokenizers.Tokenizer.from_str(text_files()["tokenizer.json"].decode())
    tokenizer.add_special_tokens(["<think>", "</think>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(THINKING)
    return folder


def test_a_model_that_cannot_think(http: httpx.Client) -> None:
    assert http.post("/chat/completions", json={**CHAT, "model": "deepseek-reasoner"}).status_code == 200
    refused = http.post("/chat/completions", json={**CHAT, "thinking": {"type": "enabled"}})
    assert refused.json()["error"]["param"] == "thinking"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_empty_lines_while_a_whole_answer_is_made(http: httpx.Client, engine: ScriptedEngine, path: str) -> None:
    quick = http.post(path, json=CHAT)
    engine.pause = 0.1
    slow = http.post(path, json=CHAT)
    assert quick.text.startswith("{")
    assert slow.text.startswith("\n\n")
    for answer in (quick, slow):
        assert answer.headers["content-type"] == "application/json"
        answer.json().pop("id")
    kept = ("choices", "content", "usage")
    assert [quick.json().get(name) for name in kept] == [slow.json().get(name) for name in kept]


def test_a_row_of_a_batch_waits_for_its_true_status() -> None:
    assert patience(Request({"type": "http", OWNER: ""})) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_behind_empty_lines_breaks_the_connection_off(http: httpx.Client, engine: ScriptedEngine) -> None:
    engine.pause = 0.2
    received = b""
    with (  # noqa: PT012 (the error comes while the body is read)
        pytest.raises(httpx.RemoteProtocolError),
        http.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 50}) as response,
    ):
        for part in response.iter_raw():
            received += part
            engine.fails = True
    assert received.startswith(b"\n")
    assert b'"error"' in received
    engine.fails = False


def test_hanging_up_while_empty_lines_come(http: httpx.Client, engine: ScriptedEngine) -> None:
    from tests.server.serving import wait_until

    engine.pause = 0.1
    with http.stream("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 200}) as response:
        next(response.iter_raw())
    wait_until(lambda: not engine.live())
    assert engine.finished["cancelled"] == 1


@pytest.mark.parametrize(("given", "drawn"), [(1, 0.3), (0, 0.0), (0.5, 0.15), (1.5, 0.8), (None, 0.7)])
def test_temperatures_of_deepseeks_service(tiny_folder: Path, given: float | None, drawn: float) -> None:
    llm = LLM(tiny_folder, engine=ScriptedEngine(), temperature_mapping="deepseek_api")
    assert llm.prepare_chat("hi", SamplingOptions(temperature=given)).params.temperature == pytest.approx(drawn)
