"""Anthropic's and DeepSeek's dialects with a real model: a call there and back, and a prefix that is continued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from tests.server.serving import Serving, serving

from kvern.errors import NotFoundError
from kvern.llm import LLM, resolve

pytestmark = pytest.mark.weights
MODEL = "coder-0.5b"
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    try:
        resolve(MODEL)
    except NotFoundError:
        pytest.skip(f"{MODEL} was not pulled")
    llm = LLM(MODEL, max_context=2048)
    with serving(lambda: llm, settings={"max_body_bytes": 1 << 20}) as running:
        yield running


def test_a_call_there_and_back(server: Serving) -> None:
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
    options: dict[str, Any] = {"model": "claude-local", "max_tokens": 200, "extra_body": {"temperature": 0}}
    options["tools"] = [WEATHER]
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, _strict_response_validation=True) as sdk:
        with sdk.messages.stream(**options, messages=turns, tool_choice={"type": "any"}) as stream:
            asked: Any = stream.get_final_message()
        call = asked.content[-1]
        assert (asked.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "get_weather")
        assert "paris" in call.input["city"].lower()
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "17 degrees, rain"}
        turns += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
        answer: Any = sdk.messages.create(**options, messages=turns, tool_choice={"type": "none"})
        assert any(word in answer.content[0].text for word in ("17", "rain"))  # which, depends on the CPU's kernels
        assert answer.usage.cache_read_input_tokens > 0


def test_a_prefix_is_continued(server: Serving) -> None:
    turns = [
        {"role": "user", "content": "Write a Python function that adds two numbers."},
        {"role": "assistant", "content": "```python\ndef add(a, b):\n    return", "prefix": True},
    ]
    body = {"model": "deepseek-chat", "messages": turns, "temperature": 0, "max_tokens": 20, "stop": ["```"]}
    answer = httpx.post(f"{server.url}/beta/chat/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["message"]["content"].strip() == "a + b"
