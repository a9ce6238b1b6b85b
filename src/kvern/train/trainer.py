"""The loop: rows by number, a step, its metrics, a checkpoint now and then.

A step's global batch is the rows [consumed, consumed + B) of the stream, of which rank r of D learns rows consumed + r,
consumed + r + D and so on. B and the learning rate depend on tokens and steps alone, so where a run stands is three
numbers (`checkpoint.Progress`), and a run that goes on computes what it would have computed.

A signal ends it after the step that runs, with a checkpoint (`stopping.Stopping`). All ranks agree on when.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kvern.data.row_stream import Row
from kvern.errors import ConfigError, TrainingError
from kvern.model import Transformer
from kvern.plan.flops import step_flops
from kvern.train import checkpoint
from kvern.train.balance import gamma_at
from kvern.train.checkpoint import Checkpoints, Progress
from kvern.train.config import TrainConfig
from kvern.train.imported import imports_of
from kvern.train.mesh import Ranks
from kvern.train.metrics import Metrics, StepMetrics
from kvern.train.model import make_trainable
from kvern.train.muon import Muon, matrix_groups
from kvern.train.optim import AdamW, parameter_groups
from kvern.train.parallelize import parallelize
from kvern.train.peak import Peak
from kvern.train.recompute import recompute
from kvern.train.start import open_masters, open_stored
from kvern.train.step import Learner, StepResult, StepSettings
from kvern.train.stopping import Stopping
from kvern.train.weights import fill, initialise


class Rows(Protocol):
    """What is trained on; `kvern.data.row_stream.RowStream` is one."""

    @property
    def fingerprint(self) -> str:
        """Names what `row` returns."""

    def row(self, index: int) -> Row:
        """Row `index`, from 0, without end."""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended; `signal`: what stopped it before its end (SIGTERM where another rank heard it alone)."""

    progress: Progress
    signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """0: to the end; 128 and the signal's number: stopped by one."""
        return 0 if self.signal is None else 128 + self.signal

    def __str__(self) -> str:
        """What a user reads at the end."""
        if self.signal is None:
            return f"trained to the end: step {self.progress.step}, {self.progress.tokens:,} tokens"
        return f"stopped by {self.signal.name} after step {self.progress.step}; --resume auto goes on"


class Trainer:
    """A run: `config` over `rows`, on this process's share of `ranks`."""

    def __init__(self, config: TrainConfig, rows: Rows, ranks: Ranks, checkpoints: Checkpoints) -> None:
        self.config, self.rows, self.ranks, self.checkpoints = config, rows, ranks, checkpoints
        self.batch_size = config.batch.schedule(ranks.data_size)
        self.learning_rate = config.learning_rate.schedule()
        torch.manual_seed(config.seed)
        self.model = build_model(config, ranks)
        self.optimizer = build_optimizer(config, self.model)
        self.learner = Learner(self.model, self.optimizer, ranks.sum, ranks.device)
        self.progress = Progress(config=config.fingerprint(), data=rows.fingerprint)

    def resume(self) -> bool:
        """Go on from the newest complete checkpoint; False where there is none."""
        path = checkpoint.latest(self.checkpoints.folder)
        if path is None:
            return False
        progress = checkpoint.read_progress(path)
        self._check(progress)
        state = checkpoint.training_state(self.model, self.optimizer)
        self.checkpoints.load(path, state)
        checkpoint.set_steps(self.optimizer, progress.step)
        torch.set_rng_state(state["generator"])
        self.progress = progress
        return True

    def run(self, metrics: Metrics, peak: Peak, stopping: Stopping | None = None) -> Outcome:
        """Train to the end, or until `stopping` has heard a signal. TrainingError where numbers are not finite."""
        if stopping is not None:
            stopping.after_step()
        saved, is_stopped = self.progress.step, False
        while not self._is_done():
            metrics.write(self.step(peak))
            is_stopped = self._agree(stopping)
            every = self.config.checkpoint.every
            if is_stopped or self._is_done() or (every and self.progress.step % every == 0):
                self.save()
                saved = self.progress.step
            if is_stopped:
                break
        if saved < self.progress.step:
            self.save()
        self.checkpoints.wait()
        return Outcome(self.progress, _heard(stopping) or (signal.SIGTERM if is_stopped else None))

    def save(self) -> None:
        """Begin a checkpoint of where the run is."""
        self.checkpoints.save(checkpoint.training_state(self.model, self.optimizer), self.progress)

    def step(self, peak: Peak) -> StepMetrics:
        """Take one step and say what it was."""
        begin, now, config = time.perf_counter(), self.progress, self.config
        batch = self.batch_size.at(now.tokens)
        settings = StepSettings(
            lr=self.learning_rate.at(now.step, now.tokens),
            max_norm=config.optimizer.max_norm,
            bias_step=gamma_at(now.tokens, config.loss.bias_step, config.loss.bias_tokens),
            loss=config.loss.options(),
            tokens=now.tokens,
            micro_batch=config.batch.micro_batch,
        )
        try:
            result = self.learner.step(list(self._share(batch)), batch, settings)
        except TrainingError as error:
            raise self._explained(error) from error
        self.progress = replace(
            now, step=now.step + 1, tokens=now.tokens + result.tokens, consumed=now.consumed + batch
        )
        return self._metrics(result, settings.lr, batch, time.perf_counter() - begin, peak)

    def _share(self, batch: int) -> Iterator[Row]:
        """This rank's rows of the next `batch`, checked."""
        for index in range(self.ranks.data_rank, batch, self.ranks.data_size):
            number = self.progress.consumed + index
            row = self.rows.row(number).cut(self.config.batch.window_at(number))
            if len(row.tokens) > self.config.batch.length:
                raise ConfigError(
                    f"row {number} has {len(row.tokens)} tokens, over batch.length, which is {self.config.batch.length}"
                )
            if int(row.tokens.max(initial=0)) >= self.model.config.vocab_size:
                raise ConfigError(
                    f"the data has token {int(row.tokens.max())}, and model.vocab_size is "
                    f"{self.model.config.vocab_size}",
                    hint="a larger vocabulary, or the tokenizer that belongs to the model",
                )
            yield row

    def _metrics(self, result: StepResult, lr: float, batch: int, seconds: float, peak: Peak) -> StepMetrics:
        loads = [load.max_over_mean for load in result.loads.values()]
        flops = step_flops(self.model.config, result.tokens, result.pairs)
        return StepMetrics(
            step=self.progress.step,
            tokens=self.progress.tokens,
            loss=result.main,
            mtp_loss=result.mtp,
            balance_loss=result.balance,
            lr=lr,
            grad_norm=result.grad_norm,
            load_max_over_mean={"worst": max(loads), "mean": sum(loads) / len(loads)} if loads else None,
            batch=batch,
            seconds=seconds,
            tokens_per_s=result.tokens / seconds,
            mfu=flops / seconds / (peak.flops * self.ranks.world),
        )

    def _is_done(self) -> bool:
        config = self.config
        if config.steps is not None:
            return self.progress.step >= config.steps
        assert config.tokens is not None
        return self.progress.tokens >= config.tokens

    def _agree(self, stopping: Stopping | None) -> bool:
        """Whether any rank was told to stop."""
        votes = torch.tensor([int(_heard(stopping) is not None)], device=self.ranks.device)
        self.ranks.sum(votes)
        return bool(votes.item())

    def _explained(self, error: TrainingError) -> TrainingError:
        """The error with the step, and with where the run can go on from."""
        self.checkpoints.wait()
        last = checkpoint.latest(self.checkpoints.folder)
        kept = f"{last} is the last good checkpoint, and stays" if last else "there is no checkpoint yet"
        return TrainingError(f"step {self.progress.step + 1}: {error.message}", hint=error.hint or kept)

    def _check(self, progress: Progress) -> None:
        if progress.config != self.progress.config:
            raise ConfigError("the newest checkpoint is of another configuration than config.toml in its folder")
        if progress.data != self.progress.data:
            raise ConfigError(
                "the data is not what this run was begun with",
                hint="put the sources back as they were, or begin a new run",
                param="data",
            )


def build_model(config: TrainConfig, ranks: Ranks) -> Transformer:
    """The model to train, fresh or from a checkpoint: this rank's share, on its device.

    It has no memory until it is cut, so a rank needs that of its share. An exact import is read whole first, for its
    numbers decide what of it trains.
    """
    dtype = config.precision.activation_dtype
    stored = None if config.folder is None else open_stored(config.folder)
    if stored is not None and imports_of(stored):
        model = open_masters(stored, activation_dtype=dtype)
        _prepare(model, config)
        parallelize(model.to(ranks.device), ranks)
        return model
    model = Transformer(config.architecture(), device="meta", activation_dtype=dtype)
    _prepare(model, config)
    parallelize(model, ranks)
    model.to_empty(device=ranks.device)
    if stored is None:
        initialise(model, config.seed, config.initial_std)
    else:
        fill(model, stored)
    return model


def build_optimizer(config: TrainConfig, model: Transformer) -> AdamW:
    """What `config.optimizer` names, over a model that `build_model` has made."""
    table, lr = config.optimizer, config.learning_rate.peak
    if table.name == "muon":
        groups = matrix_groups(model, table.weight_decay)
        return Muon(groups, lr, momentum=table.momentum, betas=table.betas, eps=table.eps)
    return AdamW(parameter_groups(model, table.weight_decay), lr, betas=table.betas, eps=table.eps)


def _prepare(model: Transformer, config: TrainConfig) -> None:
    make_trainable(model, config.precision.recipe())
    recompute(model, config.recompute.activations)


def _heard(stopping: Stopping | None) -> signal.Signals | None:
    return None if stopping is None else stopping.signal
