"""Bodies of /v1/responses: what they become, and every refusal by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.messages import Message, NamedTool, Tool, ToolCall
from kvern.wire.responses import ResponsesRequest, parse_responses_request
from kvern.wire.responses_items import Item, named_response, parse_items, seal, to_messages, with_ids

BODY: dict[str, Any] = {"model": "m", "input": "hi"}
F: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
G: dict[str, Any] = {"type": "function", "name": "g"}
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "c1", "output": "4"}


def parse(**fields: Any) -> tuple[ResponsesRequest, list[Item]]:
    return parse_responses_request(json.dumps({**BODY, **fields}).encode())


def read(**fields: Any) -> Conversation:
    request, items = parse(**fields)
    return request.to_conversation(items)


def messages(items: Any, instructions: str | None = None) -> list[Message]:
    request, read = parse(input=items, instructions=instructions)
    return list(request.to_conversation(read).messages)


def said(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def thought(*text: str, summary: tuple[str, ...] = (), sealed: str | None = None) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": one} for one in text] or None
    parts = [{"type": "summary_text", "text": one} for one in summary]
    return {"type": "reasoning", "id": "rs_1", "summary": parts, "content": content, "encrypted_content": sealed}


F_CALL = ToolCall("c1", "f", '{"a": 1}')


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("hi", [Message("user", "hi")]),
        ([said("user", "hi")], [Message("user", "hi")]),
        (
            [said("developer", "d", type="message"), said("system", "s")],
            [Message("system", "d"), Message("system", "s")],
        ),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}],
            [Message("user", "ab")],
        ),
        (
            [
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "phase": "final_answer",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "a", "annotations": [{"x": 1}], "logprobs": []}],
                },
                said("user", "b"),
            ],
            [Message("assistant", "a"), Message("user", "b")],
        ),
        (
            [said("assistant", ""), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
            [Message("assistant", ""), Message("assistant", "no")],
        ),
        (
            [said("user", "q"), thought("hm"), said("assistant", "let me see"), CALL, OUTPUT],
            [
                Message("user", "q"),
                Message("assistant", "let me see", tool_calls=(F_CALL,), reasoning_content="hm"),
                Message("tool", "4", tool_call_id="c1"),
            ],
        ),
        (
            [CALL, {**CALL, "call_id": "c2", "status": "completed", "id": "fc_9"}, OUTPUT, {**OUTPUT, "call_id": "c2"}],
            [
                Message("assistant", None, tool_calls=(F_CALL, ToolCall("c2", "f", '{"a": 1}'))),
                Message("tool", "4", tool_call_id="c1"),
                Message("tool", "4", tool_call_id="c2"),
            ],
        ),
        (
            [CALL, said("assistant", "then"), {**OUTPUT, "output": [{"type": "input_text", "text": "5"}]}],
            [
                Message("assistant", None, tool_calls=(F_CALL,)),
                Message("assistant", "then"),
                Message("tool", "5", tool_call_id="c1"),
            ],
        ),
        (
            [{"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "*"}, OUTPUT],
            [
                Message("assistant", None, tool_calls=(ToolCall("c1", "patch", '{"input": "*"}'),)),
                Message("tool", "4", tool_call_id="c1"),
            ],
        ),
        (
            [thought(summary=("s",), sealed=seal("in full")), said("assistant", "a")],
            [Message("assistant", "a", reasoning_content="in full")],
        ),
        (
            [thought(summary=("s",), sealed="gAAAA of another server"), said("assistant", "a")],
            [Message("assistant", "a", reasoning_content="s")],
        ),
        ([thought("lost"), said("user", "q")], [Message("user", "q")]),
    ],
)
def test_items_become_turns(items: Any, expected: list[Message]) -> None:
    assert messages(items) == expected


def test_instructions_come_first() -> None:
    assert messages("hi", "be brief") == [Message("system", "be brief"), Message("user", "hi")]


NOT_FUNCTIONS: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": True},
    {"type": "local_shell"},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    {"type": "namespace", "name": "mcp", "tools": [F]},
    {"type": "mcp", "server_label": "x", "server_url": "https://x"},
    {"type": "a_tool_of_next_year"},
]


def test_tools_that_are_no_functions_are_left_out() -> None:
    request, items = parse(tools=[*NOT_FUNCTIONS, {**F, "description": "d", "strict": True, "defer_loading": True}, G])
    conversation = request.to_conversation(items)
    assert conversation.tools == (Tool("f", "d", {"type": "object"}, True), Tool("g", None, {}))
    assert (conversation.tool_choice, conversation.parallel_tool_calls) == ("auto", True)
    assert [tool.echo()["name"] for tool in request.functions] == ["f", "g"]


@pytest.mark.parametrize(
    ("given", "choice", "names"),
    [
        ("none", "none", "fg"),
        ("auto", "auto", "fg"),
        ("required", "required", "fg"),
        ({"type": "function", "name": "g"}, NamedTool("g"), "fg"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [G]}, "auto", "g"),
        ({"type": "allowed_tools", "mode": "required", "tools": [F, {"type": "web_search"}]}, "required", "f"),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "auto", ""),
    ],
)
def test_the_choice_of_tools(given: Any, choice: Any, names: str) -> None:
    request, items = parse(tools=[F, G, *NOT_FUNCTIONS], tool_choice=given)
    conversation = request.to_conversation(items)
    assert conversation.tool_choice == choice
    assert "".join(tool.name for tool in conversation.tools) == names


def test_thinking_and_sampling() -> None:
    for effort, thinking in ((None, None), ("none", False), ("minimal", True), ("high", True)):
        request, items = parse(reasoning={"effort": effort, "summary": None})
        assert request.to_conversation(items).thinking is thinking
        assert request.to_conversation(items, can_think=False).thinking is (None if thinking else thinking)
    request, _ = parse(max_output_tokens=9, temperature=0, top_p=0.5, seed=3)
    assert request.to_options().changes() == {"max_tokens": 9, "temperature": 0, "top_p": 0.5, "seed": 3}
    request, _ = parse(include=["message.output_text.logprobs"], top_logprobs=2)
    assert request.to_options().logprobs == 2


CODEX: dict[str, Any] = {
    "model": "m",
    "instructions": "You are Codex.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "say hi"}]},
    ],
    "tools": [
        {**F, "name": "shell", "strict": False, "description": "Runs.", "output_schema": {}},
        *NOT_FUNCTIONS,
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-abc",
    "client_metadata": {"x-codex-installation-id": "1"},
}


def test_what_codex_sends() -> None:
    request, items = parse_responses_request(json.dumps(CODEX).encode())
    conversation = request.to_conversation(items)
    assert [message.role for message in conversation.messages] == ["system", "system", "user"]
    assert [tool.name for tool in conversation.tools] == ["shell"]
    assert (request.store, request.stream, conversation.parallel_tool_calls) == (False, True, False)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "nothing to answer"),
        ({"input": None}, "input", "missing"),
        ({"input": 1}, "input", "valid string"),
        ({"input": ["x"]}, "input.0", "valid dictionary"),
        ({"input": [{"role": "user"}]}, "input.0.content", "missing"),
        ({"input": [said("robot", "x")]}, "input.0.role", "'user', 'assistant'"),
        ({"input": [said("user", "\ud800")]}, "input.0.content", "surrogate"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text", "missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
            "input.0.content.0.type",
            "'input_image'",
        ),
        ({"input": [{"type": "computer_call"}]}, "input.0.type", "'computer_call' are not supported"),
        ({"input": [{"type": {}, "content": 1}]}, "input.0.type", "not supported"),
        ({"input": [{**CALL, "arguments": {}}]}, "input.0.arguments", "string"),
        ({"input": [OUTPUT]}, "input", "call_id 'c1'"),
        ({"input": [CALL, {**OUTPUT, "output": None}]}, "input.1.output", "missing"),
        ({"input": [CALL, {**OUTPUT, "output": [{"type": "input_file"}]}]}, "input.1.output.0.type", "'input_file'"),
        ({"tools": [{}]}, "tools.0.type", "missing"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "missing"),
        ({"tools": [{**F, "name": "a b"}]}, "tools.0.name", "match"),
        ({"tools": [F, F]}, "tools.1.name", "two tools"),
        ({"tools": [{**F, "parameters": {"\ud800": 1}}]}, "tools", "surrogate"),
        ({"tool_choice": "required"}, "tool_choice", "needs a tool"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "not in tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "'web_search'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools", "missing"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [F]}}, "tool_choice.tools", "not in tools"),
        (
            {"tools": [F], "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}},
            "tool_choice.tools",
            "needs a tool",
        ),
        ({"truncation": "auto"}, "truncation", "nothing is ever cut off"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"text": {"format": {"type": "json_object", "name": "n"}}}, "text.format.name", "goes with type json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "missing"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "none"),
        ({"reasoning": {"efort": "low"}}, "reasoning.efort", "did you mean 'effort'"),
        ({"include": ["x"]}, "include.0", "input should be"),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
        ({"background": True, "store": False}, "background", "needs store"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"previous_response_id": "a b"}, "previous_response_id", "match"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", "chat"),
        ({"inputs": "x"}, "inputs", "did you mean 'input'"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read(**fields)
    assert caught.value.param == param
    assert says in f"{caught.value.message} ({caught.value.hint})"


def test_ids_are_kept_or_made_and_name_their_response() -> None:
    items = with_ids(parse_items([said("user", "a", id="msg_mine"), said("user", "b"), CALL]), "ab" * 12)
    assert [item["id"] for item in items] == ["msg_mine", f"msg_{'ab' * 12}i0001", f"fc_{'ab' * 12}i0002"]
    assert named_response(items[1]["id"]) == f"resp_{'ab' * 12}"
    assert named_response("msg_mine") is None


ITEMS = st.lists(
    st.sampled_from([said("user", "u"), said("assistant", "a"), said("system", "s"), CALL, OUTPUT, thought("r")]),
    max_size=12,
)


@given(ITEMS)
def test_no_text_is_lost_and_parsing_again_changes_nothing(items: list[dict[str, Any]]) -> None:
    read = with_ids(parse_items(items), "0" * 24)
    again = parse_items(json.loads(json.dumps(read)))
    assert again == read
    first_output = next((at for at, item in enumerate(items) if item is OUTPUT), len(items))
    if CALL not in items[:first_output] and OUTPUT in items:
        with pytest.raises(BadRequestError):
            to_messages(read, None)
        return
    turns = to_messages(read, None)
    texts = [turn.content for turn in turns if turn.content is not None]
    assert texts == [item.get("content", item.get("output")) for item in items if item is OUTPUT or "role" in item]
    assert sum(len(turn.tool_calls) for turn in turns) == items.count(CALL)
