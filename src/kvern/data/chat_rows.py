"""A conversation as rows of ids in which only the assistant's answers are learned.

    row       <user>Hi<assistant>Hello.<end><user>Bye<assistant>Ciao.<end>
    learned   .      .          Hello.<end>      .          Ciao.<end>

Each answer comes behind exactly the ids that serving would ask for it with (`ChatTemplate.prompt`), and is learned to
its end token. A template may show a turn of the past differently, mostly without its reasoning; then an answer cannot
stand in one row with the one before it, and begins a row of its own that repeats the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvern.errors import BadRequestError
from kvern.text.conversation import Conversation
from kvern.text.template import ChatTemplate
from kvern.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatIds:
    """ids, and which of them are learned."""

    ids: list[int]
    learned: list[bool]


def chat_rows(chat: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> Iterator[ChatIds]:
    """The rows of a conversation: one, or more where answers do not show again. Raises BadRequestError."""
    if chat.messages[-1].role != "assistant":
        raise BadRequestError("a chat must end with the assistant's answer", param=f"messages.{len(chat.messages) - 1}")
    row = ChatIds([], [])
    for index, message in enumerate(chat.messages):
        if message.role != "assistant":
            continue
        prompt, answer = template.answered(replace(chat, messages=chat.messages[:index]), message)
        answer = answer[: _end(answer, tokenizer) + 1]
        if row.ids and prompt[: len(row.ids)] != row.ids:
            yield row
            row = ChatIds([], [])
        asked = prompt[len(row.ids) :]
        row = ChatIds(prompt + answer, row.learned + [False] * len(asked) + [True] * len(answer))
    yield row


def _end(answer: list[int], tokenizer: Tokenizer) -> int:
    """The place of the end token: the last control token, behind which a template may write white space."""
    control = set(tokenizer.control.values())
    place = next((place for place in range(len(answer) - 1, -1, -1) if answer[place] in control), -1)
    if place < 0 or b"".join(map(tokenizer.token_bytes, answer[place + 1 :])).strip():
        raise BadRequestError("the chat template writes no token that ends an answer", param="messages")
    return place
