"""A server under load for minutes: many clients, mixed lengths, a third of them hanging up midway.

    python -m bench.soak [--model coder-0.5b] [--minutes 5] [--clients 64] [--json]

Starts `kvern serve` on a free loopback port with a queue and a cache that are too small on purpose, so that requests
are refused and preempted. Then it proves, and ends with 1 where it cannot:

- nothing lost: every request that stayed got its finish with all of its tokens, or a 429;
- /metrics counts no running and no waiting request afterwards, and no block in use;
- memory flat: the server's resident memory of the last fifth of the time against the first fifth after the warm-up;
- SIGTERM ends it with 0.

Hanging up means closing the socket: half of those who do at a random event, half at a random time, which may be in the
queue or during the prompt. A third of the prompts begin alike, so the prefix cache takes part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from kvern.bench.load import Answer, Ruler, Target, ask, find_target, measure_prompts, percentiles, prompts
from kvern.bench.raw_http import Address, request

SERVER = ("--max-running", "32", "--max-waiting", "16", "--cache-tokens", "8192")
"""Fewer places than clients, and a cache that the longest requests fill."""

SETTLING_SECONDS = 30.0
SLACK_BYTES = 16 << 20
"""Growth that is the allocator's, not a leak's."""


@dataclass(frozen=True)
class Mix:
    """What the clients ask for: lengths are drawn log-uniformly between the bounds, in tokens."""

    prompt: tuple[int, int] = (24, 512)
    answer: tuple[int, int] = (4, 128)
    hang_up: float = 1 / 3
    shared: float = 1 / 3


@dataclass
class Report:
    """What happened. Memory and gauges are samples, one a second: (seconds since the start, bytes or requests)."""

    clients: int
    seconds: float
    warm_up: float
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    tokens: int = 0
    first_ms: dict[str, float | None] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    afterwards: dict[str, float] = field(default_factory=dict)
    preemptions: float = 0
    client_cpu: float = 0
    """Cores that the clients used."""

    exit_code: int | None = None

    @property
    def memory_ends(self) -> tuple[float, float]:
        """Median resident bytes of the first and of the last fifth of the time after the warm-up."""
        warm = [size for at, size in self.memory if at >= self.warm_up] or [0]
        part = max(1, len(warm) // 5)
        return median(warm[:part]), median(warm[-part:])


def problems(report: Report) -> list[str]:
    """What the run disproved; empty when all holds."""
    found = [f"lost: {one}" for one in report.lost]
    found += [f"{name} is {value:g} afterwards" for name, value in report.afterwards.items() if value]
    first, last = report.memory_ends
    if last > first + max(SLACK_BYTES, 0.01 * first):
        found.append(f"memory grew from {first / 2**20:.0f} to {last / 2**20:.0f} MiB")
    if report.exit_code != 0:
        found.append(f"the server ended with {report.exit_code}")
    return found + [f"no request {what}: the run proves little" for what in _never(report)]


def _never(report: Report) -> list[str]:
    return [what for what in ("finished", "hung up") if not report.outcomes[what]]


@contextmanager
def server(model: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`kvern serve` on a free port: the process and its URL, once it is ready. Killed if it still lives at the end."""
    argv = [sys.executable, "-m", "kvern", "serve", model, "--port", "0", *flags]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"http://\S+?(?=/v1)", line)
            if match is None:
                raise SystemExit(f"error: the server did not start: {line!r}")
            yield process, match[0]
        finally:
            process.kill()


def soak(
    model: str, flags: Sequence[str], *, clients: int, seconds: float, warm_up: float, mix: Mix, seed: int
) -> Report:
    """Run the whole thing against `kvern serve` with these flags."""
    report = Report(clients, seconds, warm_up)
    with server(model, *flags) as (process, url):
        asyncio.run(_soak(report, Address.of(url), process.pid, mix, seed))
        process.send_signal(signal.SIGTERM)
        report.exit_code = process.wait(SETTLING_SECONDS)
    return report


async def _soak(report: Report, address: Address, pid: int, mix: Mix, seed: int) -> None:
    target = await find_target(address, ignore_eos=True)
    ruler = await measure_prompts(target)
    start, cpu = time.monotonic(), time.process_time()
    watching = asyncio.create_task(_watch(report, address, pid, start))
    firsts: list[float] = []
    loops = [
        _client(report, target, ruler, mix, random.Random(f"{seed} {n}"), start, firsts) for n in range(report.clients)
    ]
    await asyncio.gather(*loops)
    report.client_cpu = (time.process_time() - cpu) / (time.monotonic() - start)
    report.first_ms = percentiles(firsts)
    await _settle(report, address)
    watching.cancel()


async def _client(
    report: Report, target: Target, ruler: Ruler, mix: Mix, random_: random.Random, start: float, firsts: list[float]
) -> None:
    """Ask, again and again, until the time is over; the last answer is awaited."""
    await asyncio.sleep(random_.random())
    while time.monotonic() - start < report.seconds:
        tokens = _log_uniform(random_, mix.answer)
        text = next(prompts(ruler.words(_log_uniform(random_, mix.prompt)), random_.getrandbits(60)))
        if random_.random() < mix.shared:
            half = len(text) // 2
            text = (SHARED * (half // len(SHARED) + 1))[:half] + text[half:]
        hangs_up = random_.random() < mix.hang_up
        by_event = hangs_up and random_.random() < 0.5
        asking = ask(target, text, tokens, hang_up_after=random_.randint(1, tokens) if by_event else None)
        try:
            if hangs_up and not by_event:
                answer = await asyncio.wait_for(asking, random_.uniform(0, 2))
            else:
                answer = await asking
        except TimeoutError:
            report.outcomes["hung up"] += 1
            continue
        await _count(report, answer, tokens, firsts)


SHARED = "You are a careful assistant who answers in one sentence and who never invents what is not in the text. "


async def _count(report: Report, answer: Answer, tokens: int, firsts: list[float]) -> None:
    if answer.hung_up:
        report.outcomes["hung up"] += 1
    elif answer.error == "429":
        report.outcomes["refused"] += 1
        await asyncio.sleep(1)
    elif answer.complete and answer.completion_tokens == tokens:
        report.outcomes["finished"] += 1
        report.tokens += tokens
        if answer.first is not None:
            firsts.append(answer.first - answer.sent)
    else:
        report.outcomes["lost"] += 1
        report.lost.append(answer.error or f"{answer.completion_tokens} of {tokens} tokens, finish {answer.finish}")


def _log_uniform(random_: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return min(high, int(low * ((high + 1) / low) ** random_.random()))


async def _watch(report: Report, address: Address, pid: int, start: float) -> None:
    """Sample memory and gauges once a second until cancelled."""
    while True:
        report.memory.append((time.monotonic() - start, resident_bytes(pid)))
        gauges = await _metrics(address)
        report.running.append(int(gauges["vllm:num_requests_running"]))
        report.waiting.append(int(gauges["vllm:num_requests_waiting"]))
        await asyncio.sleep(1)


async def _settle(report: Report, address: Address) -> None:
    """Wait until the server has noticed that everybody has gone; note what it says then."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    end = time.monotonic() + SETTLING_SECONDS
    while True:
        metrics = await _metrics(address)
        report.afterwards = {name: metrics[name] for name in names}
        report.preemptions = metrics["vllm:num_preemptions_total"]
        if not any(report.afterwards.values()) or time.monotonic() > end:
            return
        await asyncio.sleep(0.1)


async def _metrics(address: Address) -> dict[str, float]:
    """Every sample of /metrics by its name; of those with several labels, the last."""
    async with request(address, "GET", "/metrics") as response:
        text = (await response.read()).decode()
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {re.split(r"[{ ]", line, maxsplit=1)[0]: float(line.rpartition(" ")[2]) for line in lines}


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, mapped weights included (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def show(report: Report) -> None:
    """Print the numbers."""
    first, last = report.memory_ends
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report.outcomes.items()))
    print(f"{report.clients} clients, {report.seconds:.0f} s: {sum(report.outcomes.values())} requests: {outcomes}")
    print(
        f"answers: {report.tokens} tokens, {report.tokens / report.seconds:.1f} tokens/s; "
        f"preemptions {report.preemptions:g}"
    )
    print(f"time to first token, ms: {', '.join(f'{k} {v or 0:.0f}' for k, v in report.first_ms.items())}")
    print(
        f"running at most {max(report.running)}, waiting at most {max(report.waiting)}; afterwards {report.afterwards}"
    )
    print(f"memory: {first / 2**20:.1f} MiB after {report.warm_up:.0f} s, {last / 2**20:.1f} MiB at the end")
    print(f"the clients took {report.client_cpu:.2f} of a core; the server ended with {report.exit_code}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coder-0.5b", help="a pulled model's name, or a folder")
    parser.add_argument("--dtype", choices=["auto", "bf16", "f32"], default="auto", help="the server's --dtype")
    parser.add_argument("--minutes", type=float, default=5.0, help="time under load")
    parser.add_argument("--clients", type=int, default=64, help="clients, each with one request at a time")
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and hang-ups")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    seconds = 60 * args.minutes
    report = soak(
        args.model,
        (*SERVER, "--dtype", args.dtype),
        clients=args.clients,
        seconds=seconds,
        warm_up=min(60, seconds / 3),
        mix=Mix(),
        seed=args.seed,
    )
    found = problems(report)
    if args.json:
        print(json.dumps({**asdict(report), "memory_ends": report.memory_ends, "problems": found}, indent=1))
    else:
        show(report)
        print("\n".join(f"FAILED: {one}" for one in found) or "all holds")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
