"""A model that acts a part: what it writes is decided by what it is asked. All else of the server is real."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.scripted import ScriptedEngine
from tests.server.serving import serving

from kvern.engine import SamplingParams, Update
from kvern.llm import LLM

CONTEXT = 400_000
"""In tokens of the tiny model, each hardly more than a byte."""

MODEL = "coder-0.5b"
"""The name that the pages use."""

RESULT = "<tool_response>"
"""How the prompt begins what a tool returned."""


class Actor(ScriptedEngine):
    """Writes `plays(prompt)`, and remembers the prompts. Set `llm` and `plays` before the first request."""

    llm: LLM
    plays: Callable[[str], str]

    def __init__(self) -> None:
        super().__init__(max_context=CONTEXT)
        self.prompts: list[str] = []
        self._scripts: dict[int, list[int]] = {}
        self._entering = threading.Lock()
        """Requests come from the event loop's thread, steps from the engine's."""

    def add(self, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0, salt: bytes = b"") -> int:
        self.prompts.append(self.llm.tokenizer.decode(prompt))
        written = self.llm.tokenizer.encode(self.plays(self.prompts[-1]))
        with self._entering:
            number = super().add(prompt, params, priority=priority, salt=salt)
            self._scripts[number] = [*written, self.llm.tokenizer.control["<|end|>"]]
        return number

    def step(self) -> list[Update]:
        with self._entering:
            return super().step()

    def _draw(self, number: int) -> Update:
        self.script = self._scripts[number]
        return super()._draw(number)


@dataclass(frozen=True)
class Stage:
    """A server whose model acts."""

    url: str
    actor: Actor


@contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """Serve an actor, with the text files of a tiny checkpoint in `folder`, whose name is the model's."""
    actor = Actor()
    actor.llm = LLM(folder, engine=actor)
    with serving(lambda: actor.llm, settings={"max_body_bytes": 8 << 20}) as server:
        yield Stage(server.url, actor)


def call(name: str, **arguments: Any) -> str:
    """A call in the tiny model's words."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
