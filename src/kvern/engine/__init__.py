"""The engine knows token ids only: ids in, ids out, many requests in every step."""

from kvern.engine.engine import Engine
from kvern.engine.params import SamplingParams
from kvern.engine.request import TokenLogprob, Update
from kvern.engine.settings import EngineSettings, EngineStats

__all__ = ["Engine", "EngineSettings", "EngineStats", "SamplingParams", "TokenLogprob", "Update"]
