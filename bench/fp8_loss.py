"""Whether FP8 trains as well as BF16: the same model, data and seed in each, and the difference of their losses.

    python -m bench.fp8_loss [--estimate | --report] [--work DIR] [--json | --markdown]

`configs/fp8-loss.toml` is trained in four ways, with each of two seeds:

    bf16            the reference
    fp8-blockwise   the report's recipe: 1x128 activations and gradients, 128x128 weights, activation scales powers
                    of two
    bf16-again      the noise floor, see below
    fp8-tensorwise  one scale a tensor, for comparison

`bench.loss_difference` says how losses are compared. On a CPU FP8 is emulated: the same codes and scales, FP32 sums.

**The noise floor.** A rerun of the same file on the same number of threads gives the same bits, so it would show no
noise at all. `bf16-again` computes each batch in twice as many micro-batches: by the trainer's contract that changes
nothing but the order of sums, so any difference it makes is what rounding alone makes of such a run. FP8 rounds more
coarsely and from the first step, so its noise is at least this; the two seeds show how much a difference varies.

Every run is a `kvern train` run in a folder of its own under --work (`fp8-blockwise-seed0`, ...). A study that was cut,
in any way, goes on where it was with the same command. It first takes a few steps of every variant, which are the runs'
own first steps, to say how long all will take. The order makes the first pairs useful: BF16 and blockwise FP8 of each
seed, then the rerun, then tensorwise. Emulated FP8 takes about twice as long as BF16.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench.loss_difference import BAR, LAST, Curve, Row, compare, plot, table

from kvern.checkpoint.local import cache_folder
from kvern.cli import train as train_command
from kvern.errors import ConfigError, KvernError
from kvern.plan.hardware import machine
from kvern.train.config import TrainConfig, load
from kvern.train.run_folder import RunFolder, check_same

REFERENCE, AGAIN = "bf16", "bf16-again"
COMPARED = ("fp8-blockwise", AGAIN, "fp8-tensorwise")
CONFIG = Path(__file__).parents[1] / "configs/fp8-loss.toml"
OPENING_STEPS = 8
"""Taken of every variant to estimate the time."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant}-seed{self.seed}"


class Study:
    """The runs over one configuration in one folder."""

    def __init__(
        self, config: Path, work: Path, seeds: Sequence[int], overrides: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self.file, self.work, self.seeds, self.overrides, self.threads = config, work, seeds, overrides, threads
        base = load(config, overrides)
        if base.tokens is None:
            raise ConfigError("the study needs tokens, not steps: how long each run is", param="tokens")
        if base.batch.micro_batch < 2:
            raise ConfigError(
                "batch.micro_batch is 1, and the noise floor comes from halving it", param="batch.micro_batch"
            )
        if base.precision.dtype != "bf16" or base.precision.fp8 != "none":
            raise ConfigError("the configuration must be in BF16 without fp8: the study sets it", param="precision")
        self.base, self.total = base, base.tokens
        for run in self.order():
            self._check(run)

    def order(self) -> list[Run]:
        """In which they are trained: after each reference its comparison, the most telling first."""
        runs: list[Run] = []
        for variant in COMPARED:
            for seed in self.seeds:
                runs += [Run(REFERENCE, seed)] if variant == COMPARED[0] else []
                runs.append(Run(variant, seed))
        return runs

    def folder(self, run: Run) -> RunFolder:
        """Where it is."""
        return RunFolder(self.work / run.name)

    def curve(self, run: Run) -> Curve:
        """What it has trained so far."""
        return Curve.read(self.folder(run).metrics, self.total)

    def curves(self) -> dict[tuple[str, int], Curve]:
        """By variant and seed, the reference first."""
        return {
            (variant, seed): self.curve(Run(variant, seed)) for variant in (REFERENCE, *COMPARED) for seed in self.seeds
        }

    def settings(self, run: Run) -> list[str]:
        """What `kvern train --set` gets."""
        own = [f"seed={run.seed}"]
        if run.variant == AGAIN:
            own.append(f"batch.micro_batch={self.base.batch.micro_batch // 2}")
        elif run.variant != REFERENCE:
            own.append(f'precision.fp8="{run.variant.removeprefix("fp8-")}"')
        return [*self.overrides, *own]

    def train(self, run: Run, tokens: int) -> int:
        """Go on with it until `tokens`; the command's exit code, 0 or 128 and a signal's number."""
        overrides = [*self.settings(run), f"tokens={tokens}"]
        where = self.folder(run).path
        where.parent.mkdir(parents=True, exist_ok=True)
        options = {"out": where, "overrides": overrides, "resume": "auto", "threads": self.threads}
        return train_command.run(argparse.Namespace(config=self.file, **options))

    def open(self, say: Say) -> int:
        """A few steps of each variant, where it has none."""
        batch = self.base.batch
        tokens = min(self.total, OPENING_STEPS * batch.rows * batch.length)
        for variant in (REFERENCE, *COMPARED):
            run = Run(variant, self.seeds[0])
            if not self.curve(run).trained:
                say(f"{run.name}: first steps, to estimate the time")
                if code := self.train(run, tokens):
                    return code
        return 0

    def seconds_left(self) -> float:
        """At the median speed of each variant's steps so far; to be asked after `open`."""
        curves = self.curves()
        seconds = 0.0
        for (variant, _), curve in curves.items():
            rates = [one.tokens_per_s for (name, _), one in curves.items() if name == variant and one.tokens_per_s]
            seconds += max(0, self.total - curve.trained) / median(rates)
        return seconds

    def finish(self, say: Say) -> int:
        """Train what is left, run after run; the exit code of the one that was stopped, or 0."""
        order = self.order()
        for number, run in enumerate(order, start=1):
            if not self.curve(run).is_complete:
                left = _minutes(self.seconds_left())
                say(f"run {number} of {len(order)}, {run.name}: about {left} left for the study")
                if code := self.train(run, self.total):
                    return code
        return 0

    def _check(self, run: Run) -> None:
        """ConfigError where its folder was begun with another configuration."""
        config, folder = load(self.file, self.settings(run)), self.folder(run)
        if folder.is_begun():
            check_same(load(folder.config), config, folder.path)


def report(study: Study, form: str) -> Iterator[str]:
    """What is there, as text, markdown or json."""
    curves = study.curves()
    rows = compare(curves, REFERENCE)
    if form == "json":
        yield json.dumps(_facts(study, rows), indent=2)
        return
    yield from (table(rows, study.seeds, markdown=form == "markdown"))
    yield ""
    yield _heading(study)
    yield from _findings(rows)


def _facts(study: Study, rows: Sequence[Row]) -> dict[str, object]:
    return {
        "machine": machine().cpu,
        "threads": study.threads,
        "seeds": list(study.seeds),
        "tokens": study.total,
        "last": LAST,
        "bar": BAR,
        "complete": all(row.trained >= 1 for row in rows),
        "rows": [asdict(row) for row in rows],
        "config": study.base.model_dump(mode="json", exclude_none=True),
    }


def _heading(study: Study) -> str:
    size, tokens = parameters(study.base) / 1e6, study.total / 1e6
    what = f"mean loss (nats) of the last {LAST:.0%}, and the difference to {REFERENCE} of the same seed"
    return f"{size:.1f}M parameters, {tokens:.2f}M tokens a run; {what}; {machine().cpu}"


def _findings(rows: Sequence[Row]) -> Iterator[str]:
    found = {row.variant: row.mean for row in rows}
    floor = found[AGAIN]
    noise = "not measured yet" if floor is None else f"{floor:+.3%}"
    for row in rows:
        if row.variant not in (REFERENCE, AGAIN):
            verdict = "not measured yet" if row.mean is None else f"{row.mean:+.3%}, {_side(row)} the bar of {BAR:.2%}"
            yield f"{row.variant}: {verdict}; noise floor: {noise}"


def _side(row: Row) -> str:
    return "under" if row.within_bar else "over"


def parameters(config: TrainConfig) -> int:
    """Of the model, MTP included; embedding and head once."""
    from kvern.model import Transformer
    from kvern.train.model import make_trainable

    model = Transformer(config.architecture(), device="meta")
    make_trainable(model)
    return sum(parameter.numel() for parameter in model.parameters())


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def run(args: argparse.Namespace) -> int:
    """Estimate, train, report. 0, or 128 and the number of the signal that stopped a run."""
    study = Study(args.config, args.work, args.seeds, args.overrides, args.threads)
    code = 0
    if not args.report:
        code = study.open(_say)
        if not code:
            left = study.seconds_left()
            _say(f"about {_minutes(left)} left for the study: until {_clock(time.time() + left)}")
        if code or args.estimate:
            return code
        code = study.finish(_say)
    for line in report(study, args.form):
        print(line)
    png = args.png or args.work / "fp8-loss.png"
    plot(study.curves(), REFERENCE, png)
    _say(f"curves: {png}" + ("" if not code else "; stopped: the same command goes on"))
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, default=cache_folder() / "fp8-loss", metavar="DIR", help="holds the runs")
    made.add_argument("--config", type=Path, default=CONFIG, help="the run in BF16 (default: configs/fp8-loss.toml)")
    made.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as in kvern train"
    )
    made.add_argument("--seeds", type=_seeds, default=(0, 1), metavar="N,N", help="default: 0,1")
    made.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: every usable core)")
    made.add_argument("--png", type=Path, help="default: fp8-loss.png in --work")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--estimate", action="store_true", help="only take the first steps and say how long it takes")
    what.add_argument("--report", action="store_true", help="train nothing; report what is there")
    form = made.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", default="text")
    form.add_argument("--markdown", action="store_const", const="markdown", dest="form")
    return made


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text} names a seed twice")
    return seeds


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run, and say what is wrong in one line."""
    args = parser().parse_args()
    try:
        sys.exit(run(args))
    except KvernError as error:
        _say(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # between two runs; within one the trainer hears it
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
