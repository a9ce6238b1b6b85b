"""What /metrics tells, under vLLM's names, so that dashboards made for it work.

Gauges and counters are read from the engine when somebody asks; the histograms are filled as updates pass. Each
application has a registry of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvern.engine import EngineStats, Update
from kvern.engine.settings import DiskStats

LABEL = "model_name"
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""The engine's finish reasons in vLLM's words."""


class Metrics:
    """Counts one application's work. `serve` names the model; `submitted`, `updated` and `forget` follow requests."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        histograms = (
            ("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN),
            ("vllm:inter_token_latency_seconds", "From one token to the next.", BETWEEN_TOKENS),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", WHOLE),
            ("vllm:request_queue_time_seconds", "From arrival to the first step that computed it.", WHOLE),
        )
        self._first, self._between, self._whole, self._queue = (
            Histogram(name, help_text, [LABEL], buckets=buckets, registry=self._registry)
            for name, help_text, buckets in histograms
        )
        self._model = ""
        self._times: dict[int, tuple[float, float | None]] = {}

    def serve(self, model: str, stats: Callable[[], EngineStats]) -> None:
        """Begin to tell about a model's engine."""
        self._model = model
        self._registry.register(_EngineCollector(model, stats))

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def submitted(self, number: int) -> None:
        """A request arrived."""
        self._times[number] = (time.monotonic(), None)

    def updated(self, update: Update, now: float) -> None:
        """An update of a request passes at time `now`."""
        times = self._times.get(update.request_id)
        if times is None:
            return
        arrived, last = times
        if update.started is not None:
            self._queue.labels(self._model).observe(max(0.0, update.started - arrived))
        if update.tokens:
            since, histogram = (arrived, self._first) if last is None else (last, self._between)
            histogram.labels(self._model).observe(now - since)
            self._times[update.request_id] = (arrived, now)
        if update.finish is not None:
            self._whole.labels(self._model).observe(now - arrived)
            self.forget(update.request_id)

    def forget(self, number: int) -> None:
        """A request is of no interest any more."""
        self._times.pop(number, None)


class _EngineCollector(Collector):
    """Reads the engine's counters at the moment they are asked for."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Nothing: names need no check against an engine that may be busy."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        stats = self._stats()
        used = stats.cache_blocks_used / max(1, stats.cache_blocks)
        yield self._gauge("vllm:num_requests_running", "Requests that share the steps.", stats.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the cache in use, 1 is all.", used)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found.", stats.prefix_hits)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens taken.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens drawn.", stats.generated_tokens)
        yield self._counter("vllm:num_preemptions", "Requests that gave up their cache.", stats.preemptions)
        yield self._counter("vllm:spec_decode_num_drafts", "Times that drafts were verified.", stats.drafts)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens)
        accepted = stats.accepted_draft_tokens
        yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens that were right.", accepted)
        yield self._accepted(stats)
        if stats.disk is not None:
            yield from self._disk(stats.disk)
        yield self._finished(stats)

    def _disk(self, disk: DiskStats) -> Iterator[Metric]:
        yield self._counter("vllm:external_prefix_cache_queries", "Tokens looked up on the disk.", disk.queries)
        yield self._counter("vllm:external_prefix_cache_hits", "Tokens read from the disk.", disk.hits)
        yield self._gauge("kvern:disk_cache_blocks", "Blocks on the disk.", disk.blocks)
        yield self._gauge("kvern:disk_cache_bytes", "Bytes on the disk, of --cache-disk-bytes.", disk.bytes)
        yield self._counter("kvern:disk_cache_read_bytes", "Bytes read back.", disk.read_bytes)
        yield self._counter("kvern:disk_cache_written_bytes", "Bytes written.", disk.written_bytes)
        yield self._counter("kvern:disk_cache_evicted_blocks", "Blocks that gave way to others.", disk.evicted)
        yield self._counter("kvern:disk_cache_corrupt_blocks", "Blocks that were damaged and deleted.", disk.corrupt)
        yield self._counter("kvern:disk_cache_failures", "Times that writing failed.", disk.failures)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=[LABEL])
        family.add_metric([self._model], value)
        return family

    def _accepted(self, stats: EngineStats) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens that were right, by their position in the draft.",
            labels=[LABEL, "position"],
        )
        for position, accepted in enumerate(stats.accepted_by_position):
            family.add_metric([self._model, str(position)], accepted)
        return family

    def _finished(self, stats: EngineStats) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=[LABEL, "finished_reason"]
        )
        for ours, theirs in REASONS.items():
            family.add_metric([self._model, theirs], stats.finished.get(ours, 0))
        return family
