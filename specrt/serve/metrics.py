"""Figures for Prometheus, by vLLM's names where it has one, so that its dashboards work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from specrt.engine.engine import Engine
from specrt.engine.results import GenerationResult
from specrt.types import RoundStats

_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Figures = dict[str, tuple[str, float]]


class EngineFigures(Collector):
    """What an engine says of itself, asked when somebody looks.

    Args:
        engine: asked.
        name: of the model.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    def collect(self) -> Iterator[Metric]:
        """Its figures now."""
        try:
            stats = self._engine.stats
        except RuntimeError:  # it was closed
            return
        held = stats.num_held_pages / stats.num_pages if stats.num_pages else 0.0
        gauges: _Figures = {
            "vllm:num_requests_running": ("Requests that have a place.", stats.num_running),
            "vllm:num_requests_waiting": ("Requests that wait for one.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of the pages that are held; 1 is all.", held),
            "specrt:num_shared_pages": ("Pages kept for later prompts.", stats.num_shared_pages),
        }
        counts: _Figures = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found.", stats.prefix_hits),
        }
        families: tuple[Any, ...] = (GaugeMetricFamily, gauges), (CounterMetricFamily, counts)
        for family, figures in families:
            for name, (text, value) in figures.items():
                made = family(name, text, labels=("model_name",))
                made.add_metric((self._name,), value)
                yield made


class Metrics:
    """One server's figures, in a registry of its own.

    Args:
        engine: asked when somebody looks.
        name: of the model, on every figure of vLLM's.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = name
        self.registry.register(EngineFigures(engine, name))
        count, spread = self._counter, self._histogram
        self.prompt_tokens = count("vllm:prompt_tokens", "Prompt tokens.")
        self.generation_tokens = count("vllm:generation_tokens", "Output tokens.")
        self.num_drafts = count("vllm:spec_decode_num_drafts", "Rounds of drafted requests.")
        self.num_draft_tokens = count("vllm:spec_decode_num_draft_tokens", "Drafted tokens.")
        self.num_accepted = count("vllm:spec_decode_num_accepted_tokens", "Accepted of them.")
        self.first_token = spread("vllm:time_to_first_token_seconds", "To the first chunk.")
        self.between = spread("vllm:inter_token_latency_seconds", "Between two chunks.")
        self.whole = spread("vllm:e2e_request_latency_seconds", "To the end.")
        self.queue = spread("vllm:request_queue_time_seconds", "Before the prompt was run.")
        self.prefill = spread("vllm:request_prefill_time_seconds", "Of the prompt's own pass.")
        self.decode = spread("vllm:request_decode_time_seconds", "Behind the first chunk.")
        self.prompt_sizes = spread("vllm:request_prompt_tokens", "Of a prompt.", _TOKENS)
        self.output_sizes = spread("vllm:request_generation_tokens", "Of an answer.", _TOKENS)
        labels, registry = ("model_name",), self.registry
        self._successes = Counter(
            "vllm:request_success",
            "Ended requests.",
            (*labels, "finished_reason"),
            registry=registry,
        )
        self._per_position = Counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted tokens by their distance from the root, less one.",
            (*labels, "position"),
            registry=registry,
        )
        self._http = Counter(
            "http_requests", "Answers of the server.", ("method", "handler", "status"),
            registry=registry,
        )  # fmt: skip

    def exposition(self) -> bytes:
        """All of them, in Prometheus' text."""
        return generate_latest(self.registry)

    def count_http(self, method: str, handler: str, status: int) -> None:
        """One answer of the server."""
        self._http.labels(method, handler, str(status)).inc()

    def count_end(self, reason: str) -> None:
        """One request's end."""
        self._successes.labels(self._name, reason).inc()

    def count_result(self, result: GenerationResult) -> None:
        """One answer that has come to its end."""
        stats: RoundStats = result.stats
        self.count_end("length" if result.finish_reason == "context" else result.finish_reason)
        self.output_sizes.observe(len(result.token_ids))
        self.prefill.observe(stats.prefill_ms / 1000)
        if stats.proposed_by_depth:
            self.num_drafts.inc(stats.proposed_by_depth[0])
            self.num_draft_tokens.inc(stats.num_draft_tokens)
            self.num_accepted.inc(stats.num_accepted_tokens)
        for position, count in enumerate(stats.accepted_by_depth):
            self._per_position.labels(self._name, str(position)).inc(count)

    def _counter(self, name: str, text: str) -> Any:
        made = Counter(name, text, ("model_name",), registry=self.registry)
        return made.labels(self._name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Any:
        made = Histogram(name, text, ("model_name",), buckets=buckets, registry=self.registry)
        return made.labels(self._name)
