"""The hand-over from the engine's thread to the event loop: how many a step, and how long each waits.

    python -m bench.handover [--model coder-0.5b] [--streams 16] [--tokens 64] [--spinning 0]

The engine computes on all cores, so the loop's thread has to get one from the kernels' workers; `--spinning N` adds N
processes that never sleep. The wait is from `deliver`, in the engine's thread, to its callback in the loop. It is
measured in this process with the server's own EngineThread, without HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

from kvern.checkpoint.local import ensure_imported
from kvern.engine import Engine, EngineSettings, SamplingParams
from kvern.engine.request import Update
from kvern.engine.service import EngineThread
from kvern.llm.opening import open_model

SPIN = "while True: pass"


@dataclass
class Handovers:
    """Seconds that each hand-over waited, and the answers that have ended."""

    waits: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0

    def arrived(self, updates: Sequence[Update], sent: float) -> None:
        """In the loop's thread."""
        self.waits.append(time.perf_counter() - sent)
        self.tokens += sum(len(update.tokens) for update in updates)
        self.finished += sum(update.finish is not None for update in updates)


async def measure(engine: Engine, streams: int, tokens: int) -> tuple[Handovers, int]:
    """(hand-overs, steps) of so many answers side by side."""
    loop, seen, draw = asyncio.get_running_loop(), Handovers(), random.Random(0)
    steps = engine.stats().steps

    def deliver(updates: list[Update]) -> None:
        loop.call_soon_threadsafe(seen.arrived, updates, time.perf_counter())

    thread = EngineThread(engine, deliver)
    for _ in range(streams):
        prompt = draw.choices(range(engine.vocab_size), k=32)
        thread.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))
    while seen.finished < streams:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(thread.stop)
    return seen, engine.stats().steps - steps


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coder-0.5b", help="a pulled model's name, or a folder")
    parser.add_argument("--streams", type=int, default=16, help="answers side by side")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each")
    parser.add_argument("--spinning", type=int, default=0, help="busy processes beside it")
    args = parser.parse_args()
    engine = Engine(open_model(ensure_imported(args.model)), settings=EngineSettings(cache_tokens=16384))
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(args.spinning)]
    try:
        start = time.perf_counter()
        seen, steps = asyncio.run(measure(engine, args.streams, args.tokens))
        seconds = time.perf_counter() - start
    finally:
        for process in spinning:
            process.kill()
    micros = [1e6 * wait for wait in seen.waits]
    print(
        f"{args.streams} streams, {args.spinning} busy processes: {seen.tokens} tokens, {steps} steps, {seconds:.1f} s"
    )
    print(f"hand-overs {len(micros)}: {len(micros) / steps:.2f} a step, {seen.tokens / len(micros):.1f} tokens each")
    print(
        f"waited: median {median(micros):.0f} us, 99 % {quantiles(micros, n=100)[98]:.0f} us, most {max(micros):.0f} us"
    )


if __name__ == "__main__":
    main()
