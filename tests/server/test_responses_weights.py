"""/v1/responses with a model that knows something: a conversation by id, and a call of a tool there and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from tests.pulled import pulled
from tests.server.serving import serving
from tests.wire.test_responses_stream import read_back

from kvern.engine import EngineSettings
from kvern.llm import LLM

pytestmark = [pytest.mark.weights, pytest.mark.slow]
MODEL = "coder-0.5b"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def sdk() -> Iterator[openai.OpenAI]:
    pulled(MODEL)
    llm = LLM(MODEL, settings=EngineSettings(max_context=2048, cache_tokens=4096))
    with (
        serving(lambda: llm, settings={"max_body_bytes": 1 << 20}) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        yield client


def ask(sdk: openai.OpenAI, given: Any, **more: Any) -> Response:
    answer = sdk.responses.create(model=MODEL, input=given, temperature=0, max_output_tokens=60, **more)
    assert isinstance(answer, Response)
    return answer


def test_a_conversation_by_id(sdk: openai.OpenAI) -> None:
    first = ask(sdk, "My name is Alice. Remember it.")
    second = ask(sdk, "What is my name? Answer with the name alone.", previous_response_id=first.id)
    assert "Alice" in second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= 16, "the first turn is in the prefix cache"


def test_a_call_there_and_back(sdk: openai.OpenAI) -> None:
    asked = "What is the weather in Rome? Use the tool."
    events = [
        event.to_dict()
        for event in sdk.responses.create(
            model=MODEL, input=asked, temperature=0, max_output_tokens=60, stream=True, tools=[WEATHER]
        )
    ]
    call = read_back(events)[-1]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"])["city"].startswith("Rome")
    result: Any = {"type": "function_call_output", "call_id": call["call_id"], "output": "31 degrees Celsius, sunny"}
    made: Any = events[-1]["response"]
    answer = ask(
        sdk,
        [result, {"role": "user", "content": "How many degrees is it, in one sentence?"}],
        previous_response_id=made["id"],
        tools=[WEATHER],
        tool_choice="none",
    )
    assert "31" in answer.output_text
