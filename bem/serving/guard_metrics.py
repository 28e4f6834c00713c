"""What a guard did, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from bem.serving.metrics import Metrics

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class GuardMetrics:
    """In the registry of a server's other metrics."""

    def __init__(self, metrics: Metrics, alive: Callable[[], bool]):
        """alive: does the detector run?"""
        self.model, registry = metrics.model, metrics.registry
        labels = ["model_name", "place", "category", "action"]
        self._decided = Counter("bem_guard_decisions", "Texts by what was done about them.", labels, registry=registry)  # fmt: skip
        self._failed = Counter("bem_guard_failures", "Texts of which the detector said nothing.", ["model_name"], registry=registry)  # fmt: skip
        self._seconds = Histogram("bem_guard_seconds", "For one text.", ["model_name"], registry=registry, buckets=SECONDS)  # fmt: skip
        up = Gauge("bem_guard_detector_up", "Does its process run?", ["model_name"], registry=registry)  # fmt: skip
        up.labels(**self.model).set_function(lambda: float(alive()))
        self._failed.labels(**self.model)

    def decided(self, place: str, category: str, action: str) -> None:
        """One text."""
        self._decided.labels(**self.model, place=place, category=category, action=action).inc()

    def failed(self) -> None:
        """One text that was not checked."""
        self._failed.labels(**self.model).inc()

    def took(self, seconds: float) -> None:
        """One text, waiting included."""
        self._seconds.labels(**self.model).observe(seconds)
