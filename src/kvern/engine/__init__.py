"""The engine knows token ids only: ids in, ids out. One request at a time for now."""

from kvern.engine.engine import Engine
from kvern.engine.sampler import SamplingParams

__all__ = ["Engine", "SamplingParams"]
