"""The whole model: embedding, decoder layers, norm and head, and the MTP layers that ride along.

Built on the meta device (the default) it costs no memory, and its `state_dict()` is the official layout: names, shapes
and dtypes of a checkpoint. `checkpoint.load` then puts mapped tensors into it. Weights keep their stored dtype;
`activation_dtype` is what flows between layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from kvern.config import Int4Config, ModelConfig, QuantizationConfig
from kvern.errors import UnsupportedModelError
from kvern.model.batch import ForwardBatch
from kvern.model.layer import DecoderLayer
from kvern.model.linear import DTYPES, FP8, Linear, RMSNorm, embedding
from kvern.model.mtp import MTPLayer
from kvern.model.rope import inverse_frequencies, rotations

Result = TypeVar("Result")


class Decoder(nn.Module):
    """`model.*` of the checkpoint. `layers` holds the decoder layers and after them the MTP layers."""

    def __init__(self, config: ModelConfig, device: str, mtp: bool) -> None:
        super().__init__()
        self.config = config
        dtype, count = DTYPES[config.torch_dtype], config.num_hidden_layers
        self.embed_tokens = embedding(config, device)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, device) for layer in range(count))
        if mtp:
            extra = range(count, count + config.num_nextn_predict_layers)
            self.layers.extend(MTPLayer(config, layer, device) for layer in extra)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.frequencies = inverse_frequencies(config.rope_theta, config.qk_rope_head_dim, config.rope_scaling)

    def rotation(self, batch: ForwardBatch) -> Tensor:
        """[T, qk_rope_head_dim / 2] complex64 for the batch's positions."""
        return rotations(batch.places, self.frequencies.to(batch.places.device), self.rotation_factor)

    @property
    def rotation_factor(self) -> float:
        """What every rotation is multiplied by; 1 for V3."""
        scaling = self.config.rope_scaling
        return scaling.rotation_factor if scaling else 1.0

    def forward(self, batch: ForwardBatch, activation_dtype: torch.dtype) -> Tensor:
        """Hidden states [T, hidden] after the last norm."""
        out: Tensor = self.norm(self.states(batch, activation_dtype))
        return out

    def states(self, batch: ForwardBatch, activation_dtype: torch.dtype) -> Tensor:
        """Hidden states [T, hidden] before the last norm."""
        rotation_TF = self.rotation(batch)
        x_TE: Tensor = self.embed_tokens(batch.tokens).to(activation_dtype)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x_TE = layer(x_TE, rotation_TF, batch)
        return x_TE


class Transformer(nn.Module):
    """A V3 model. `model(batch)` gives logits, `model.hidden(batch)` the states that MTP continues from."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: str = "meta",
        activation_dtype: torch.dtype | None = None,
        mtp: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_dtype = activation_dtype or DTYPES[config.torch_dtype]
        self.model = Decoder(config, device, mtp)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, DTYPES[config.torch_dtype], device)
        if isinstance(config.quantization_config, Int4Config):
            self._store_int4(config.quantization_config)
        elif config.quantization_config and config.quantization_config.modules_to_not_convert:
            self._keep_unconverted(config.quantization_config)

    def within(self, compute: Callable[[], Result]) -> Result:
        """`compute()`, as one forward pass of this model: what shards weights gathers them for as long as it lasts."""
        return compute()

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, vocab_size] float32 of the tokens `batch.logits_at`, of all when that is None."""
        return self.with_hidden(batch)[1]

    def with_hidden(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [T, hidden] after `model.norm`, logits as above): MTP continues from the former."""
        hidden_TE = self.hidden(batch)
        return hidden_TE, self.logits(hidden_TE if batch.logits_at is None else hidden_TE[batch.logits_at])

    @property
    def has_mtp(self) -> bool:
        """Whether an MTP layer was loaded."""
        return len(self.model.layers) > self.config.num_hidden_layers

    def logits(self, hidden_LE: Tensor) -> Tensor:
        """[L, vocab_size] float32 of hidden states after `model.norm`."""
        logits: Tensor = self.lm_head(hidden_LE).float()
        return logits

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Hidden states [T, hidden] after `model.norm`."""
        out: Tensor = self.model(batch, self.activation_dtype)
        return out

    def mtp(self, hidden_TE: Tensor, batch: ForwardBatch, depth: int = 0) -> tuple[Tensor, Tensor]:
        """MTP layer `depth` for hidden states of tokens i and a batch of the tokens i + 1, at the batch's positions.

        Returns (states [T, hidden] to continue from, logits [L, vocab_size] float32 of the tokens i + 2, for the tokens
        `batch.logits_at`, for all when that is None).
        """
        layer = self.model.layers[self.config.num_hidden_layers + depth]
        assert isinstance(layer, MTPLayer)
        states_TE = layer.predict(hidden_TE, self.model.rotation(batch), batch)
        wanted_LE = states_TE if batch.logits_at is None else states_TE[batch.logits_at]
        return states_TE, layer.shared_head.head(wanted_LE).float()

    def _keep_unconverted(self, quantization: QuantizationConfig) -> None:
        """Give the Linears of `modules_to_not_convert` their unquantised storage."""
        for name, module in self.named_modules():
            if isinstance(module, Linear) and module.dtype == FP8 and not quantization.covers(name):
                module.store_as(DTYPES[self.config.torch_dtype])

    def _store_int4(self, quantization: Int4Config) -> None:
        """Give every Linear the form that the configuration names: 4-bit groups, FP8 blocks, or floats as they are."""
        for name, module in self.named_modules():
            if not isinstance(module, Linear):
                continue
            if quantization.is_fp8(name):
                module.store_as(FP8)
            elif quantization.covers(name):
                if module.inputs % quantization.group_size:
                    raise UnsupportedModelError(
                        f"{name} has {module.inputs} inputs, no multiple of the group size {quantization.group_size}",
                        hint="such a module belongs into quantization_config.ignore",
                    )
                module.store_int4(quantization.group_size)
