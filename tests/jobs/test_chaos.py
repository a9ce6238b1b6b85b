"""SIGKILL at random moments: no row is lost, none is there twice, all are in order and as if nothing had happened.

Two kinds of victims over a real engine: whole `kvern serve` processes, and the same server without its socket, forked
from one that has loaded the model, which makes fifty deaths cheap.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.server.serving import wait_until

from kvern.llm import LLM
from kvern.store import Store, batch_rows, batches, files
from kvern.store.batches import Batch

log = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
URL = "/v1/completions"
Victim = Callable[[], None]
"""Lives for a random while, then is killed."""


@dataclass
class Chaos:
    """Batches in a store, and what is known of their rows."""

    store: Store
    expected: Callable[[list[str]], list[str]]
    kills: int = 0
    seen: dict[tuple[str, int], bytes] = field(default_factory=dict)
    made: dict[str, list[str]] = field(default_factory=dict)

    def batch(self, rows: int) -> str:
        """Make a batch of so many rows; some begin alike, and none is that of another batch."""
        name = f"batch_{len(self.made)}"
        prefix = "the cat sat on the mat, " * 12
        texts = [f"{prefix if n % 2 else ''}{name} {n * 7919 % 1000}" for n in range(rows)]
        body = {"model": "tiny-v3", "max_tokens": 12, "temperature": 0}
        lines = [
            {
                "custom_id": f"{name}-{n}",
                "method": "POST",
                "url": URL,
                "body": {**body, "prompt": text},
            }
            for n, text in enumerate(texts)
        ]
        content = "\n".join(json.dumps(line) for line in lines).encode()
        file = files.File(files.new_id(), "", "batch", "in.jsonl", len(content), 0)
        with self.store.write() as connection:
            files.add(connection, file)
            files.write(connection, file.id, [content])
            batches.add(connection, Batch(name, "", "tiny-v3", URL, file.id, "24h", 0))
        self.made[name] = texts
        return name

    def kill(self, victim: Victim) -> None:
        """One more death; then everything that was there before must be there unchanged."""
        victim()
        self.kills += 1
        now = self.rows()
        assert {place: now.get(place) for place in self.seen} == self.seen
        self.seen = now

    def rows(self) -> dict[tuple[str, int], bytes]:
        """(batch, line) -> what the output file says."""
        with self.store.read() as connection:
            return {
                (name, line): text
                for name in self.made
                for line, text in batch_rows.results(connection, name, ["output", "error"], limit=10**6)
            }

    def ended(self, name: str) -> bool:
        """Whether a batch has ended."""
        with self.store.read() as connection:
            batch = batches.get(connection, name)
            assert batch is not None
            return batch.status in batches.ENDED

    def counts(self) -> str:
        """What was done."""
        return f"{self.kills} kills, {len(self.made)} batches, {sum(map(len, self.made.values()))} rows"

    def check(self) -> None:
        """Every row of every batch is there once, in order, with the answer it has alone."""
        for name, texts in self.made.items():
            with self.store.read() as connection:
                batch = batches.get(connection, name)
                assert batch is not None
                assert (batch.status, batch.total, batch.completed, batch.failed) == (
                    "completed",
                    len(texts),
                    len(texts),
                    0,
                )
                found = batch_rows.results(connection, name, ["output", "error"], limit=10**6)
                output = files.get(connection, "", batch.output_file_id or "", 0)
            values: list[Any] = [json.loads(text) for _, text in found]
            assert [value["custom_id"] for value in values] == [f"{name}-{n}" for n in range(len(texts))]
            assert output is not None
            assert output.bytes == sum(len(text) + 1 for _, text in found)
            answers = [value["response"]["body"]["choices"][0]["text"] for value in values]
            assert answers == self.expected(texts)
            used = sum(value["response"]["body"]["usage"]["completion_tokens"] for value in values)
            assert batch.output_tokens == used


@pytest.fixture
def chaos(tiny_folder: Path, tmp_path: Path) -> Iterator[Chaos]:
    llm = LLM(tiny_folder, dtype="f32", threads=1)
    store = Store(tmp_path / "store.sqlite")
    yield Chaos(store, lambda texts: [one.text for one in llm.generate(texts, max_tokens=12, temperature=0)])
    store.close()


@contextmanager
def forked(folder: Path, store: Path) -> Iterator[Callable[[float | None], None]]:
    """Forks a life and kills it after so many seconds; None: lets it live until the end."""
    argv = [sys.executable, "-m", "tests.jobs.lives", str(folder), str(store)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        alive: list[int] = []

        def live(seconds: float | None) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("live\n")
            process.stdin.flush()
            alive.append(int(process.stdout.readline()))
            if seconds is not None:
                time.sleep(seconds)
                os.kill(alive.pop(), signal.SIGKILL)
                assert process.stdout.readline() == "gone\n"

        try:
            yield live
        finally:
            for child in alive:
                os.kill(child, signal.SIGKILL)
            process.kill()


def test_fifty_deaths_of_a_server_without_a_socket(chaos: Chaos, tiny_folder: Path) -> None:
    draw = random.Random(0)
    assert chaos.store.path is not None
    with forked(tiny_folder, chaos.store.path) as live:
        name = chaos.batch(300)
        while chaos.kills < 50:
            chaos.kill(lambda: live(draw.uniform(0.02, 0.3)))
            if chaos.ended(name):
                name = chaos.batch(300)
        live(None)
        wait_until(lambda: chaos.ended(name), seconds=120)
    chaos.check()
    log.info(chaos.counts())


@contextmanager
def process(folder: Path, store: Path) -> Iterator[subprocess.Popen[str]]:
    """A whole server, ready."""
    options = ["--port", "0", "--threads", "1", "--dtype", "f32", "--store", str(store), "--max-running", "8"]
    argv = [sys.executable, "-m", "kvern", "serve", str(folder), *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        try:
            assert "is ready on" in running.stdout.readline()
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_deaths_of_whole_servers(chaos: Chaos, tiny_folder: Path, kills: int) -> None:
    draw, store = random.Random(kills), chaos.store.path
    assert store is not None

    def victim() -> None:
        with process(tiny_folder, store):
            time.sleep(draw.uniform(0.0, 0.4))

    name = chaos.batch(300)
    while chaos.kills < kills:
        chaos.kill(victim)
        if chaos.ended(name):
            name = chaos.batch(300)
    with process(tiny_folder, store):
        wait_until(lambda: chaos.ended(name), seconds=120)
    chaos.check()
    log.info(chaos.counts())
