"""The comparison as a picture: tokens a second of every engine, and Kvern's ratio to each peer beside its bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.cases import Case
from bench.peers.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (13.0, 5.2)


def draw(cases: Sequence[Case], peers: Sequence[str], found: Sequence[Row], title: str, path: Path) -> None:
    """Write the PNG. The memory row is left out of the left panel: it has another unit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    rates, ratios = figure.subplots(1, 2)
    by_place = {(row.case, row.engine): row for row in found}
    shown = [case for case in cases if any(row.case == case.name for row in found)]
    _rates(rates, [case for case in shown if case.test != "memory"], peers, by_place)
    _ratios(ratios, shown, peers, by_place)
    figure.savefig(path, dpi=120)


def _rates(panel: Axes, cases: Sequence[Case], peers: Sequence[str], by_place: dict[tuple[str, str], Row]) -> None:
    ours = [max(row.ours or 0 for (name, _), row in by_place.items() if name == case.name) for case in cases]
    columns = [("Kvern", ours)] + [(peer, [_peer(by_place, case, peer) for case in cases]) for peer in peers]
    width = 0.8 / len(columns)
    for at, (name, heights) in enumerate(columns):
        places = [place + (at - (len(columns) - 1) / 2) * width for place in range(len(cases))]
        panel.bar(places, heights, width, label=name)
    _finish(panel, "tokens/s", cases)
    panel.set_yscale("log")


def _ratios(panel: Axes, cases: Sequence[Case], peers: Sequence[str], by_place: dict[tuple[str, str], Row]) -> None:
    width = 0.8 / max(1, len(peers))
    for at, peer in enumerate(peers):
        chosen = [(place, row) for place, case in enumerate(cases) if (row := by_place.get((case.name, peer)))]
        offset = (at - (len(peers) - 1) / 2) * width
        panel.bar([place + offset for place, _ in chosen], [row.ratio or 0 for _, row in chosen], width, label=peer)
        barred = [(place + offset, row.bar) for place, row in chosen if row.bar is not None]
        panel.scatter([x for x, _ in barred], [y for _, y in barred], marker="_", s=160, color="black", zorder=3)
    panel.axhline(1.0, color="grey", linewidth=0.8)
    _finish(panel, "Kvern / peer (black: the bar)", cases)


def _peer(by_place: dict[tuple[str, str], Row], case: Case, peer: str) -> float:
    row = by_place.get((case.name, peer))
    return (row.peer if row else None) or 0.0


def _finish(panel: Axes, title: str, cases: Sequence[Case]) -> None:
    panel.set_title(title)
    panel.set_xticks(range(len(cases)), [case.name for case in cases], rotation=45, ha="right")
    panel.grid(alpha=0.3, axis="y")
    panel.legend()
