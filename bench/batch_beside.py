"""What interactive requests notice of a batch: latency with and without one that runs beside them.

    python -m bench.batch_beside [MODEL] [--rows 1000] [--requests 20]

A real `kvern serve` of its own, a store in a temporary folder. First interactive requests one after the other on the
idle server, then the same while a batch runs. Prints the time to the first token, between tokens and of the whole
answer (median and 95th percentile, milliseconds), and how many rows ended meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

URL = "/v1/chat/completions"
TOPICS = ("sorting", "hashing", "parsing", "caching", "locking")


@dataclass(frozen=True)
class Timing:
    """Of one request, in seconds."""

    first: float
    between: tuple[float, ...]
    whole: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="coder-0.5b")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--row-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args(argv)
    with server(args.model) as url, httpx.Client(base_url=url, timeout=600) as http:
        name = http.get("/v1/models").json()["data"][0]["id"]
        measure(http, name, 2, args.tokens)
        idle = measure(http, name, args.requests, args.tokens)
        batch = start(http, name, args.rows, args.row_tokens)
        while done(http, batch) < 1:
            time.sleep(0.2)
        begun, before = time.monotonic(), done(http, batch)
        beside = measure(http, name, args.requests, args.tokens)
        took, ended = time.monotonic() - begun, done(http, batch) - before
        report(idle, beside)
        print(f"{ended} of {args.rows} rows ended in the {took:.1f} s of the second measurement")
        begun, before = time.monotonic(), done(http, batch)
        time.sleep(min(took, 30))
        alone = (done(http, batch) - before) / (time.monotonic() - begun)
        print(f"rows a second: {ended / took:.2f} beside interactive requests, {alone:.2f} alone")


@contextmanager
def server(model: str) -> Iterator[str]:
    """The URL of a server that is ready."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "kvern", "serve", model, "--port", "0", "--store", str(Path(folder) / "store")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                match = re.search(r"http://\S+:\d+", process.stdout.readline())
                assert match is not None, "the server did not start"
                yield match[0]
            finally:
                process.terminate()


def start(http: httpx.Client, model: str, rows: int, tokens: int) -> str:
    """Begin a batch; a fifth of the rows share a beginning each."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0}
    lines = []
    for n in range(rows):
        text = f"You know everything about {TOPICS[n % 5]}. " * 12 + f"Question {n}: explain it in {n} words."
        asked = {**body, "messages": [{"role": "user", "content": text}]}
        lines.append(json.dumps({"custom_id": str(n), "method": "POST", "url": URL, "body": asked}))
    files = {"file": ("in.jsonl", "\n".join(lines).encode())}
    file = http.post("/v1/files", data={"purpose": "batch"}, files=files).raise_for_status().json()
    asked = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
    made: dict[str, Any] = http.post("/v1/batches", json=asked).raise_for_status().json()
    return str(made["id"])


def done(http: httpx.Client, batch: str) -> int:
    """Rows that have ended."""
    counts = http.get(f"/v1/batches/{batch}").json()["request_counts"]
    return int(counts["completed"] + counts["failed"])


def measure(http: httpx.Client, model: str, requests: int, tokens: int) -> list[Timing]:
    """Interactive requests, one after the other, at moments that have nothing to do with the steps."""
    timings = []
    for n in range(requests):
        time.sleep(0.05 + 0.013 * (n % 7))
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        asked = {**body, "messages": [{"role": "user", "content": f"{n}: write a Python function that adds {n}."}]}
        begun, arrivals = time.monotonic(), []
        with http.stream("POST", URL, json=asked) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    arrivals.append(time.monotonic())
        between = tuple(two - one for one, two in pairwise(arrivals))
        timings.append(Timing(arrivals[0] - begun, between, arrivals[-1] - begun))
    return timings


def report(idle: Sequence[Timing], beside: Sequence[Timing]) -> None:
    """One line a kind of time."""
    print(f"{'ms':<22}{'idle p50':>10}{'p95':>10}{'beside p50':>12}{'p95':>10}")
    for title, kind in (("first token", "first"), ("between tokens", "between"), ("whole answer", "whole")):
        numbers = [
            f"{1000 * value:.1f}" for timings in (idle, beside) for value in _percentiles(_values(timings, kind))
        ]
        print(f"{title:<22}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>12}{numbers[3]:>10}")


def _values(timings: Sequence[Timing], kind: str) -> list[float]:
    if kind == "between":
        return [gap for one in timings for gap in one.between]
    return [getattr(one, kind) for one in timings]


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=20)[-1]


if __name__ == "__main__":
    main()
