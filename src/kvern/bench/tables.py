"""Rows as a table: with rich on a terminal, as aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvern.bench.load import Percentiles, RateRow

if TYPE_CHECKING:
    from kvern.bench.engine import EngineRow

Table = tuple[list[str], list[list[str]]]
"""Headings, and the cells of each row."""


def engine_table(rows: Sequence[EngineRow]) -> Table:
    """A line a case; stages, where there are any, in milliseconds a step."""
    stages = list(next((row.stages for row in rows if row.stages), {}))
    head = ["test", "tokens", "batch", "depth", "tokens/s", "MB/token", "GB/s", "of read", *stages]
    lines = []
    for row in rows:
        split = [f"{1e3 * row.stages[stage]:.2f}" if row.stages else "" for stage in stages]
        numbers = [f"{row.tokens_per_s:.1f}", f"{row.bytes_per_token / 1e6:.2f}", f"{row.gb_per_s:.2f}"]
        place = [row.test, str(row.tokens), str(row.batch), str(row.depth)]
        lines.append([*place, *numbers, f"{100 * row.bandwidth_share:.0f} %", *split])
    return head, lines


def serve_table(rows: Sequence[RateRow]) -> Table:
    """A line a rate; latencies as p50 / p90 / p99."""
    head = [
        "rate",
        "done",
        "req/s",
        "tok/s",
        "prompt",
        "answer",
        "first token ms",
        "inter-token ms",
        "whole ms",
        "late ms",
    ]
    return head, [
        [
            f"{row.rate:g}",
            f"{row.complete}/{row.requests}",
            f"{row.requests_per_s:.2f}",
            f"{row.tokens_per_s:.1f}",
            f"{row.prompt_tokens:.0f}",
            f"{row.completion_tokens:.0f}",
            _joined(row.time_to_first_token_ms),
            _joined(row.inter_token_ms),
            _joined(row.end_to_end_ms),
            f"{row.client_late_ms:.1f}",
        ]
        for row in rows
    ]


def show(table: Table) -> None:
    """Print to stdout."""
    head, lines = table
    if not sys.stdout.isatty():
        sys.stdout.write("\n".join([*plain(table), ""]))
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = RichTable(box=None)
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index == 0 else "right")
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)


def plain(table: Table) -> list[str]:
    """Lines with aligned columns, the first to the left and the others to the right."""
    head, lines = table
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *lines]
    ]


def _joined(values: Percentiles) -> str:
    return " / ".join("-" if one is None else f"{one:.0f}" if one >= 10 else f"{one:.1f}" for one in values.values())
