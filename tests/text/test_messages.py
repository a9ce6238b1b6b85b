from __future__ import annotations

from typing import Any

import pytest

from kvern.errors import BadRequestError
from kvern.text.messages import Message, ToolCall, as_messages
from kvern.text.options import SamplingOptions


def test_absent_fields_are_absent_for_the_template() -> None:
    assert Message("user", "hi").as_template_value() == {"role": "user", "content": "hi"}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert Message("assistant", tool_calls=(ToolCall("c1", "f", "{}"),)).as_template_value() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
    }


def test_as_messages_reads_the_three_forms() -> None:
    expected = [Message("user", "hi")]
    assert as_messages("hi") == as_messages(expected) == as_messages([{"role": "user", "content": "hi"}]) == expected


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 1}], "messages.0.content"),
        ([{"role": "user", "content": "x", "colour": 1}], "messages.0.colour"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}], "messages.0.tool_calls"),
    ],
)
def test_bad_messages_name_the_field(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        as_messages(messages)
    assert caught.value.param == param


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingOptions.of(stop="x").stop == ("x",)
