"""Structured output over HTTP: the official SDKs and their `parse`, a real server, a tiny random model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict
from tests.server.serving import serving
from tests.structured import write_long_checkpoint

from kvern.llm import LLM

HI: list[Any] = [{"role": "user", "content": "hi"}]
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
PLACE = "/properties/a/uniqueItems"


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Literal["Paris", "Rome"]
    sunny: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    before = torch.get_num_threads()
    folder = write_long_checkpoint(tmp_path_factory.mktemp("models") / "tiny-long")
    with serving(lambda: LLM(folder, dtype="f32", threads=1), settings={"max_body_bytes": 1 << 20}) as server:
        yield server.url
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, _strict_response_validation=True) as client:
        yield client


@pytest.fixture(scope="module")
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


def test_chat_parse(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model="tiny-long", messages=HI, response_format=City, n=3, max_tokens=600, seed=1
    )
    for choice in answer.choices:
        assert isinstance(choice.message.parsed, City)


def test_chat_stream(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="tiny-long", messages=HI, response_format=City, max_tokens=600, seed=1
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, City)


def test_strict_tools_parse(sdk: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(City)
    answer = sdk.chat.completions.parse(
        model="tiny-long", messages=HI, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=600
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, City)


def test_responses_parse(sdk: openai.OpenAI) -> None:
    response = sdk.responses.parse(model="tiny-long", input="hi", text_format=City, max_output_tokens=600)
    assert isinstance(response.output_parsed, City)
    form = response.model_dump(by_alias=True)["text"]["format"]
    assert (form["type"], form["name"], form["schema"]["required"]) == ("json_schema", "City", ["name", "sunny"])


def test_messages_parse(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.parse(model="tiny-long", messages=HI, max_tokens=600, output_format=City)
    assert isinstance(answer.parsed_output, City)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": r"\d{3}-[ab]"}, r"[0-9]{3}-[ab]"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"guided_json": json.dumps({"enum": [1, "a"]})}, '1|"a"'),
        ({"structured_outputs": {"choice": ["a b"]}}, "a b"),
        ({"structured_outputs": {"json": {"const": None}}}, "null"),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 1}, r"\{.*"),
    ],
)
def test_vllms_fields(sdk: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    limit = {"max_tokens": 60}
    answer = sdk.chat.completions.create(model="tiny-long", messages=HI, extra_body={**limit, **fields})
    assert re.fullmatch(pattern, answer.choices[0].message.content or "")
    for prompt in ("hi", [65, 66]):
        given: dict[str, Any] = {"model": "tiny-long", "prompt": prompt, "extra_body": {**limit, **fields}}
        assert re.fullmatch(pattern, sdk.completions.create(**given).choices[0].text)


CHAT: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": BAD_SCHEMA}}},
        *("response_format.json_schema.schema" + PLACE, "uniqueItems"),
    ),
    ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
    ({"structured_outputs": {"json": BAD_SCHEMA}}, "structured_outputs.json" + PLACE, "uniqueItems"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": BAD_SCHEMA}}]},
        *("tools.0.function.parameters" + PLACE, "uniqueItems"),
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), CHAT)
def test_what_can_not_be_enforced_in_chats(sdk: openai.OpenAI, fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        sdk.chat.completions.create(model="tiny-long", messages=HI, extra_body=fields)
    assert caught.value.param == param


def test_what_can_not_be_enforced_elsewhere(sdk: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": BAD_SCHEMA}}
    tools: Any = [
        {"type": "web_search"},
        {"type": "function", "name": "f", "strict": True, "parameters": BAD_SCHEMA},
    ]
    for fields, param in (({"text": form}, "text.format.schema"), ({"tools": tools}, "tools.1.parameters")):
        with pytest.raises(openai.BadRequestError) as caught:
            sdk.responses.create(model="tiny-long", input="hi", **fields)
        assert caught.value.param == param + PLACE
    with pytest.raises(anthropic.BadRequestError, match="uniqueItems"):
        claude.messages.create(
            model="tiny-long",
            messages=HI,
            max_tokens=9,
            output_config={"format": {"type": "json_schema", "schema": dict(BAD_SCHEMA)}},
        )
