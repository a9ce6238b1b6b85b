"""How far the losses of training runs are from those of a reference, in numbers, tables and curves.

    d(seed) = (mean loss of the run's last tenth) / (that of the reference with the same seed) - 1,  signed

The mean weighs each step of `metrics.jsonl` by its tokens; the last tenth are the steps that end after 0.9 of all
tokens. A variant's difference is the mean of d over the seeds, and is given only when all of them are there. Both runs
must have had the same number of tokens at every step, or they cannot be compared. The bar is on the amount, so a run
that is better by more than it is as suspicious as one that is worse.
What it gives up: an error bar; two seeds and a rerun of the reference say what the noise is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from kvern.errors import CheckpointError
from kvern.train.metrics import read
from kvern.train.plot import INCHES

BAR = 0.0025
"""The report's: "relative loss error ... consistently below 0.25 %" (DeepSeek-V3, section 3.3 and appendix B.1)."""

LAST = 0.1
"""Share of the tokens, at the end, over which losses are averaged."""

SMOOTHED = 0.05
"""Share of a run's steps over which its curves are averaged."""

Runs = Mapping[tuple[str, int], "Curve"]
"""(variant, seed) -> what it has trained so far."""


@dataclass(frozen=True)
class Curve:
    """A run, up to `total` tokens. tokens [steps] int64: trained after each step; loss [steps] float64 in nats."""

    total: int
    tokens: NDArray[np.int64]
    loss: NDArray[np.float64]
    tokens_per_s: float
    """Median of the steps; 0 where there is none."""

    @classmethod
    def read(cls, metrics: Path, total: int) -> Curve:
        """From a run's metrics.jsonl, which need not be there yet. Raises CheckpointError where it is damaged."""
        rows = list(read(metrics)) if metrics.exists() else []
        tokens = np.array([row["tokens"] for row in rows], dtype=np.int64)
        steps = int(np.searchsorted(tokens, total)) + 1
        loss = np.array([row["loss"] for row in rows], dtype=np.float64)
        rate = median(row["tokens_per_s"] for row in rows) if rows else 0.0
        return cls(total, tokens[:steps], loss[:steps], rate)

    @property
    def trained(self) -> int:
        """Tokens so far."""
        return int(self.tokens[-1]) if len(self.tokens) else 0

    @property
    def is_complete(self) -> bool:
        """Whether it has trained on all its tokens."""
        return self.trained >= self.total

    def last_mean(self) -> float:
        """Mean loss of the last tenth, in nats, of a complete run."""
        inside = self.tokens > (1 - LAST) * self.total
        return float(np.average(self.loss[inside], weights=np.diff(self.tokens, prepend=0)[inside]))

    def relative(self, reference: Curve) -> NDArray[np.float64]:
        """Signed relative difference at each step that both have. CheckpointError where they are not comparable."""
        steps = min(len(self.tokens), len(reference.tokens))
        if not np.array_equal(self.tokens[:steps], reference.tokens[:steps]):
            step = int(np.argmax(self.tokens[:steps] != reference.tokens[:steps])) + 1
            raise CheckpointError(f"two runs to compare have trained on different numbers of tokens after step {step}")
        return self.loss[:steps] / reference.loss[:steps] - 1


@dataclass(frozen=True)
class Row:
    """A variant. losses, differences: by seed, of what is complete; `mean`: of the differences, when all are there."""

    variant: str
    trained: float
    """Share of the tokens of all its seeds."""
    losses: dict[int, float]
    differences: dict[int, float]
    mean: float | None
    within_bar: bool | None
    tokens_per_s: float


def compare(runs: Runs, reference: str) -> list[Row]:
    """A row for each variant, in the order of `runs`; the reference has no differences."""
    seeds = list(dict.fromkeys(seed for _, seed in runs))
    return [_row(runs, variant, reference, seeds) for variant in dict.fromkeys(variant for variant, _ in runs)]


def _row(runs: Runs, variant: str, reference: str, seeds: Sequence[int]) -> Row:
    curves = {seed: runs[variant, seed] for seed in seeds}
    losses = {seed: curve.last_mean() for seed, curve in curves.items() if curve.is_complete}
    differences = {}
    for seed, loss in losses.items():
        other = runs[reference, seed]
        if variant != reference and other.is_complete:
            curves[seed].relative(other)  # raises where they are not comparable
            differences[seed] = loss / other.last_mean() - 1
    mean = float(np.mean(list(differences.values()))) if len(differences) == len(seeds) else None
    trained = sum(min(curve.trained, curve.total) for curve in curves.values())
    share = trained / sum(curve.total for curve in curves.values())
    rate = median(rates) if (rates := [one.tokens_per_s for one in curves.values() if one.tokens_per_s]) else 0.0
    return Row(variant, share, losses, differences, mean, None if mean is None else abs(mean) < BAR, rate)


def table(rows: Sequence[Row], seeds: Sequence[int], markdown: bool = False) -> Iterator[str]:
    """The rows as text, or in Markdown."""
    head = ["variant", "trained", *(f"loss, seed {seed}" for seed in seeds)]
    head += [*(f"difference, seed {seed}" for seed in seeds), "mean", f"bar {BAR:.2%}", "tokens/s"]
    body = [_cells(row, seeds) for row in rows]
    if markdown:
        yield from (f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))
        return
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    for name, *cells in (head, *body):
        yield "  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))])


def _cells(row: Row, seeds: Sequence[int]) -> list[str]:
    return [
        row.variant,
        f"{row.trained:.0%}",
        *(_shown(row.losses.get(seed), ".4f") for seed in seeds),
        *(_shown(row.differences.get(seed), "+.3%") for seed in seeds),
        _shown(row.mean, "+.3%"),
        "-" if row.within_bar is None else ("under" if row.within_bar else "over"),
        f"{row.tokens_per_s:.0f}" if row.tokens_per_s else "-",
    ]


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def plot(runs: Runs, reference: str, png: Path) -> None:
    """Left the losses, right the smoothed differences with the bar; a line a seed, a colour a variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * INCHES[0], 1.2 * INCHES[1]), layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(1, 2)
    variants, seeds = ([*dict.fromkeys(key[part] for key in runs)] for part in (0, 1))
    for (variant, seed), curve in runs.items():
        colour, style = f"C{variants.index(variant)}", ("-", "--", ":", "-.")[seeds.index(seed) % 4]
        look = {"color": colour, "linestyle": style, "linewidth": 1.0, "label": f"{variant}, seed {seed}"}
        if steps := len(curve.loss):
            width = max(1, round(SMOOTHED * steps))
            losses.plot(_smooth(curve.tokens, width), _smooth(curve.loss, width), **look)
        other = runs[reference, seed]
        if variant != reference and len(relative := curve.relative(other)):
            width = max(1, round(SMOOTHED * max(len(curve.loss), len(other.loss))))
            tokens = curve.tokens[: len(relative)]
            differences.plot(_smooth(tokens, width), 100 * _smooth(relative, width), **look)
    total = max(curve.total for curve in runs.values())
    differences.axhspan(-100 * BAR, 100 * BAR, color="C7", alpha=0.15)
    differences.axhline(0, color="C7", linewidth=0.8)
    for panel, title in ((losses, "loss, nats"), (differences, f"difference to {reference}, %")):
        panel.axvline((1 - LAST) * total, color="C7", linewidth=0.8, linestyle=":")
        panel.set_title(title)
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
        if panel.lines and any(not str(line.get_label()).startswith("_") for line in panel.lines):
            panel.legend(fontsize="small")
    figure.savefig(png, dpi=120)


def _smooth(values: NDArray[np.int64] | NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Means of `width` neighbours, only whole ones; fewer values than that: their mean."""
    width = min(width, len(values))
    return np.convolve(values.astype(np.float64), np.full(width, 1 / width), mode="valid")
