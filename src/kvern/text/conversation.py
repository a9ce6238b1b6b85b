"""All that a chat request says about what to answer: the turns, the tools, and whether to think first.

How to sample is in `text.options`. Every dialect translates its body into a Conversation; the request path reads only
this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvern.text.messages import Message, MessageLike, Tool, ToolChoice, as_messages


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    thinking None: the model's own default. continues: the last message is the beginning of the assistant's answer, and
    the model goes on with it. parallel_tool_calls False: at most one call.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    continues: bool = False


ConversationLike: TypeAlias = Conversation | str | Sequence[MessageLike]


def as_conversation(given: ConversationLike) -> Conversation:
    """Read a conversation, or messages, or one user message. Raises BadRequestError naming the message and field."""
    return given if isinstance(given, Conversation) else Conversation(tuple(as_messages(given)))
