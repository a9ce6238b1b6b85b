"""`kvern chat`: a conversation in the terminal, with a model in this process or behind a URL.

On a terminal it goes on until /exit; otherwise standard input is one message, and only the answer goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from kvern.errors import BadRequestError
from kvern.text.messages import Message

HELP = "Talk to a model here, or to any OpenAI-compatible server. /reset starts again, /exit leaves."
EXAMPLES = """\
kvern chat                                     the default model, in this process
kvern chat nano                                the model that ships with Kvern: nothing to pull
kvern chat http://127.0.0.1:8000               a server
kvern chat --url https://gpu-box/v1 --model deepseek-v3
echo 'Explain MLA in a sentence' | kvern chat --temperature 0
"""
DEFAULT_MODEL = "coder-0.5b"
KEY_VARIABLE = "KVERN_API_KEY"


class Speaker(Protocol):
    """LLM and Client, as far as a conversation needs them."""

    def stream(self, messages: list[Message], **sampling: Any) -> Iterator[str]:
        """Answer piece by piece."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("target", nargs="?", metavar="MODEL|URL", help=f"who answers (default: {DEFAULT_MODEL})")
    parser.add_argument("--url", help=f"an OpenAI-compatible server; its key, if any, in {KEY_VARIABLE}")
    parser.add_argument("--model", help="the model here, or the one to ask the server for (there: the first listed)")
    parser.add_argument("--system", metavar="TEXT", help="instructions that precede the conversation")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: up to the context's end)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's own)")


def run(args: argparse.Namespace) -> int:
    """Converse until the end of the input."""
    speaker = _speaker(args)
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    start = [Message("system", args.system)] if args.system else []
    if sys.stdin.isatty():
        return _converse(speaker, start, sampling)
    text = sys.stdin.read().strip()
    if not text:
        raise BadRequestError("there is no message on standard input", hint="echo 'Hello' | kvern chat")
    _answer(speaker, [*start, Message("user", text)], sampling)
    return 0


def _speaker(args: argparse.Namespace) -> Speaker:
    if args.target and args.url:
        raise BadRequestError("name a model or a URL, not both")
    behind_url = args.url or (args.target or "").startswith(("http://", "https://"))
    target = args.target or args.url or args.model or DEFAULT_MODEL
    if behind_url:
        from kvern.client import Client

        return Client(target, model=args.model, api_key=os.environ.get(KEY_VARIABLE))
    if args.target and args.model:
        raise BadRequestError("two models are named", hint=f"kvern chat {args.model}")
    from kvern.checkpoint.progress import progress_bar
    from kvern.llm import LLM, resolve

    with progress_bar() as progress:
        resolve(target, progress)
    return LLM(target)


def _converse(speaker: Speaker, start: list[Message], sampling: dict[str, Any]) -> int:
    conversation = list(start)
    print("/reset starts again, /exit leaves", file=sys.stderr)
    while (text := _read_line()) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            conversation = list(start)
        elif text.startswith("/"):
            print(f"unknown command {text!r}: there are /reset and /exit", file=sys.stderr)
        elif text:
            conversation.append(Message("user", text))
            conversation.append(Message("assistant", _answer(speaker, conversation, sampling)))
    return 0


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _answer(speaker: Speaker, conversation: list[Message], sampling: dict[str, Any]) -> str:
    """Print the answer as it comes; return it."""
    pieces = []
    for piece in speaker.stream(conversation, **sampling):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)
