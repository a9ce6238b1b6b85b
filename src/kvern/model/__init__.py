"""The DeepSeek-V3 architecture. Reading order: batch, linear, rope, attention, moe, transformer, mtp.

Module attributes carry the checkpoint's names, so that `state_dict()` is the checkpoint's index and no key map exists.
"""

from kvern.model.batch import ForwardBatch, LatentCache, MLAForm
from kvern.model.transformer import Transformer

__all__ = ["ForwardBatch", "LatentCache", "MLAForm", "Transformer"]
