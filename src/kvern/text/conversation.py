"""All that a chat request says about what to answer: the turns, the tools, and whether to think first.

How to sample is in `text.options`. Every dialect translates its body into a Conversation; the request path reads only
this.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvern.errors import BadRequestError
from kvern.text.messages import Message, MessageLike, NamedTool, Tool, ToolChoice, as_messages
from kvern.text.output_format import OutputFormat

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    thinking None: the model's own default. continues: the last message is the beginning of the assistant's answer, and
    the model goes on with it. parallel_tool_calls False: at most one call. format: what the text of the answer must
    match, behind the reasoning; calls of tools stay possible unless tool_choice says otherwise.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    continues: bool = False
    format: OutputFormat | None = None

    def check(self) -> None:
        """Raise BadRequestError, naming the field, where the parts contradict each other."""
        names = [tool.name for tool in self.tools]
        for index, name in enumerate(names):
            if not TOOL_NAME.fullmatch(name):
                says = "a tool's name must consist of 1 to 128 letters, digits, _, . and -"
                raise BadRequestError(f"{says}, not {name!r}", param=f"tools.{index}.function.name")
            if name in names[:index]:
                raise BadRequestError(f"there are two tools {name!r}", param=f"tools.{index}.function.name")
        if self.tool_choice == "required" and not names:
            raise BadRequestError("tool_choice needs tools", param="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise BadRequestError(f"there is no tool {self.tool_choice.name!r}", param="tool_choice")
        if self.continues and (self.messages[-1].role != "assistant" or self.messages[-1].tool_calls):
            raise BadRequestError("only an assistant's text can be continued", param="messages")
        if self.continues and self.format is not None:
            says = "an answer that is continued can not be held to a format"
            raise BadRequestError(says, hint="leave out the assistant's beginning", param=self.format.param)


ConversationLike: TypeAlias = Conversation | str | Sequence[MessageLike]


def as_conversation(given: ConversationLike) -> Conversation:
    """Read a conversation, or messages, or one user message. Raises BadRequestError naming the message and field."""
    return given if isinstance(given, Conversation) else Conversation(tuple(as_messages(given)))
