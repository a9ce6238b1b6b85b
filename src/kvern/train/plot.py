"""The curves of one or several runs over tokens, as a PNG, through matplotlib, without a display."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvern.errors import CheckpointError, ConfigError
from kvern.train.metrics import read
from kvern.train.run_folder import RunFolder

INCHES = (5.0, 3.6)
"""Width and height of one panel."""
SMOOTHED = 200
"""Points of a curve; a longer run shows means."""

PANELS: tuple[tuple[str, Callable[[dict[str, Any]], float | None]], ...] = (
    ("loss, nats", lambda row: row["loss"]),
    ("MTP loss, nats", lambda row: row["mtp_loss"] or None),
    ("load of the fullest expert over the mean", lambda row: (row["load_max_over_mean"] or {}).get("worst")),
    ("tokens/s", lambda row: row["tokens_per_s"]),
)


def plot(runs: Sequence[Path], png: Path) -> None:
    """Draw main and MTP loss, load balance and throughput of `runs`, one over the other, into `png`.

    Raises ConfigError where nothing can be drawn, CheckpointError for a folder without metrics.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib", hint="pip install 'kvern[train]'")
    if png.suffix.lower() != ".png":
        raise ConfigError(f"{png} is no .png file", param="png")
    curves = {run: list(read(RunFolder(run).metrics)) for run in runs}
    for run, rows in curves.items():
        if not rows:
            raise CheckpointError("has no step yet", file=RunFolder(run).metrics)
    if not png.absolute().parent.is_dir():
        raise ConfigError(f"{png.absolute().parent} is no folder", param="png")
    names = [run.absolute().name for run in runs]
    _draw({run.absolute().name if len(set(names)) == len(runs) else str(run): curves[run] for run in runs}, png)


def _draw(curves: dict[str, list[dict[str, Any]]], png: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * INCHES[0], 2 * INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (title, value) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        drawn = False
        for run, rows in curves.items():
            heights = [(row["tokens"], value(row)) for row in rows]
            points = _means([(tokens, height) for tokens, height in heights if height is not None])
            if points:
                panel.plot([tokens for tokens, _ in points], [height for _, height in points], label=run)
                drawn = True
        panel.set_title(title)
        panel.set_xlabel("tokens")
        if not title.endswith("nats"):
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        if drawn and len(curves) > 1:
            panel.legend()
    figure.savefig(png, dpi=120)


def _means(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most SMOOTHED points: each the mean of neighbours."""
    width = -(-len(points) // SMOOTHED) if points else 1
    groups = [points[first : first + width] for first in range(0, len(points), width)]
    return [
        (sum(tokens for tokens, _ in group) / len(group), sum(height for _, height in group) / len(group))
        for group in groups
    ]
