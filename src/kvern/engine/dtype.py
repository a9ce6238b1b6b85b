"""Chooses, by a measurement at start, in which dtypes a model runs on this CPU.

    cost = sqrt(time of one row * time of sixteen rows)      over weights too large for the caches

No rule predicts the winner: BF16 halves the bytes of FP32, yet torch's BF16 loses to its FP32 on a CPU without BF16
instructions as soon as there are several rows. So each form in which the model could run multiplies one of the model's
own shapes; that takes well under a second. A form whose weights would not fit into memory is not considered, and where
two are within `TIE`, the one with the more exact arithmetic wins. It gives up measuring attention, which is small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kvern.config import Int4Config, ModelConfig, QuantizationConfig
from kvern.model.linear import Linear
from kvern.plan.hardware import machine
from kvern.plan.memory import account

FP8 = torch.float8_e4m3fn
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NUMBERS = 32 << 20
"""Weights multiplied in a measurement: 32 MiB in FP8, more than a core's share of the outer cache."""

ROUNDS = 3
SECONDS = 0.16
"""Time after which a form is not measured further."""

TIE = 1.1
ROWS = (1, 16)


@dataclass(frozen=True)
class Form:
    """One way to run a model: dtype of the activations, and of the weights in memory (None: as stored, mapped)."""

    activations: torch.dtype
    weights: torch.dtype | None

    def __str__(self) -> str:
        weights = "as stored" if self.weights is None else f"in {_name(self.weights)}"
        return f"{_name(self.activations)} activations, weights {weights}"


FORMS = (
    Form(torch.float32, None),
    Form(torch.float32, torch.float32),
    Form(torch.bfloat16, None),
    Form(torch.bfloat16, torch.bfloat16),
)
"""From the most exact to the least."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds for a product of `outputs` x `inputs` weights with 1 and with 16 rows, or why it was left out."""

    form: Form
    outputs: int
    inputs: int
    one_row: float | None
    sixteen_rows: float | None
    left_out: str | None = None

    @property
    def cost(self) -> float:
        """Infinite for a form that was left out."""
        if self.one_row is None or self.sixteen_rows is None:
            return math.inf
        return math.sqrt(self.one_row * self.sixteen_rows)


@dataclass(frozen=True)
class Choice:
    """What to load: `weight_dtype` is `load`'s dtype (None keeps the mapped weights); and what that rests on."""

    activation_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    measurements: tuple[Measurement, ...]


def choose(config: ModelConfig, forms: Iterable[Form] = FORMS) -> Choice:
    """Measure `forms`, most exact first, on this machine and take the fastest; an earlier one on a tie."""
    available = machine().memory_available
    measured = tuple(_measure(config, form, available) for form in _distinct(config, forms))
    least = min(one.cost for one in measured)
    best = next(one.form for one in measured if one.cost <= least * TIE)
    return Choice(best.activations, best.weights, measured)


def stored_dtype(config: ModelConfig) -> torch.dtype:
    """What most weights of the checkpoint are stored in; int32 for 4-bit groups."""
    quantization = config.quantization_config
    if isinstance(quantization, Int4Config) and config.hidden_size % quantization.group_size == 0:
        return torch.int32
    return FP8 if isinstance(quantization, QuantizationConfig) else STORED[config.torch_dtype]


def _distinct(config: ModelConfig, forms: Iterable[Form]) -> list[Form]:
    """Without conversions into the dtype that the weights have already."""
    return [form for form in forms if form.weights is not stored_dtype(config)]


def _measure(config: ModelConfig, form: Form, available: int) -> Measurement:
    outputs, inputs = _shape(config)
    needed = 0 if form.weights is None else form.weights.itemsize * account(config).parameters
    if needed > available:
        reason = f"{needed / 2**30:.1f} GiB of weights, {available / 2**30:.1f} GiB available"
        return Measurement(form, outputs, inputs, None, None, reason)
    one, sixteen = _times(_linears(config, outputs, inputs, form.weights), form.activations)
    return Measurement(form, outputs, inputs, one, sixteen)


def _shape(config: ModelConfig) -> tuple[int, int]:
    """[outputs, inputs] of the projection that the model multiplies most often."""
    width = config.intermediate_size
    if config.n_routed_experts and config.first_k_dense_replace < config.num_hidden_layers:
        width = config.moe_intermediate_size or width
    return min(width, max(1, NUMBERS // config.hidden_size)), config.hidden_size


def _linears(config: ModelConfig, outputs: int, inputs: int, dtype: torch.dtype | None) -> list[Linear]:
    """Copies of a weight in `dtype` (None: as the checkpoint stores it), more than any cache holds together."""
    stored = dtype or stored_dtype(config)
    plain = STORED[config.torch_dtype] if stored is torch.int32 else stored
    linears = [Linear(inputs, outputs, plain, "cpu") for _ in range(max(1, NUMBERS // (outputs * inputs)))]
    for linear in linears:
        if stored is torch.int32 and isinstance(config.quantization_config, Int4Config):
            linear.store_int4(config.quantization_config.group_size)
        for parameter in linear.parameters():
            parameter.fill_(0.0625 if parameter.is_floating_point() else 1)
    return linears


@torch.inference_mode()
def _times(linears: list[Linear], activations: torch.dtype) -> tuple[float, float]:
    """Microseconds a product for 1 and for 16 rows."""
    inputs = linears[0].inputs
    one, sixteen = (_time(torch.ones(rows, inputs, dtype=activations), linears) for rows in ROWS)
    return one, sixteen


def _time(x: Tensor, linears: list[Linear]) -> float:
    """Median over rounds, the first (cold) one left out where there is time for more."""
    deadline = time.perf_counter() + SECONDS / len(ROWS)
    rounds: list[float] = []
    while len(rounds) <= ROUNDS and (not rounds or time.perf_counter() < deadline):
        start, done = time.perf_counter(), 0
        for linear in linears:
            linear(x)
            done += 1
            if time.perf_counter() > deadline:
                break
        rounds.append((time.perf_counter() - start) / done)
    return median(rounds[1:] or rounds) * 1e6


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
