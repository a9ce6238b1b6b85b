"""What Anthropic's requests become, beside DeepSeek's own translation of them (deepseek-recipe)."""

from __future__ import annotations

import json
from typing import Any

import deepseek_recipe
import pytest

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, Tool, ToolCall
from kvern.wire.anthropic import MessagesRequest, parse_count_request, parse_messages_request

BODY: dict[str, Any] = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
TOOL: dict[str, Any] = {"name": "get", "description": "d", "input_schema": {"type": "object", "properties": {}}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get", "input": {"a": "é"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "42"}
ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [CALL]}]


def parse(**changes: Any) -> MessagesRequest:
    return parse_messages_request(json.dumps({**BODY, **changes}).encode())


def conversation(**changes: Any) -> Conversation:
    return parse(**changes).to_conversation()


def theirs(**changes: Any) -> list[tuple[Any, ...]]:
    """Role, content, reasoning and calls, as deepseek-recipe reads them."""
    request = deepseek_recipe.MessagesRequest({**BODY, "model": "DeepSeek-V4.1-Flash", **changes})
    messages = request.convert(deepseek_recipe.ConversionOptions()).conversation.messages
    return [
        (one.role, one.content or None, one.reasoning_content or None, one.tool_call_id, _calls(one.tool_calls))
        for one in messages
    ]


def ours(**changes: Any) -> list[tuple[Any, ...]]:
    return [
        (one.role, one.content or None, one.reasoning_content or None, one.tool_call_id, _calls(one.tool_calls))
        for one in conversation(**changes).messages
    ]


def _calls(calls: Any) -> list[tuple[str, Any]]:
    return [(one.name, json.loads(one.arguments)) for one in calls or ()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"system": "be kind"},
        {
            "system": [
                {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "b"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, BODY["messages"][0]]},
        {
            "messages": [*ASKED, {"role": "user", "content": [RESULT, {"type": "text", "text": "go on"}]}],
            "tools": [TOOL],
        },
        {
            "messages": [
                *ASKED,
                {"role": "user", "content": [{**RESULT, "content": [{"type": "text", "text": "x"}] * 2}]},
            ]
        },
        {
            "messages": [
                ASKED[0],
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "text", "text": "a"},
                        {"type": "text", "text": "b"},
                        CALL,
                        {**CALL, "id": "toolu_2"},
                    ],
                },
                {"role": "user", "content": [RESULT, {**RESULT, "tool_use_id": "toolu_2"}]},
            ]
        },
    ],
)
def test_a_conversation_becomes_what_deepseek_makes_of_it(changes: dict[str, Any]) -> None:
    assert ours(**changes) == theirs(**changes)


def test_everything_at_once() -> None:
    request = parse(
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=abc"},
            {"type": "text", "text": "be kind"},
        ],
        tools=[{**TOOL, "strict": True, "cache_control": {"type": "ephemeral", "ttl": "1h"}, "defer_loading": False}],
        tool_choice={"type": "tool", "name": "get", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        service_tier="auto",
        container=None,
        mcp_servers=[],
        stream=True,
    )
    assert request.to_conversation() == Conversation(
        (Message("system", "be kind"), Message("user", "hi")),
        tools=(Tool("get", "d", TOOL["input_schema"], True),),
        tool_choice=NamedTool("get"),
        parallel_tool_calls=False,
        thinking=True,
    )
    options = request.to_options()
    assert (options.temperature, options.top_p, options.top_k, options.stop) == (0.5, 0.9, 40, ("END",))
    assert options.max_tokens is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none"), (None, "auto")],
)
def test_tool_choice(given: Any, meant: str) -> None:
    assert conversation(tool_choice=given, tools=[TOOL]).tool_choice == meant


@pytest.mark.parametrize(
    ("kind", "thinks"), [("enabled", True), ("disabled", False), ("adaptive", None), ("between_tools", None)]
)
def test_thinking(kind: str, thinks: bool | None) -> None:
    assert conversation(thinking={"type": kind}).thinking is thinks
    assert conversation().thinking is None


def test_turns() -> None:
    mixed = conversation(
        messages=[
            *ASKED,
            {"role": "user", "content": [{"type": "text", "text": "a"}, {**RESULT, "is_error": True}]},
            {"role": "system", "content": "s"},
            {
                "role": "assistant",
                "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "so"}],
            },
        ]
    )
    assert mixed.messages == (
        Message("user", "hi"),
        Message("assistant", None, tool_calls=(ToolCall("toolu_1", "get", '{"a": "é"}'),)),
        Message("tool", "Error: 42", tool_call_id="toolu_1"),
        Message("user", "a"),
        Message("system", "s"),
        Message("assistant", "so"),
    )
    assert mixed.continues
    assert conversation(messages=[{"role": "user", "content": []}]).messages == (Message("user", ""),)


def test_a_count_needs_no_max_tokens() -> None:
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    assert parse_count_request(json.dumps(body).encode()).to_conversation() == conversation()
    with pytest.raises(BadRequestError, match="max_tokens is missing"):
        parse_messages_request(json.dumps(body).encode())


USER = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type", "image blocks"),
        (
            {"messages": [*ASKED, {"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
            "messages.2.content.0.content.0.type",
            "image blocks",
        ),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content.0.type", "may not hold tool_use"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.tool_use_id", "toolu_1"),
        ({"messages": ASKED}, "messages.1.content", "needs its result"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content.0.text",
            "string",
        ),
        ({"messages": [{**USER[0], "prefix": True}]}, "messages.0.prefix", "unknown field"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "1"}, "max_tokens", "integer"),
        ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
        ({"system": [IMAGE]}, "system.0.type", "image blocks"),
        ({"system": [CALL]}, "system.0.type", "'text'"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema", "is missing"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type", "web_search_20250305"),
        ({"tools": [{**TOOL, "input_schema": {"a": "\ud800"}}]}, "tools.0.input_schema", "surrogate"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools.0.input_examples", "not supported"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name", "name goes with"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]}, "tool_choice.name", "no tool 'x'"),
        ({"thinking": {"type": "on"}}, "thinking.type", "'enabled'"),
        ({"thinking": {"type": "enabled", "budget": 1}}, "thinking.budget", "budget_tokens"),
        ({"mcp_servers": [{}]}, "mcp_servers", "not supported"),
        ({"container": "c"}, "container", "not supported"),
        ({"stop_sequences": [""]}, "stop_sequences.0", "at least 1"),
        ({"metadata": {"user": "x"}}, "metadata.user", "user_id"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"cache_control": "x"}, "cache_control", "dictionary"),
    ],
)
def test_what_is_refused_by_name(changes: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(**changes)
    assert caught.value.param == param
    assert says in f"{caught.value.message} ({caught.value.hint})"
