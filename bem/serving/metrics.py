"""What is measured while the server runs, as Prometheus reads it.

Names and meanings are vLLM's where there is one (`vllm:*`), so that its dashboards work; what only this
server has is `bem_*`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bem.engine.engine import StepStats
from bem.engine.request import Result
from bem.engine.store import ChunkStore
from bem.runs.release import SHORT

FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
LENGTHS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper ends of the histograms, in seconds and tokens."""


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, model_name: str):
        """model_name: what the label of that name says: the base."""
        self.registry = CollectorRegistry()
        self.model = {"model_name": model_name}
        self._usual = 1.0
        self._engines()
        self._requests()
        self._ours()

    def _engines(self) -> None:
        self.running = self._gauge("vllm:num_requests_running", "Requests that are being answered.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait.")
        self.cache_use = self._gauge("vllm:kv_cache_usage_perc", "Share of the chunk store in use.")
        self.queries = self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up."
        )
        self.hits = self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens that were found in the store."
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of all requests.")
        self.generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._last = {"queries": 0, "hits": 0}
        self._running: dict[str, tuple[int, int]] = {}

    def _requests(self) -> None:
        self.success = self._counter(
            "vllm:request_success", "Requests that were answered.", "finished_reason"
        )
        self.first = self._histogram(
            "vllm:time_to_first_token_seconds", "From the request to its first token.", FIRST
        )
        self.between = self._histogram(
            "vllm:inter_token_latency_seconds", "Mean time between tokens of an answer.", BETWEEN
        )
        self.whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "From the request to its last token.", WHOLE
        )
        self.prompt_length = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt.", LENGTHS
        )
        self.answer_length = self._histogram(
            "vllm:request_generation_tokens", "Tokens of an answer.", LENGTHS
        )
        self.refused = self._counter(
            "bem_requests_refused", "Requests that were turned away.", "status"
        )

    def _ours(self) -> None:
        self.experts = self._counter(
            "bem_expert_chunks", "Chunks of answers and prompts by the expert that acted.", "expert"
        )
        self.flips = self._counter("bem_expert_flips", "Changes of expert within a sequence.")
        self.missed = self._gauge(
            "bem_cache_missed_tokens", "Prompt tokens computed, by the reason why.", "reason"
        )
        self.evicted = self._gauge(
            "bem_cache_evicted_before_reuse_tokens", "Tokens thrown out before anybody used them."
        )
        self.answers = self._counter(
            "bem_version_requests", "Answers by the version that gave them.", "version"
        )
        self.resident = self._gauge(
            "bem_version_resident", "1: this version is in memory.", "version"
        )
        self.current = self._gauge("bem_version_current", "1: `bem` means this one.", "version")
        self.canary = self._gauge(
            "bem_canary_share", "Share of the conversations that it gets.", "version"
        )
        self.problems = self._gauge(
            "bem_store_problems", "What of the version store is damaged or not loaded."
        )

    # --- told on the engines' thread --------------------------------------------------------------

    def step(self, engine: str, stats: StepStats, chunks: ChunkStore) -> None:
        """One step of an engine."""
        self._running[engine] = stats.running, stats.waiting
        self.running.set(sum(n for n, _ in self._running.values()))
        self.waiting.set(sum(n for _, n in self._running.values()))
        self.generated.inc(stats.decoded)
        now = {"queries": chunks.stats.needed, "hits": chunks.stats.reused}
        self.queries.inc(now["queries"] - self._last["queries"])
        self.hits.inc(now["hits"] - self._last["hits"])
        self._last = now
        self.cache_use.set(chunks.stats.nbytes / chunks.budget if chunks.budget else 0.0)
        for reason, tokens in chunks.stats.missed.items():
            self.missed.labels(**self.model, reason=reason).set(tokens)
        self.evicted.set(chunks.stats.evicted_before_reuse)
        for result in stats.finished:
            self._finished(result)

    def _finished(self, result: Result) -> None:
        self.success.labels(**self.model, finished_reason=result.finish_reason).inc()
        self.prompt_tokens.inc(result.prompt_tokens)
        self.prompt_length.observe(result.prompt_tokens)
        self.answer_length.observe(len(result.token_ids))
        self.whole.observe(result.seconds)
        self._usual += 0.1 * (result.seconds - self._usual)
        if result.first_token_s is not None:
            self.first.observe(result.first_token_s)
            if (more := len(result.token_ids) - 1) > 0:
                self.between.observe((result.seconds - result.first_token_s) / more)
        if result.version:
            self.answers.labels(**self.model, version=result.version[:SHORT]).inc()
        names = [action.expert for action in result.actions]
        for name in names:
            self.experts.labels(**self.model, expert=name).inc()
        self.flips.inc(sum(a != b for a, b in pairwise(names)))

    @property
    def usual_s(self) -> int:
        """Seconds that a request takes of late, 1 to 60: when to come again."""
        return round(min(max(self._usual, 1.0), 60.0))

    # --- told by the event loop -------------------------------------------------------------------

    def refuse(self, status: int) -> None:
        """A request was turned away."""
        self.refused.labels(**self.model, status=str(status)).inc()

    def versions(
        self, resident: list[str], current: str, canaries: dict[str, float], problems: int
    ) -> None:
        """Which versions are in memory, which is in front, and what is wrong with the store."""
        for gauge, values in (
            (self.resident, dict.fromkeys(resident, 1.0)),
            (self.current, {current: 1.0}),
            (self.canary, canaries),
        ):
            gauge.clear()
            for version, value in values.items():
                gauge.labels(**self.model, version=version[:SHORT]).set(value)
        self.problems.set(problems)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    # --- making -----------------------------------------------------------------------------------

    def _counter(self, name: str, about: str, *labels: str) -> Any:
        return self._made(Counter, name, about, labels)

    def _gauge(self, name: str, about: str, *labels: str) -> Any:
        return self._made(Gauge, name, about, labels)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Any:
        return self._made(Histogram, name, about, (), buckets=buckets)

    def _made(
        self, kind: Callable[..., Any], name: str, about: str, labels: tuple[str, ...], **more: Any
    ) -> Any:
        made = kind(name, about, ["model_name", *labels], registry=self.registry, **more)
        return made if labels else made.labels(**self.model)
