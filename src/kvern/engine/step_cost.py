"""What a step costs, relative to others, from the configuration alone: the same on every run, so drafts are too.

    bytes(n) = weights every row needs + MoE layers * E (1 - (1 - k/E)^n) * an expert's weights
    cost(n, a) = OVERHEAD + bytes(n) / BANDWIDTH + n (active parameters / MULTIPLIES + ROW)
                 + a * layers * heads * (2 rank + rope) / ATTENTION
    mtp_pass   = PASS + bytes of what one row uses of the MTP layer, and of the head, / BANDWIDTH

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

    @property
    def mtp_pass(self) -> float:
        """Of the MTP layer and its head over a row or a few: what one more draft of a request takes."""


@dataclass(frozen=True)
class StepCost:
    """The cost of a model of `config`."""

    config: ModelConfig

    def __call__(self, rows: int, attended: int) -> float:
        """Seconds, roughly."""
        idle = (1 - self._share) ** rows
        read = (self._always + self._experts * (1 - idle)) * self._weight_bytes / BANDWIDTH
        return OVERHEAD + read + rows * (self._active / MULTIPLIES + ROW) + attended * self._attention

    @cached_property
    def mtp_pass(self) -> float:
        """Seconds, roughly; 0 without an MTP layer."""
        config = self.config
        if not config.num_nextn_predict_layers:
            return 0.0
        used = active_mtp_parameters(config) + config.vocab_size * config.hidden_size
        return PASS + used * self._weight_bytes / BANDWIDTH

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
        config = self.config
        layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
        return layers * (config.n_routed_experts or 0) * 3 * config.hidden_size * config.moe_intermediate_size

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
