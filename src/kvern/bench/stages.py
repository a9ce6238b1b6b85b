"""Where the time of a step goes: a stopwatch around the model's parts and around the sampler.

attention and feed_forward include the norm before them; rest is the step less all stages: scheduling, residual sums,
the rotation table, the last norm. A stopwatch costs some microseconds a call of a module, so this is a pass of its own;
its total exceeds a step of the undisturbed pass by as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from kvern.bench.traffic import packed_counters
from kvern.engine import engine as engine_module
from kvern.model import Model, PackedTransformer, Transformer
from kvern.model.layer import DecoderLayer

STAGES = ("embedding", "attention", "feed_forward", "head", "sampling", "rest")
PACKED = {
    "project": "attention",
    "attend": "attention",
    "output": "attention",
    "route": "feed_forward",
    "experts": "feed_forward",
    "head": "head",
}
"""Stage that a counter of packed layers belongs to; they keep time themselves, and the embedding is in the rest."""


@contextmanager
def stopwatches(model: Model) -> Iterator[dict[str, float]]:
    """Seconds of each stage, summed over the block; rest is the block's time that no stage had."""
    seconds = dict.fromkeys(STAGES, 0.0)
    start = time.perf_counter()
    if isinstance(model, PackedTransformer):
        with _sampler_timed(seconds), packed_counters(model) as counters:
            yield seconds
        for counter, stage in PACKED.items():
            seconds[stage] += counters[counter] / 1e9
        seconds["rest"] = time.perf_counter() - start - sum(seconds.values())
        return
    hooks = [hook for stage, module in _modules(model) for hook in _time_module(module, stage, seconds)]
    try:
        with _sampler_timed(seconds):
            yield seconds
    finally:
        for hook in hooks:
            hook.remove()
        seconds["rest"] = time.perf_counter() - start - sum(seconds.values())


def _modules(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    yield "embedding", model.model.embed_tokens
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        assert isinstance(layer, DecoderLayer)
        yield "attention", layer.input_layernorm
        yield "attention", layer.self_attn
        yield "feed_forward", layer.post_attention_layernorm
        yield "feed_forward", layer.mlp
    yield "head", model.lm_head


def _time_module(module: nn.Module, stage: str, seconds: dict[str, float]) -> list[Any]:
    def start(*_: object) -> None:
        seconds[stage] -= time.perf_counter()

    def stop(*_: object) -> None:
        seconds[stage] += time.perf_counter()

    return [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]


@contextmanager
def _sampler_timed(seconds: dict[str, float]) -> Iterator[None]:
    """Replace the engine's `sample` by one that is timed."""
    inner: Callable[..., Any] = vars(engine_module)["sample"]

    def timed(*args: Any) -> Any:
        start = time.perf_counter()
        result = inner(*args)
        seconds["sampling"] += time.perf_counter() - start
        return result

    vars(engine_module)["sample"] = timed
    try:
        yield
    finally:
        vars(engine_module)["sample"] = inner
