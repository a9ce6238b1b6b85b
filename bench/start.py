"""From the start of a process to the first token: `LLM(model)` in Python, and `kvern serve MODEL`.

    python -m bench.start [--model coder-0.5b] [--runs 5]

Each run is a process of its own. A first one, which is not counted, imports and packs the model where that was never
done, and brings its files into the page cache. Times are seconds of the wall, and of the processor (user and system,
all threads), which a busy machine changes less; both are medians, so the stages need not add up to the total.
Stages of the Python API follow each other: the interpreter with torch's import, Kvern's imports, the tokenizer with the
chat template, the weights (mapped and checked), the engine, the first token of a small chat. The server's are what its
client sees: GET /ready answers 200, then a first piece of text has arrived.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx
from bench.start_llm import QUESTION

from kvern.bench.tables import show
from kvern.llm import served_name

TICKS_A_SECOND = 100
POLL_SECONDS = 0.005
PATIENCE_SECONDS = 600.0
Stages = dict[str, tuple[float, float]]
"""Seconds of wall and of processor time, by stage."""


def start_llm(model: str) -> Stages:
    """One start of the Python API, in a process of its own."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "bench.start_llm", model]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    stages, before = {}, (begin, 0.0)
    for name, *at in json.loads(output):
        stages[name] = (at[0] - before[0], at[1] - before[1])
        before = at
    return {**stages, "all": (before[0] - begin, before[1])}


def start_server(model: str) -> Stages:
    """One start of the server, stopped again after its first answer."""
    port = _free_port()
    begin = time.monotonic()
    command = [sys.executable, "-m", "kvern", "serve", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS) as client:
            _wait_until_ready(client, server)
            ready = (time.monotonic() - begin, _processor_seconds(server.pid))
            _first_piece(client, served_name(model))
            first = (time.monotonic() - begin, _processor_seconds(server.pid))
    finally:
        server.terminate()
        server.wait()
    return {"/ready": ready, "first token": (first[0] - ready[0], first[1] - ready[1]), "all": first}


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_SECONDS)
    raise SystemExit(f"the server did not become ready (exit code {server.poll()})")


def _first_piece(client: httpx.Client, model: str) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "model": model, "max_tokens": 4, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return
    raise SystemExit("the answer had no text")


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def medians(runs: Sequence[Stages]) -> Stages:
    """Stage by stage."""
    return {stage: (median(run[stage][0] for run in runs), median(run[stage][1] for run in runs)) for stage in runs[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="coder-0.5b")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args(arguments)
    for title, start in (("LLM in Python", start_llm), ("kvern serve", start_server)):
        start(args.model)
        found = medians([start(args.model) for _ in range(args.runs)])
        rows = [[name, f"{wall:.2f}", f"{processor:.2f}"] for name, (wall, processor) in found.items()]
        show(([title, "wall s", "processor s"], rows))


if __name__ == "__main__":
    main()
