"""Tools in the prompt of a model whose chat template knows nothing of them.

Definitions go to the end of the system text, in the words that the model was trained with: DeepSeek-V3.1's model card
shows its own, which V3 and R1 get with their way to write a call; all others get Qwen's, which many models know. Calls
and results become plain turns. A model that was never trained for tools may still not use them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from kvern.text.formats import SEPARATOR, V3, CallFormat

Value: TypeAlias = dict[str, Any]


def add_definitions(messages: Sequence[Value], tools: Sequence[Value], format: CallFormat) -> list[Value]:
    """Put the tools' definitions behind the first system message, or make one of them."""
    if not tools:
        return list(messages)
    functions = [tool["function"] for tool in tools]
    text = _deepseek(functions, format) if format.section[0] else _qwen(tools)
    at = next((index for index, message in enumerate(messages) if message["role"] == "system"), None)
    if at is None:
        return [{"role": "system", "content": text}, *messages]
    joined = {**messages[at], "content": f"{messages[at]['content']}\n\n{text}"}
    return [*messages[:at], joined, *messages[at + 1 :]]


def as_plain_turns(messages: Sequence[Value]) -> list[Value]:
    """Write calls into the assistant's text, and results into a turn of the user's."""
    turns: list[Value] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if index and messages[index - 1]["role"] == "tool":
                turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{text}"}
            else:
                turns.append({"role": "user", "content": text})
        elif "tool_calls" in message:
            written = [message["content"] or "", *(_call(call["function"]) for call in message["tool_calls"])]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            turns.append({**rest, "content": "\n".join(part for part in written if part)})
        else:
            turns.append(message)
    return turns


def _call(function: Value) -> str:
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}\n</tool_call>'


def _qwen(tools: Sequence[Value]) -> str:
    return "\n".join(
        [
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n",
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
            *(_json(tool) for tool in tools),
            "</tools>\n\nFor each function call, return a json object with function name and arguments within "
            "<tool_call></tool_call> XML tags:",
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
        ]
    )


def _deepseek(functions: Sequence[Value], format: CallFormat) -> str:
    (section, end), (call, call_end) = format.section, format.call
    example = f"tool_call_name{SEPARATOR}tool_call_arguments"
    between = "chain them directly without separators or spaces"
    if format is V3:
        example = f"function{SEPARATOR}tool_call_name\n```json\ntool_call_arguments\n```"
        between = "write each on a new line"
    return "\n".join(
        [
            "## Tools\nYou have access to the following tools:\n",
            *(_deepseek_tool(function) for function in functions),
            "IMPORTANT: ALWAYS adhere to this exact format for tool use:",
            f"{section}{call}{example}{call_end}{{additional_tool_calls}}{end}\n",
            "Where:\n",
            "- `tool_call_name` must be an exact match to one of the available tools",
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema",
            f"- For multiple tool calls, {between}",
        ]
    )


def _deepseek_tool(function: Value) -> str:
    description = function.get("description") or ""
    return f"### {function['name']}\nDescription: {description}\n\nParameters: {_json(function['parameters'])}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
