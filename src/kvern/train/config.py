"""One TOML file -> `TrainConfig`, typed and frozen. A key that is not known is an error, with the nearest one.

    steps = 300                     # or tokens = 2_000_000
    [model]                         # config.json's keys, or folder = "checkpoint to begin from"
    [data]                          # see kvern.data
    [batch]                         # rows, micro_batch, length; [batch.ramp] grows it
    [optimizer] [learning_rate] [loss] [precision] [recompute] [mesh] [checkpoint] [metrics]

Defaults are DeepSeek-V3's where the report gives a number. A run that goes on may change only what changes nothing but
rounding, its length and what it writes (`MAY_CHANGE`).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvern.config import ModelConfig
from kvern.config.model_config import ALIASES, INERT, REQUIRED
from kvern.data.options import DataOptions
from kvern.errors import ConfigError
from kvern.ops import Fp8Recipe
from kvern.settings import nearest, read_toml
from kvern.train import muon, optim
from kvern.train.balance import ALPHA, GAMMA, GAMMA_TOKENS
from kvern.train.loss import LossOptions, MTPWeight
from kvern.train.schedule import BatchSize, LearningRate
from kvern.train.weights import INITIAL_STD

MAY_CHANGE = ("steps", "tokens", "batch.micro_batch", "recompute", "mesh", "checkpoint", "metrics")
"""Keys, or tables, that a run may change when it goes on. All others decide what the numbers are."""

ROPE_KEYS = ("rope_scaling", "rope_theta", "rope_parameters")
FOLDER = "folder"
BYTES = "bytes"


class Table(BaseModel):
    """A table of the file: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class RampTable(Table):
    """The batch grows from `first` sequences to all, linearly over `tokens`, in `multiple`s (None: of first)."""

    first: int = Field(ge=1)
    tokens: int = Field(ge=1)
    multiple: int | None = Field(default=None, ge=1)


class WindowTable(Table):
    """Documents of the run's first `rows` sequences are cut every `length` tokens."""

    rows: int = Field(ge=1)
    length: int = Field(ge=2)


class BatchTable(Table):
    """`rows` sequences of up to `length` tokens a step, computed `micro_batch` at a time on each rank.

    windows: short documents first, which cost less and are learned from sooner; of several, the first that reaches
    a sequence decides.
    """

    rows: int = Field(ge=1)
    length: int = Field(ge=2)
    micro_batch: int = Field(default=1, ge=1)
    ramp: RampTable | None = None
    windows: tuple[WindowTable, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> BatchTable:
        for shorter, longer in pairwise(self.windows):
            if not (shorter.rows < longer.rows and shorter.length < longer.length):
                raise ValueError("windows must grow, in rows and in length")
        if self.windows and self.windows[-1].length >= self.length:
            raise ValueError(f"a window of {self.windows[-1].length} cuts nothing off rows of {self.length}")
        return self

    def window_at(self, row: int) -> int:
        """How long documents of sequence `row` may be."""
        return next((window.length for window in self.windows if row < window.rows), self.length)

    def schedule(self, ranks: int = 1) -> BatchSize:
        """Sequences by tokens. ConfigError where `ranks` cannot share them evenly."""
        first = self.ramp.first if self.ramp else self.rows
        multiple = (self.ramp.multiple or first) if self.ramp else self.rows
        if first > self.rows:
            raise ConfigError(f"batch.ramp.first is {first}, over batch.rows, which is {self.rows}")
        for name, count in (("batch.rows", self.rows), ("batch.ramp.first", first)):
            if count % multiple:
                raise ConfigError(f"{name} is {count}, no multiple of batch.ramp.multiple, which is {multiple}")
        sizes = {"batch.rows": self.rows, "batch.ramp.first": first, "batch.ramp.multiple": multiple}
        for name, count in sizes.items():
            if count % ranks:
                raise ConfigError(f"{name} is {count}, which {ranks} ranks cannot share evenly", param=name)
        return BatchSize(first, self.rows, self.ramp.tokens if self.ramp else 0, multiple)


class OptimizerTable(Table):
    """What steps, AdamW's constants and Muon's momentum, and the norm to which all gradients together are clipped."""

    name: Literal["adamw", "muon"] = "adamw"
    momentum: float = Field(default=muon.MOMENTUM, ge=0, lt=1)
    betas: tuple[float, float] = optim.BETAS
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=optim.WEIGHT_DECAY, ge=0)
    max_norm: float = Field(default=optim.MAX_NORM, gt=0)

    @model_validator(mode="after")
    def _check(self) -> OptimizerTable:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to under 1, not {list(self.betas)}")
        if self.name == "adamw" and self.momentum != muon.MOMENTUM:
            raise ValueError("momentum is Muon's; betas are AdamW's")
        return self


class LearningRateTable(Table):
    """See `kvern.train.schedule.LearningRate`."""

    peak: float = Field(default=LearningRate.peak, ge=0)
    low: float = Field(default=LearningRate.low, ge=0)
    last: float = Field(default=LearningRate.last, ge=0)
    warmup_steps: int = Field(default=LearningRate.warmup_steps, ge=0)
    constant_tokens: int = Field(default=LearningRate.constant_tokens, ge=0)
    decay_tokens: int = Field(default=LearningRate.decay_tokens, ge=0)
    low_tokens: int = Field(default=LearningRate.low_tokens, ge=0)

    @model_validator(mode="after")
    def _check(self) -> LearningRateTable:
        if not self.peak >= self.low >= self.last:
            raise ValueError(f"rates must fall: peak {self.peak}, low {self.low}, last {self.last}")
        return self

    def schedule(self) -> LearningRate:
        """Rates by steps and tokens."""
        return LearningRate(**self.model_dump())


class LossTable(Table):
    """MTP's weight is `mtp` until `mtp_switch_tokens`, then `mtp_later`; the bias moves by `bias_step` until
    `bias_tokens`."""

    mtp: float = Field(default=MTPWeight.first, ge=0)
    mtp_later: float = Field(default=MTPWeight.later, ge=0)
    mtp_switch_tokens: int = Field(default=MTPWeight.switch_tokens, ge=0)
    norm_first: bool = LossOptions.norm_first
    balance: float = Field(default=ALPHA, ge=0)
    balance_by_choice: bool = False
    bias_step: float = Field(default=GAMMA, ge=0)
    bias_tokens: int = Field(default=GAMMA_TOKENS, ge=0)

    def options(self) -> LossOptions:
        """What `training_loss` takes."""
        weight = MTPWeight(self.mtp, self.mtp_later, self.mtp_switch_tokens)
        return LossOptions(weight, self.norm_first, self.balance, self.balance_by_choice)


class PrecisionTable(Table):
    """dtype: of what flows between layers. fp8: products of the Linears in E4M3."""

    dtype: Literal["bf16", "f32"] = "bf16"
    fp8: Literal["none", "blockwise", "tensorwise"] = "none"
    power_of_two: bool = True

    @property
    def activation_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def recipe(self) -> Fp8Recipe | None:
        """What `make_trainable` takes."""
        return None if self.fp8 == "none" else Fp8Recipe(self.power_of_two, self.fp8 == "tensorwise")


class RecomputeTable(Table):
    """What the backward pass computes again instead of keeping: see `kvern.train.recompute`."""

    activations: Literal["none", "norms", "block"] = "none"


class MeshTable(Table):
    """See `kvern.train.mesh.MeshOptions`."""

    expert: int = Field(default=1, ge=1)
    timeout_minutes: float = Field(default=30.0, gt=0)


class CheckpointTable(Table):
    """A checkpoint every `every` steps (0: only at the end), of which the `keep` newest stay."""

    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)


class MetricsTable(Table):
    """tensorboard: "auto" writes its files where it is installed."""

    tensorboard: Literal["auto", "on", "off"] = "auto"


class DataTable(DataOptions):
    """What to train on. tokenizer: a folder with tokenizer.json, or "bytes"; None: that of model.folder, or bytes."""

    tokenizer: str | None = Field(default=None, min_length=1)


class TrainConfig(Table):
    """A whole run. `model` holds config.json's keys as they were given, or `folder`; `architecture` reads them."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: dict[str, Any]
    data: DataTable
    batch: BatchTable
    optimizer: OptimizerTable = OptimizerTable()
    learning_rate: LearningRateTable = LearningRateTable()
    loss: LossTable = LossTable()
    precision: PrecisionTable = PrecisionTable()
    recompute: RecomputeTable = RecomputeTable()
    mesh: MeshTable = MeshTable()
    checkpoint: CheckpointTable = CheckpointTable()
    metrics: MetricsTable = MetricsTable()

    @property
    def folder(self) -> Path | None:
        """The checkpoint to begin from, if any."""
        return Path(self.model[FOLDER]) if FOLDER in self.model else None

    @property
    def initial_std(self) -> float:
        """Of fresh weights: model.initializer_range, or else the report's 0.006."""
        return float(self.model.get("initializer_range", INITIAL_STD))

    def architecture(self) -> ModelConfig:
        """The model to train: its parameters are float32 and not quantised, whatever the checkpoint stores."""
        given = ModelConfig.load(self.folder) if self.folder else _read_model(self.model)
        return replace(given, torch_dtype="float32", quantization_config=None)

    def toml(self) -> str:
        """The file that gives this configuration, with every default written out."""
        return tomli_w.dumps(self.model_dump(exclude_none=True, mode="json"))

    def fingerprint(self) -> str:
        """SHA-256 of what decides the numbers of a run."""
        decides = {key: value for key, value in self.flat().items() if not _may_change(key)}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return dict(_flatten(self.model_dump(exclude_none=True, mode="json")))

    def changed(self, other: TrainConfig) -> list[str]:
        """Keys in which `other` differs, of those that a run must not change."""
        mine, others = self.flat(), other.flat()
        return sorted(key for key in mine | others if mine.get(key) != others.get(key) and not _may_change(key))


def load(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a file; `overrides` are `dotted.key=value`, the value in TOML or plain text. Raises ConfigError."""
    raw = read_toml(path)
    for override in overrides:
        _set(raw, override)
    return parse(raw)


def parse(raw: Mapping[str, Any]) -> TrainConfig:
    """Check the parsed file. Raises ConfigError that names the dotted key."""
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise _as_config_error(error, raw) from error
    _check_together(config)
    return config


def _check_together(config: TrainConfig) -> None:
    """What no single key can tell."""
    if (config.steps is None) == (config.tokens is None):
        raise ConfigError("give steps or tokens, and not both: how long the run is", param="steps")
    if config.folder is None:
        _check_model_keys(config.model)
    elif len(config.model) > 1:
        other = next(key for key in config.model if key != FOLDER)
        raise ConfigError(f"model.{other} beside model.folder", hint="the folder's config.json says what the model is")
    architecture, batch = config.architecture(), config.batch
    if batch.length > architecture.max_position_embeddings:
        raise ConfigError(
            f"batch.length is {batch.length}, and the model's window {architecture.max_position_embeddings} tokens",
            hint="shorter rows, or a larger model.max_position_embeddings",
            param="batch.length",
        )
    batch.schedule()
    expert, experts = config.mesh.expert, architecture.n_routed_experts
    if expert > 1 and (experts is None or experts % expert):
        raise ConfigError(f"mesh.expert is {expert}, which does not divide the model's {experts or 0} experts")


def _check_model_keys(given: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(ModelConfig)} | set(REQUIRED) | INERT | set(ALIASES) | set(ROPE_KEYS)
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key model.{key}", hint=_did_you_mean(key, known, "model."))
    std = given.get("initializer_range", INITIAL_STD)
    if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 < std < 10:
        raise ConfigError(f"model.initializer_range must be a positive number, not {std!r}")


def _read_model(raw: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict({"model_type": "deepseek_v3", **raw})
    except ConfigError as error:
        named = error.message.removeprefix("config.json ")
        where = "model." if named.split(" ")[0] in raw else "model: "
        raise ConfigError(where + named, hint=error.hint) from error


def _as_config_error(error: ValidationError, raw: Mapping[str, Any]) -> ConfigError:
    found = error.errors(include_url=False, include_context=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])  # why another one is missing
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _siblings(path[:-1])
        prefix = "".join(f"{part}." for part in path[:-1])
        return ConfigError(f"unknown key {dotted}", hint=_did_you_mean(path[-1], known, prefix), param=dotted)
    if first["type"] == "missing":
        return ConfigError(f"{dotted} is missing", param=dotted)
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], (dict, list)) else f", not {first['input']!r}"
    return ConfigError(f"{dotted}: {message[0].lower()}{message[1:]}{shown}", param=dotted)


def _siblings(path: Sequence[str]) -> Iterable[str]:
    """The keys of the table at `path`."""
    table: type[BaseModel] = TrainConfig
    for part in (part for part in path if not part.isdigit()):
        kinds = [table.model_fields[part].annotation] if part in table.model_fields else []
        inner = [kind for kind in (*kinds, *getattr(kinds[0] if kinds else None, "__args__", ())) if _is_table(kind)]
        if not inner:
            return ()
        table = inner[0]
    return table.model_fields


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _did_you_mean(name: str, known: Iterable[str], prefix: str) -> str | None:
    near = nearest(name, known)
    return f"did you mean {prefix}{near}?" if near else None


def _set(raw: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not all(parts := dotted.strip().split(".")):
        raise ConfigError(f"--set {override!r} is not key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {dotted}: {part} is no table")
    table[parts[-1]] = value


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
