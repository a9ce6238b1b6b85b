"""The DeepSeek-V3 architecture. Reading order: batch, linear, rope, attention, moe, transformer, mtp, packed.

Module attributes carry the checkpoint's names, so that `state_dict()` is the checkpoint's index and no key map exists.
"""

from typing import TypeAlias

from kvern.model.batch import ForwardBatch, LatentCache, MLAForm
from kvern.model.packed import PackedTransformer
from kvern.model.transformer import Transformer

Model: TypeAlias = Transformer | PackedTransformer
"""Both take a batch and give logits."""

__all__ = ["ForwardBatch", "LatentCache", "MLAForm", "Model", "PackedTransformer", "Transformer"]
