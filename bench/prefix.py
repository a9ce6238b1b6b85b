"""Time to the first token of a long prefix: computed, in memory, and read from --cache-dir by a new server.

    python -m bench.prefix [MODEL] [--tokens 16384] [--runs 3]

A real `kvern serve` with a cache folder of its own. Each run sends a prefix of random ids that nobody has seen, then
the same prefix with another question behind it, to the same server; then once more to one that was stopped and
started; then to one that was killed (-9) and started, after the files were put out of the page cache, so that they
really come from the disk. Times are medians of the wall, from the request to its first token, after one short request
that warms the server up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from kvern.bench.tables import show

QUESTION_TOKENS = 24
WRITING_SECONDS = 60.0
CASES = ("cold", "in memory", "stopped and started", "killed, started, from the disk")


@dataclass(frozen=True)
class First:
    """Seconds to a first token, and tokens of the prompt that were cached."""

    seconds: float
    cached: int


class Bench:
    """The servers of one measurement, one after the other over the same folder."""

    def __init__(self, model: str, folder: Path, seed: int) -> None:
        self.model, self.folder, self.chance = model, folder, random.Random(seed)

    def ids(self, count: int) -> list[int]:
        """Random ids of ordinary tokens."""
        return [self.chance.randrange(1000, 20000) for _ in range(count)]

    def ask(self, http: httpx.Client, prefix: Sequence[int]) -> First:
        """One request with the prefix and a new question behind it."""
        asked = {
            "model": http.get("/v1/models").json()["data"][0]["id"],
            "prompt": [*prefix, *self.ids(QUESTION_TOKENS)],
        }
        options = {"max_tokens": 2, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        begun, first, cached = time.monotonic(), None, 0
        with http.stream("POST", "/v1/completions", json={**asked, **options}) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.monotonic()
                    usage = json.loads(line[6:]).get("usage") or {}
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", cached)
        assert first is not None, "the answer was empty"
        return First(first - begun, cached)

    @contextmanager
    def server(self, how_it_ends: signal.Signals = signal.SIGTERM) -> Iterator[httpx.Client]:
        """A server that is ready and warm."""
        options = ["--port", "0", "--store", str(self.folder / "store"), "--cache-dir", str(self.folder / "prefixes")]
        argv = [sys.executable, "-m", "kvern", "serve", self.model, *options]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                found = re.search(r"http://\S+:\d+", process.stdout.readline())
                assert found is not None, "the server did not start"
                with httpx.Client(base_url=found[0], timeout=3600) as http:
                    self.ask(http, [])
                    yield http
            finally:
                process.send_signal(how_it_ends)

    def run(self, tokens: int) -> list[First]:
        """One number a case."""
        prefix = self.ids(tokens)
        with self.server() as http:
            found = [self.ask(http, prefix), self.ask(http, prefix)]
        with self.server(signal.SIGKILL) as http:
            found.append(self.ask(http, prefix))
            wait_until_written(http)
        put_out_of_memory(self.folder / "prefixes")
        with self.server() as http:
            return [*found, self.ask(http, prefix)]


def wait_until_written(http: httpx.Client) -> None:
    """Until the server has stopped writing."""
    before, deadline = -1.0, time.monotonic() + WRITING_SECONDS
    while time.monotonic() < deadline:
        text = http.get("/metrics").text
        now = float(re.findall(r"^kvern:disk_cache_written_bytes_total\S* (\S+)$", text, re.MULTILINE)[0])
        if now == before:
            return
        before = now
        time.sleep(0.5)


def put_out_of_memory(folder: Path) -> None:
    """Let the system forget the contents of the files, after they are on the disk."""
    os.sync()
    for path in (one for one in folder.rglob("*") if one.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="coder-0.5b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    runs = []
    for seed in range(args.runs):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(Bench(args.model, Path(folder), seed).run(args.tokens))
    medians = [statistics.median(run[case].seconds for run in runs) for case in range(len(CASES))]
    rows = [
        [name, f"{seconds:.3f}", f"{100 * seconds / medians[0]:.2f} %", str(min(run[case].cached for run in runs))]
        for case, (name, seconds) in enumerate(zip(CASES, medians, strict=True))
    ]
    show(([f"prefix of {args.tokens} tokens", "first token s", "of cold", "cached"], rows))


if __name__ == "__main__":
    main()
