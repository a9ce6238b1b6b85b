"""Runs one sample as a process: with a time limit, on request beside a spinning process, or watched for its memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.peers.cases import Case
from bench.peers.engines import Command, Sample
from bench.peers.setup import NotAvailable, last_line

LIMIT_SECONDS = 2400
"""For one sample; llama.cpp needs about 700 to compute a prompt of 16384 tokens."""

LOOK_SECONDS = 0.1
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(1000000): pass"
"""Uses a core until the process that started it ends or kills it."""


def sample(command: Command, case: Case) -> Sample:
    """Run once. NotAvailable, with what the process said last, when it fails or says something else."""
    if case.test == "memory":
        return _memory_at_rest(command)
    with _spinning(case.busy):
        return command.read(_run(command.argv, command))


@dataclass
class Watch:
    """Bytes of a running process: resident, and the part of it that no file backs."""

    resident: list[int] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def follow(self, pid: int) -> None:
        """Look until told to stop or the process is gone."""
        while not self.stopped.wait(LOOK_SECONDS):
            size = resident_bytes(pid)
            if size is None:
                return
            self.resident.append(size)

    def at_rest(self) -> float:
        """Median of the last third: loading is over then, and the engine decodes."""
        last = self.resident[-max(1, len(self.resident) // 3) :]
        if not last:
            raise NotAvailable("the process ended before its memory was looked at")
        return median(last)


def resident_bytes(pid: int) -> int | None:
    """Resident bytes, mapped files included; None when the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return None
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _memory_at_rest(command: Command) -> Sample:
    """Resident bytes beyond those of the idle runtime (interpreter, torch), which are measured first."""
    watch, runtime = Watch(), 0.0
    if command.idle is not None:
        idle = Watch()
        _run(command.idle, command, idle)
        runtime = idle.at_rest()
    command.read(_run(command.argv, command, watch))
    return Sample(watch.at_rest() - runtime, runtime_bytes=runtime)


def _run(argv: tuple[str, ...], command: Command, watch: Watch | None = None) -> str:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env={**os.environ, **command.env})
        follower = threading.Thread(target=watch.follow, args=(process.pid,)) if watch else None
        if follower:
            follower.start()
        try:
            code: int | None = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
            if watch and follower:
                watch.stopped.set()
                follower.join()
        for stream in (out, err):
            stream.seek(0)
        if code != 0:
            how = f"no answer in {LIMIT_SECONDS} s" if code is None else last_line(err.read()) or f"exit code {code}"
            raise NotAvailable(how)
        return out.read()


@contextmanager
def _spinning(busy: bool) -> Iterator[None]:
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", SPIN]) as spinner:
        time.sleep(0.2)
        try:
            yield
        finally:
            spinner.kill()
