"""Turns the log into rows, one for each case and peer, and those into a table or JSON.

ratio = median over the kept rounds of ours / theirs (for `memory`: theirs / ours), so above 1 is better everywhere
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.peers.cases import Case
from bench.peers.engines import OURS, Sample
from bench.peers.runner import Log, disturbed

MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """A case against one peer ("" where none runs it).

    ours, peer: tokens a second (bytes for `memory`), medians of the kept pairs.
    runs: every pair, whether it was kept or dropped as disturbed. why: the reason for what is missing.
    """

    case: str
    engine: str
    ours: float | None
    peer: float | None
    ratio: float | None
    runs: tuple[dict[str, Any], ...]
    bar: float | None
    aim: float | None
    bytes_per_token: float | None = None
    gb_per_s: float | None = None
    bandwidth_share: float | None = None
    runtime_bytes: float | None = None
    why: str | None = None


def rows(cases: Iterable[Case], peers: Sequence[str], log: Log, read_gb_s: float) -> list[Row]:
    """A row for every case and every peer that has it. read_gb_s: what a plain read of memory gave at the start."""
    return [_row(case, peer, log, read_gb_s) for case in cases for peer in _peers(case, peers)]


def _peers(case: Case, peers: Sequence[str]) -> list[str]:
    """The peers of a case, or one that is nobody, so that Kvern's own figure is shown all the same."""
    return [peer for peer in peers if peer in case.peers] or [""]


def _row(case: Case, peer: str, log: Log, read_gb_s: float) -> Row:
    rounds = log.rounds(case.name)
    dropped = disturbed(rounds)
    own = [samples[OURS] for number, samples in sorted(rounds.items()) if OURS in samples and number not in dropped]
    pairs = [
        (number not in dropped, samples[OURS], samples[peer])
        for number, samples in sorted(rounds.items())
        if OURS in samples and peer in samples
    ]
    good = [(ours.value, theirs.value) for keep, ours, theirs in pairs if keep]
    bar = case.bars.get(peer)
    gb_s = _median(own, "gb_per_s")
    return Row(
        case.name,
        peer,
        median(a for a, _ in good) if good else _median(own, "value"),
        median(b for _, b in good) if good else None,
        median(b / a if case.test == "memory" else a / b for a, b in good) if good else None,
        tuple({"ours": ours.value, "peer": theirs.value, "kept": keep} for keep, ours, theirs in pairs),
        bar.bar if bar else None,
        bar.aim if bar else None,
        _median(own, "bytes_per_token"),
        gb_s,
        gb_s / read_gb_s if gb_s else None,
        _median(own, "runtime_bytes"),
        None if good or not peer else _why(case, peer, log, bool(pairs)),
    )


def _why(case: Case, peer: str, log: Log, had_pairs: bool) -> str:
    if had_pairs:
        return "every pair was disturbed"
    reasons = {name: log.why(case.name, name) for name in (OURS, peer)}
    return "; ".join(f"{name}: {why}" for name, why in reasons.items() if why) or "not measured"


def _median(samples: Sequence[Sample], name: str) -> float | None:
    values = [value for one in samples if (value := getattr(one, name)) is not None]
    return median(values) if values else None


def table(cases: Sequence[Case], peers: Sequence[str], found: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, a line a case; an empty cell has its reason in `notes`."""
    by_place = {(row.case, row.engine): row for row in found}
    head = ["case", "Kvern tok/s", "MB/token", "GB/s", "of read"]
    for peer in peers:
        head += [f"{peer} tok/s", "ratio", "bar", "pairs"]
    return head, [_line(case, peers, by_place) for case in cases]


def _line(case: Case, peers: Sequence[str], by_place: dict[tuple[str, str], Row]) -> list[str]:
    mine = [row for (name, _), row in by_place.items() if name == case.name]
    own = max(mine, key=lambda row: len(row.runs), default=None)
    memory = case.test == "memory"
    cells = [case.title, _value(own.ours if own else None, memory)]
    cells.append(_number(own.bytes_per_token / 1e6 if own and own.bytes_per_token else None, ".1f"))
    cells.append(_number(own.gb_per_s if own else None, ".1f"))
    cells.append(_number(100 * own.bandwidth_share if own and own.bandwidth_share else None, ".0f", " %"))
    for peer in peers:
        row = by_place.get((case.name, peer))
        if row is None:
            cells += [""] * 4
            continue
        cells += [_value(row.peer, memory), _number(row.ratio, ".2f", "x"), _number(row.bar, "g", "x"), _pairs(row)]
    return cells


def notes(cases: Sequence[Case], found: Sequence[Row]) -> list[str]:
    """What the cells leave open: reasons, dropped pairs, what the interpreter takes beside the memory row."""
    titles = {case.name: case.title for case in cases}
    lines = [f"{titles[row.case]}, {row.engine}: {row.why}" for row in found if row.why]
    for row in found:
        if row.runtime_bytes is not None:
            beside = f"{row.runtime_bytes / MIB:.0f} MiB of interpreter and torch are not in Kvern's figure"
            lines.append(f"{titles[row.case]}: {beside}")
    return list(dict.fromkeys(lines))


def _pairs(row: Row) -> str:
    good = sum(run["kept"] for run in row.runs)
    return f"{good}/{len(row.runs)}" if row.runs else ""


def _value(value: float | None, memory: bool) -> str:
    return _number(value / MIB if value is not None and memory else value, ".0f" if memory else ".1f", " MiB" * memory)


def _number(value: float | None, how: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{how}}{unit}"
