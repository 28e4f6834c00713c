"""Measurements for the tests of the gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from bem.stats.measurement import Measurement


def scores(n: int, gains: int, losses: int) -> tuple[np.ndarray, np.ndarray]:
    """Baseline and candidate EM: `gains` examples newly right, `losses` newly wrong."""
    baseline = np.zeros(n)
    baseline[: n // 2] = 1.0
    candidate = baseline.copy()
    candidate[:losses] = 0.0
    candidate[n - gains :] = 1.0
    return baseline, candidate


def arm(name: str, em: Any, **changes: Any) -> Measurement:
    """An arm that passes every cost gate against another such arm."""
    n = np.asarray(em).shape[-1]
    rounds = 10 + np.sin(np.arange(20))
    values: dict[str, Any] = {
        "name": name,
        "metrics": {"em": em},
        "example_ids": [f"q{i}" for i in range(n)],
        "latency_ms": {"prefill": rounds, "decode": rounds / 2},
        "adapter_parameters": 100_000,
        "adapter_flops_per_token": 200_000,
        "adapter_memory_bytes": 1e6,
        "kv_hits": np.full(50, 32),
        "kv_held": np.full(50, 40),
        "kv_needed": np.full(50, 64),
    }
    values |= changes
    fields = {f.name for f in dataclasses.fields(Measurement)}
    measured = Measurement(**{k: v for k, v in values.items() if k in fields})
    for name in values.keys() - fields:  # facts that Measurement does not hold yet
        object.__setattr__(measured, name, values[name])
    return measured


def pair(n: int = 400, gains: int = 60, losses: int = 10, **changes: Any):
    """A baseline and a clearly better candidate."""
    baseline, candidate = scores(n, gains, losses)
    return arm("s0", baseline), arm("v1", candidate, **changes)
