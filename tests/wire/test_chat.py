from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.errors import BadRequestError, BusyError, KvernError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, ScoredToken, TokenScore, Tool, ToolCall
from kvern.text.options import SamplingOptions
from kvern.wire.answers import error_body
from kvern.wire.chat import NOT_SUPPORTED_YET, ChoiceLogprobs, parse_chat_request

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA: Any = {"name": "n", "schema": {"type": "object"}}
DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"a": DEEP}


def parse(**changes: Any) -> Any:
    return parse_chat_request(json.dumps({**HI, **changes}).encode())


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y", **fields}]}


def test_a_full_request_is_translated() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ann"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
    ]
    request = parse(messages=messages, max_tokens=5, temperature=0, top_p=0.5, seed=3, stop=["x", "y"], user="ann")
    assert request.to_conversation() == Conversation(
        (Message("system", "Be brief."), Message("user", "ab", name="ann"), Message("assistant", "c"))
    )
    assert request.to_options() == SamplingOptions(5, 0.0, 0.5, 3, ("x", "y"))


def test_tools_are_translated() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    request = parse(
        messages=[
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{**CALL, "index": 0}], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "7"}]},
        ],
        tools=[TOOL, {"type": "function", "function": {"name": "g", "description": "d", "parameters": schema}}],
        tool_choice={"type": "function", "function": {"name": "g"}},
        parallel_tool_calls=False,
    )
    assert request.to_conversation() == Conversation(
        (
            Message("user", "x"),
            Message("assistant", None, tool_calls=(ToolCall("c1", "f", "{}"),), reasoning_content="hm"),
            Message("tool", "7", tool_call_id="c1"),
        ),
        (Tool("f", None, {}), Tool("g", "d", schema)),
        NamedTool("g"),
        False,
    )
    for choice in ("none", "auto", "required"):
        assert parse(tools=[TOOL], tool_choice=choice).to_conversation().tool_choice == choice


def test_null_equals_absent_everywhere() -> None:
    nulls = dict.fromkeys(
        [*NOT_SUPPORTED_YET, "tools", "tool_choice", "stop", "temperature", "max_tokens", "stream", "stream_options"]
    )
    assert parse(**nulls) == parse()


def test_values_that_ask_for_nothing_are_accepted() -> None:
    for name, values in NOT_SUPPORTED_YET.items():
        for value in values:
            assert parse(**{name: value}) == parse()
    assert parse(frequency_penalty=0.0) == parse()


def test_every_sampling_field_arrives() -> None:
    given = {
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"3": -100, "0": 2.5},
        "seed": -4,
        "stop": "x",
        "stop_token_ids": [9],
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert parse(**given).to_options() == SamplingOptions(
        7, 0.5, 0.9, -4, ("x",), 2, 4, 0.1, 1.0, -1.5, 1.2, ((3, -100.0), (0, 2.5)), (9,), True, 5
    )
    assert parse(logprobs=True).to_options().logprobs == 0
    assert parse().to_options() == SamplingOptions()


def test_logprobs_name_what_shows() -> None:
    scores = (
        ScoredToken("a", b"a", -0.5, (TokenScore("\ufffd", b"\xe4", float("-inf")),), 0),
        ScoredToken("<|end|>", b"<|end|>", -1.0, (), 1, ends=True),
    )
    assert ChoiceLogprobs.of(scores).model_dump()["content"] == [
        {
            "token": "a",
            "bytes": [97],
            "logprob": -0.5,
            "top_logprobs": [{"token": "\ufffd", "bytes": [0xE4], "logprob": -9999.0}],
        }
    ]


BAD = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": "a\x00b"}, "model"),
    ({"model": 3}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": None}, "messages"),
    (message(role="robot"), "messages.1.role"),
    (message(role="tool"), "messages.1.tool_call_id"),
    (message(role="function"), "messages.1.role"),
    (message(tool_call_id="c"), "messages.1.tool_call_id"),
    (message(content=None), "messages.1.content"),
    (message(content=7), "messages.1.content"),
    (message(content=[]), "messages.1.content"),
    (message(content=[{"type": "image_url", "image_url": {"url": "x"}}]), "messages.1.content.0.type"),
    (message(content=[{"type": "text", "text": 1}]), "messages.1.content.0.text"),
    (message(content="a\ud800"), "messages.1.content"),
    (message(contents="x"), "messages.1.contents"),
    (message(tool_calls=[{}]), "messages.1.tool_calls.0.id"),
    (message(tool_calls=[CALL]), "messages.1.tool_calls"),
    (message(role="assistant", tool_calls=[{**CALL, "type": "custom"}]), "messages.1.tool_calls.0.type"),
    (
        message(role="assistant", tool_calls=[{**CALL, "function": {"name": "f"}}]),
        "messages.1.tool_calls.0.function.arguments",
    ),
    (message(role="assistant", content=None, tool_calls=[]), "messages.1.content"),
    (message(role="tool", tool_call_id="c", content=None), "messages.1.content"),
    (message(name="\n"), "messages.1.name"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 1}, "stop"),
    ({"stop": ["\udc00"]}, "stop.0"),
    ({"user": "\udc00"}, "user"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": ["x", 1]}, "stop.1"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": True}}, "stream_options.x"),
    ({"user": "\x1b[31m"}, "user"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"n": 10**400}, "n"),
    ({"logprobs": 0}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"frequency_penalty": 2.1}, "frequency_penalty"),
    ({"presence_penalty": "1"}, "presence_penalty"),
    ({"presence_penalty": 10**400}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"\ud800": 1}}, "logit_bias." + 3 * "\ufffd"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
    ({"priority": 2**31}, "priority"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"cache_salt": "mine"}, "cache_salt"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"tools": {}}, "tools"),
    ({"tools": ["f"]}, "tools.0"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [TOOL, {"type": "web_search"}]}, "tools.1.type"),
    ({"tools": [{**TOOL, "function": {}}]}, "tools.0.function.name"),
    ({"tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": []}}]}, "tools.0.function.parameters"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": {"a": "\ud800"}}}]}, "tools.0.function.parameters"),
    ({"tools": [{**TOOL, "function": {"name": "f", "parameters": DEEP}}]}, "tools.0.function.parameters"),
    ({"tools": [{**TOOL, "function": {"name": "f", "schema": {}}}]}, "tools.0.function.schema"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"response_format": {"type": "json"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": SCHEMA}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {**SCHEMA, "name": "a b"}}},
        "response_format.json_schema.name",
    ),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": {}, "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_json": "[1]"}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [""]}, "guided_choice.0"),
    ({"guided_grammar": ""}, "guided_grammar"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"temprature": 0}, "temprature"),
    ({"list": 0}, "list"),
    ({"(list)": 0}, "(list)"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
]


@pytest.mark.parametrize(("changes", "param"), BAD)
def test_bad_fields_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(**changes)
    assert caught.value.param == param
    assert any(part in caught.value.message for part in param.split("."))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse_chat_request(body)


def test_overflowing_numbers_are_refused() -> None:
    body = json.dumps({**HI, "temperature": "?"}).replace('"?"', "1e999").encode()
    with pytest.raises(BadRequestError) as caught:
        parse_chat_request(body)
    assert caught.value.param == "temperature"


def test_a_misspelt_field_gets_a_hint() -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(temprature=0)
    assert caught.value.hint == "did you mean 'temperature'?"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    "logit_bias",
    "stop_token_ids",
    "top_logprobs",
    "model",
    "messages",
    "stop",
    "stream_options",
    "temperature",
    "tools",
    "n",
    "seed",
    "max_tokens",
    "stream",
    "x",
]


@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), content=JSON)
def test_any_json_is_read_or_refused(changes: dict[str, Any], content: Any) -> None:
    with suppress(BadRequestError):
        parse(**{**message(content=content), **changes})


def test_error_envelope() -> None:
    assert error_body(BadRequestError("no", hint="do", param="n")).model_dump() == {
        "error": {"message": "no (do)", "type": "invalid_request_error", "param": "n", "code": "invalid_request_error"}
    }
    assert error_body(KvernError("x")).error.type == "server_error"
    assert error_body(BusyError("x", retry_after=1)).error.type == "rate_limit_error"


@pytest.mark.parametrize(
    "body",
    [
        {**HI, "messages": [1] * 1_000_000},
        {**HI, "messages": [{"role": "user", "content": [1] * 1_000_000}]},
        {**HI, **{f"{number:x}": 1 for number in range(200_000)}},
        {**HI, "logit_bias": {f"{number:x}z": 1 for number in range(200_000)}},
    ],
    ids=["messages", "parts", "fields", "biases"],
)
def test_a_body_of_a_million_mistakes_is_refused_at_the_first(body: dict[str, Any]) -> None:
    text = json.dumps(body).encode()
    begun = time.process_time()
    with pytest.raises(BadRequestError):
        parse_chat_request(text)
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("can_think", [True, False])
def test_an_effort_asks_to_think_where_the_model_can(can_think: bool) -> None:
    def thinks(**fields: Any) -> bool | None:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
        return parse_chat_request(json.dumps(body).encode()).to_conversation(can_think).thinking

    assert thinks() is None
    assert thinks(reasoning_effort="none") is False
    assert thinks(reasoning_effort="high") is (True if can_think else None)
    assert thinks(reasoning_effort="high", thinking={"type": "disabled"}) is False
    assert thinks(reasoning_effort="none", thinking={"type": "enabled"}) is True
