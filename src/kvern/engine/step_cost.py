"""What a step costs, relative to others, from the configuration alone: the same on every run, so drafts are too.

    bytes(n) = weights every row needs + MoE layers * E (1 - (1 - k/E)^n) * an expert's weights
    cost(n, a) = OVERHEAD + bytes(n) / BANDWIDTH + n (active parameters / MULTIPLIES + ROW)
                 + a * layers * heads * (2 rank + rope) / ATTENTION
    mtp_pass(n) = PASS + bytes(n) of the MTP layer and the head / BANDWIDTH

n rows that together look at a context rows. Weights are read once for all rows, so a second row is nearly free in a
dense model, and costs most of a step where it wakes other experts. The constants are seconds of a two-core machine
with AVX-512 BF16; only their ratios matter. It gives up other machines' balance: one with more bandwidth a core drafts
a little too eagerly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from kvern.config import ModelConfig
from kvern.plan.memory import account, active_mtp_parameters

BANDWIDTH = 33e9
"""Bytes a second."""

MULTIPLIES = 300e9
"""Multiplications a second of a product of a few rows whose weights have been read."""

ATTENTION = 90e9
"""Multiplications a second of absorbed attention."""

OVERHEAD, PASS, ROW = 6e-4, 6e-4, 1e-4
"""Seconds of a step, of a pass of the MTP layer, and of each row, outside the products: calls, sampling."""


class Cost(Protocol):
    """Seconds, in any unit, of a step of `rows` rows that look at `attended` context rows together."""

    def __call__(self, rows: int, attended: int) -> float:
        """The cost."""

    def mtp_pass(self, rows: int) -> float:
        """Of the MTP layer and its head over a row each of so many requests: one more draft for each."""


@dataclass(frozen=True)
class StepCost:
    """The cost of a model of `config`."""

    config: ModelConfig

    def __call__(self, rows: int, attended: int) -> float:
        """Seconds, roughly."""
        read = self._reading(self._always, self._experts, rows)
        return OVERHEAD + read + rows * (self._active / MULTIPLIES + ROW) + attended * self._attention

    def mtp_pass(self, rows: int) -> float:
        """Seconds, roughly, of a model with an MTP layer."""
        config, experts = self.config, self._layer_experts if self.config.is_moe(self.config.num_hidden_layers) else 0
        always = active_mtp_parameters(config) - self._share * experts + config.vocab_size * config.hidden_size
        return PASS + self._reading(always, experts, rows)

    def _reading(self, always: float, experts: int, rows: int) -> float:
        """Seconds to read what any row needs, and those of the experts that so many rows choose."""
        return (always + experts * (1 - (1 - self._share) ** rows)) * self._weight_bytes / BANDWIDTH

    @cached_property
    def _weight_bytes(self) -> float:
        if self.config.quantization_config is not None:
            return 1
        return 2 if self.config.torch_dtype == "bfloat16" else 4

    @cached_property
    def _share(self) -> float:
        """Part of the routed experts that one row uses."""
        config = self.config
        return config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0

    @cached_property
    def _experts(self) -> int:
        """Parameters of all routed experts."""
        return self._layer_experts * sum(self.config.is_moe(layer) for layer in range(self.config.num_hidden_layers))

    @cached_property
    def _layer_experts(self) -> int:
        config = self.config
        return (config.n_routed_experts or 0) * 3 * config.hidden_size * config.moe_intermediate_size

    @cached_property
    def _active(self) -> int:
        return account(self.config).active_parameters

    @cached_property
    def _always(self) -> float:
        """Parameters that any row needs."""
        return self._active - self._share * self._experts

    @cached_property
    def _attention(self) -> float:
        config = self.config
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        return config.num_hidden_layers * config.num_attention_heads * width / ATTENTION
