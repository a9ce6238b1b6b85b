"""What a run says about itself: one line of metrics.jsonl a step, TensorBoard where it is installed, a progress line.

    step, tokens          steps done, tokens trained until then
    loss, mtp_loss        cross entropies in nats, without weight;  balance_loss: with its weight
    lr, grad_norm, batch  the rate, the norm before clipping, sequences of the step
    load_max_over_mean    {"worst", "mean"} over the gates: 1 balanced; null for a model without experts
    tokens_per_s, mfu, seconds    of the step; mfu: model FLOPs over the peak of all ranks, see `kvern.plan.flops`

A run that goes on from a checkpoint first drops the lines after it (`keep_until`), so a step has one line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kvern.checkpoint.save import write_file
from kvern.errors import CheckpointError, ConfigError

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; the module says what each is."""

    step: int
    tokens: int
    loss: float
    mtp_loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    load_max_over_mean: dict[str, float] | None
    batch: int
    seconds: float
    tokens_per_s: float
    mfu: float


class MetricsFile:
    """metrics.jsonl: every line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: StepMetrics) -> None:
        """Add a line."""
        self._file.write(json.dumps(asdict(row), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()


class TensorBoard:
    """The same numbers as scalars, through torch's writer."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, row: StepMetrics) -> None:
        """Add a point to every curve."""
        values = asdict(row)
        loads = values.pop("load_max_over_mean") or {}
        for name, value in (*values.items(), *((f"load_max_over_mean/{key}", one) for key, one in loads.items())):
            if name != "step":
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Write what is held back."""
        self._writer.close()


class ProgressLine:
    """Where a run stands, on stderr: one line that is written over on a terminal, else one every few seconds."""

    def __init__(self, steps: int | None, tokens: int | None, peak_source: str) -> None:
        self._steps, self._tokens, self._peak = steps, tokens, peak_source
        self._terminal = sys.stderr.isatty()
        self._next, self._rate = 0.0, 0.0

    def write(self, row: StepMetrics) -> None:
        """Show a step."""
        if not self._rate:
            self._say(f"share of peak: {self._peak}", end="\n")
        self._rate = row.tokens_per_s if not self._rate else 0.9 * self._rate + 0.1 * row.tokens_per_s
        now = time.monotonic()
        if self._terminal or now >= self._next or self._left(row) == 0:
            self._next = now + SECONDS_BETWEEN_LINES
            self._say(self.line(row), end="" if self._terminal else "\n")

    def line(self, row: StepMetrics) -> str:
        """The step in words."""
        worst = "" if row.load_max_over_mean is None else f"  load {row.load_max_over_mean['worst']:.2f}"
        mtp = f"  mtp {row.mtp_loss:.3f}" if row.mtp_loss else ""
        return (
            f"step {row.step}{f'/{self._steps}' if self._steps else ''}  loss {row.loss:.3f}{mtp}{worst}  "
            f"lr {row.lr:.2e}  norm {row.grad_norm:.2f}  {_short(row.tokens)} tokens, {_short(self._rate)}/s, "
            f"{100 * row.mfu:.1f} % of peak  {_duration(self._left(row) / max(self._rate, 1e-9))} left"
        )

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._terminal:
            sys.stderr.write("\n")

    def _left(self, row: StepMetrics) -> float:
        """Tokens still to train, about."""
        if self._tokens is not None:
            return max(0, self._tokens - row.tokens)
        assert self._steps is not None
        return (self._steps - row.step) * row.tokens_per_s * row.seconds

    def _say(self, line: str, end: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}{end}" if self._terminal else f"{line}{end}")
        sys.stderr.flush()


Sink = MetricsFile | TensorBoard | ProgressLine


class Metrics:
    """All of them together."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, row: StepMetrics) -> None:
        """Tell everybody."""
        for sink in self._sinks:
            sink.write(row)


def tensorboard(folder: Path, wanted: Literal["auto", "on", "off"]) -> list[Sink]:
    """TensorBoard's writer where it is wanted and installed. ConfigError where it is wanted and is not."""
    installed = importlib.util.find_spec("tensorboard") is not None
    if wanted == "on" and not installed:
        raise ConfigError("metrics.tensorboard is on, and TensorBoard is not installed", hint="pip install tensorboard")
    return [TensorBoard(folder)] if installed and wanted != "off" else []


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl. CheckpointError for one that is none; a torn last line is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path) from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines):  # the writer died in the middle of it
                return
            raise CheckpointError(f"line {number} is no row of metrics: {error}", file=path) from error
        yield row


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, whole or torn."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read(path) if row["step"] <= step]
    write_file(path, "".join(kept).encode())


def _short(count: float) -> str:
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f}T"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
