"""The charts of `kvern bench --png`, through matplotlib (the extra `bench`), without a display."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvern.bench.load import Percentiles, RateRow
from kvern.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvern.bench.engine import EngineRow

INCHES = (5.0, 3.6)
"""Width and height of one panel."""


def check(path: Path) -> None:
    """Raise ConfigError at once for a chart that could not be drawn after the measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a chart needs matplotlib", hint="pip install 'kvern[bench]', or leave --png out")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"{path} is no .png file", param="png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.absolute().parent} is no folder", param="png")


def engine_chart(rows: Sequence[EngineRow], title: str, path: Path) -> None:
    """Tokens/s of prefill and decode over depth, a line for each length or batch; share of the bandwidth of decode."""
    figure, panels = _panels(3, title)
    for panel, test, axis in zip(panels, ("prefill", "decode", "decode"), ("tokens/s",) * 2 + ("share",), strict=True):
        chosen = [row for row in rows if row.test == test]
        for value in dict.fromkeys(row.tokens if test == "prefill" else row.batch for row in chosen):
            line = [row for row in chosen if (row.tokens if test == "prefill" else row.batch) == value]
            heights = [row.tokens_per_s if axis == "tokens/s" else row.bandwidth_share for row in line]
            label = f"{value} tokens" if test == "prefill" else f"batch {value}"
            panel.plot([row.depth for row in line], heights, marker="o", label=label)
        name = f"{test}, {axis}" if axis == "tokens/s" else f"{test}, share of the read bandwidth"
        _finish(panel, name, "depth (tokens in the cache)", bool(chosen))
    figure.savefig(path, dpi=120)


def serve_chart(rows: Sequence[RateRow], title: str, path: Path) -> None:
    """Time to first token, inter-token latency and throughput over the request rate."""
    figure, panels = _panels(3, title)
    finite = [row for row in rows if row.rate != float("inf")]
    rates = [row.rate for row in finite]
    _percentile_lines(panels[0], rates, [row.time_to_first_token_ms for row in finite])
    _finish(panels[0], "time to first token, ms", "requests/s", bool(finite))
    _percentile_lines(panels[1], rates, [row.inter_token_ms for row in finite])
    _finish(panels[1], "inter-token latency, ms", "requests/s", bool(finite))
    panels[2].plot(rates, [row.tokens_per_s for row in finite], marker="o", label="answers' tokens/s")
    _finish(panels[2], "throughput, tokens/s", "requests/s", bool(finite))
    figure.savefig(path, dpi=120)


def _percentile_lines(panel: Axes, rates: Sequence[float], values: Sequence[Percentiles]) -> None:
    for name in ("p50", "p90", "p99"):
        panel.plot(
            rates, [float("nan") if (one := value[name]) is None else one for value in values], marker="o", label=name
        )


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0] * count, INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _finish(panel: Axes, title: str, x: str, has_lines: bool) -> None:
    panel.set_title(title)
    panel.set_xlabel(x)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    if has_lines:
        panel.legend()
