"""Alternates the engines case by case and appends every sample to a JSONL file, from which a cut run continues.

A round is one sample of every engine, in turn; odd rounds go the other way, so that a drift favours nobody. The rule
for disturbed rounds, which a shared machine needs:

    usual(engine, case) = upper median of its samples
    a round in which any engine fell under half of its usual is dropped, for all of them

and up to half as many rounds more are run in place of the dropped ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_high
from typing import Any

from bench.peers.cases import TRANSFORMERS, VLLM, Case
from bench.peers.engines import OURS, Command, Engines, Sample
from bench.peers.processes import sample
from bench.peers.setup import NotAvailable

SLOW = {TRANSFORMERS, VLLM}
"""Engines of which one undisturbed sample a case is enough: they take long and have no bar."""

DISTURBED = 0.5


@dataclass(frozen=True)
class Record:
    """One line of the log: a sample, or why an engine gave none."""

    case: str
    engine: str
    round: int
    sample: Sample | None
    why: str | None = None

    @classmethod
    def read(cls, line: str) -> Record:
        raw: dict[str, Any] = json.loads(line)
        raw["sample"] = Sample(**raw["sample"]) if raw["sample"] else None
        return cls(**raw)


@dataclass
class Log:
    """The records of a run, in memory and in `path`."""

    path: Path
    records: list[Record] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> Log:
        """Continue the file, or set what it held aside and begin anew. What failed is tried again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return cls(path)
        if not resume:
            path.replace(path.with_suffix(".old.jsonl"))
            return cls(path)
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        path.write_text("".join(whole))
        records = [Record.read(line) for line in whole]
        return cls(path, [record for record in records if record.why is None])

    def append(self, record: Record) -> None:
        """Write through at once."""
        self.records.append(record)
        with self.path.open("a") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")

    def rounds(self, case: str) -> dict[int, dict[str, Sample]]:
        """Round -> engine -> sample."""
        found: dict[int, dict[str, Sample]] = {}
        for record in self.records:
            if record.case == case and record.sample is not None:
                found.setdefault(record.round, {})[record.engine] = record.sample
        return found

    def why(self, case: str, engine: str) -> str | None:
        """Why an engine has no sample of a case."""
        reasons = [one.why for one in self.records if (one.case, one.engine) == (case, engine) and one.why]
        return reasons[-1] if reasons else None


def disturbed(rounds: dict[int, dict[str, Sample]]) -> set[int]:
    """The rounds to drop, by the module's rule."""
    engines = {engine for samples in rounds.values() for engine in samples}
    usual = {
        engine: median_high(samples[engine].value for samples in rounds.values() if engine in samples)
        for engine in engines
    }
    return {
        number
        for number, samples in rounds.items()
        if any(one.value < DISTURBED * usual[engine] for engine, one in samples.items())
    }


def kept(rounds: dict[int, dict[str, Sample]]) -> dict[int, dict[str, Sample]]:
    """The undisturbed rounds."""
    dropped = disturbed(rounds)
    return {number: samples for number, samples in rounds.items() if number not in dropped}


def measure(
    cases: Iterable[Case], peers: Sequence[str], engines: Engines, log: Log, rounds: int, say: Callable[[str], None]
) -> None:
    """Fill the log with what it lacks."""
    for case in cases:
        wanted = min(rounds, case.rounds)
        chosen = [OURS, *(peer for peer in peers if peer in case.peers)]
        if _is_done(log, case, chosen, wanted):
            continue
        commands = _commands(case, chosen, engines, log)
        first = _first_round(log, case, list(commands))
        for number in range(first, first + wanted + wanted // 2):
            if _is_done(log, case, list(commands), wanted):
                break
            for engine in list(commands) if number % 2 == 0 else reversed(list(commands)):
                if _lacks(log, case, engine, number):
                    _one(commands[engine], case, engine, number, log, say)


def _is_done(log: Log, case: Case, engines: Sequence[str], wanted: int) -> bool:
    """Whether there are enough undisturbed rounds, and every engine is in one or has its reason."""
    good = kept(log.rounds(case.name)).values()
    if sum(OURS in samples for samples in good) < wanted and not log.why(case.name, OURS):
        return False
    return all(log.why(case.name, one) or any(one in samples for samples in good) for one in engines)


def _first_round(log: Log, case: Case, engines: Sequence[str]) -> int:
    """Where to go on: with the first round, whose gaps are filled, or behind all when an engine is new to the log."""
    rounds = log.rounds(case.name)
    seen = {engine for samples in rounds.values() for engine in samples}
    return max(rounds) + 1 if len(rounds) > 1 and not seen.issuperset(engines) else 0


def _commands(case: Case, chosen: Sequence[str], engines: Engines, log: Log) -> dict[str, Command]:
    """What cannot run is noted in the log with the reason."""
    found = {}
    for engine in chosen:
        try:
            found[engine] = engines.command(engine, case)
        except NotAvailable as error:
            log.append(Record(case.name, engine, 0, None, str(error)))
    return found


def _lacks(log: Log, case: Case, engine: str, number: int) -> bool:
    rounds = log.rounds(case.name)
    if engine in rounds.get(number, {}) or log.why(case.name, engine):
        return False
    return engine not in SLOW or not any(engine in samples for samples in kept(rounds).values())


def _one(command: Command, case: Case, engine: str, number: int, log: Log, say: Callable[[str], None]) -> None:
    try:
        record = Record(case.name, engine, number, sample(command, case))
    except (NotAvailable, ValueError, KeyError) as error:
        record = Record(case.name, engine, number, None, str(error))
    log.append(record)
    shown = record.why or (f"{record.sample.value:.4g}" if record.sample else "")
    say(f"{case.name} round {number + 1}, {engine}: {shown}")
