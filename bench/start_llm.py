"""One start of the Python API, for bench.start: prints [stage, monotonic clock, processor seconds] at each end.

    python -m bench.start_llm MODEL

It imports nothing before it has to.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

QUESTION = "Write a Python function that reverses a list."


def stages(model: str) -> list[tuple[str, float, float]]:
    """The stages as (name, monotonic clock, processor time) at the end of each."""
    marks: list[tuple[str, float, float]] = []

    def mark(name: str) -> None:
        marks.append((name, time.monotonic(), time.process_time()))

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            mark(name)
            return result

        return call

    import torch  # noqa: F401

    mark("interpreter, torch")
    from kvern.llm import LLM, offline, opening, prepare

    mark("kvern's imports")
    prepare.TextSide.__init__ = marked("tokenizer", prepare.TextSide.__init__)  # type: ignore[method-assign]
    vars(offline)["open_model"] = marked("weights mapped", opening.open_model)
    llm = LLM(model)
    mark("engine")
    next(llm.stream(QUESTION, max_tokens=4))
    mark("first token")
    return marks


if __name__ == "__main__":
    print(json.dumps(stages(sys.argv[1])))
