"""The real coder-0.5b asked for the weather, through the official SDK."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.pulled import pulled
from tests.server.serving import serving
from tests.server.test_tools import CLOCK, WEATHER, calls_of

from kvern.llm import LLM

pytestmark = pytest.mark.weights
PARIS: Any = {"role": "user", "content": "What is the weather in Paris?"}
NAMED: Any = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    pulled("coder-0.5b")
    with (
        serving(lambda: LLM("coder-0.5b", max_context=4096), settings={"max_body_bytes": 1 << 20}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", _strict_response_validation=True) as client,
    ):
        yield client


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_it_asks_for_the_weather(sdk: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"model": "coder-0.5b", "messages": [PARIS], "temperature": 0, "max_tokens": 100}
    answer = sdk.chat.completions.create(**fields, tools=[WEATHER], tool_choice=choice)
    message = answer.choices[0].message
    (call,) = message.tool_calls or [None]
    assert call is not None
    assert call.type == "function"
    assert (call.function.name, answer.choices[0].finish_reason, message.content) == (
        *("get_weather", "tool_calls"),
        None,
    )
    assert json.loads(call.function.arguments)["city"] == "Paris"
    chunks = sdk.chat.completions.create(**fields, tools=[WEATHER], tool_choice=choice, stream=True)
    assert calls_of([chunk.choices[0].delta for chunk in chunks]) == [("get_weather", call.function.arguments)]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees celsius and rain"}
    fields["messages"] = [PARIS, message.model_dump(exclude_none=True), result]
    after = sdk.chat.completions.create(**fields, tools=[WEATHER], tool_choice="none")
    assert "18" in (after.choices[0].message.content or "")


def test_it_calls_the_tool_that_it_must(sdk: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "coder-0.5b", "messages": [PARIS], "temperature": 0, "max_tokens": 60}
    forced = sdk.chat.completions.create(**fields, tools=[WEATHER, CLOCK], tool_choice=NAMED)
    (call,) = forced.choices[0].message.tool_calls or [None]
    assert call is not None
    assert call.type == "function"
    assert call.function.name == "clock"
    silent = sdk.chat.completions.create(**fields, tools=[WEATHER], tool_choice="none")
    assert silent.choices[0].message.tool_calls is None
    assert silent.choices[0].message.content


def test_it_answers_without_a_call_where_none_fits(sdk: openai.OpenAI) -> None:
    poem: Any = [{"role": "user", "content": "Write a haiku about the sea."}]
    answer = sdk.chat.completions.create(
        model="coder-0.5b", messages=poem, temperature=0, max_tokens=60, tools=[WEATHER, CLOCK]
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
