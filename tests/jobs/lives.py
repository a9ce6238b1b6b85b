"""Processes that work on batches and are made to be killed.

`python -m tests.jobs.lives FOLDER STORE` loads the model once. For each line on its standard input it forks a process
that serves as `kvern serve` does, over a real engine and without a socket, and prints its number.
"""

from __future__ import annotations

import asyncio
import os
import sys

from kvern.engine import EngineSettings
from kvern.llm import LLM
from kvern.server.app import create_app
from kvern.settings import ServeSettings


async def serve(llm: LLM, store: str) -> None:
    """A server's life, until it is killed."""
    app = create_app(lambda: llm, ServeSettings(store=store, max_running=8))
    async with app.router.lifespan_context(app):
        await asyncio.Event().wait()


def main(folder: str, store: str) -> None:
    """Fork a life for each line of the input."""
    llm = LLM(folder, dtype="f32", threads=1, settings=EngineSettings(max_running=8))
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            asyncio.run(serve(llm, store))
        say(str(child))
        os.waitpid(child, 0)
        say("gone")


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
