"""The record that every arm is judged by: scores per example, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError
from bem.stats.corpus import CORPUS
from bem.stats.inputs import Floats
from bem.stats.scores import METRICS, Metric

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RouterFacts:
    """What only routed variants have."""

    plan_lengths: Sequence[int] | None = None
    """Actions in each plan."""
    index_swap: Mapping[str, ArrayLike] | None = None
    """Scores [examples] or [seeds, examples] with a `clean`, a `corrupt` and a `shuffled` index, and
    perhaps with it `off`; higher is better."""
    clusters: Sequence[str] | None = None
    """Source document of each example of `index_swap`."""
    answer_loss: Mapping[str, ArrayLike] | None = None
    """Under the same conditions: negative log-likelihood of the acceptable answer; never judged."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """One arm, measured. Arrays may be given as lists; shapes are checked, values are not.

    NaN is allowed in here so that one diverged arm does not hide the others: `judge` finds it,
    names its place and does not pass the gate.
    """

    name: str
    metrics: Mapping[str, ArrayLike]
    """Scores per metric: [seeds, examples], or [examples] for one seed."""
    example_ids: Sequence[str]
    clusters: Sequence[str] | None = None
    """Source document of each example; examples of one document are not independent."""
    slices: Mapping[str, ArrayLike] = field(default_factory=dict)
    """Named subsets: bool [examples]."""
    corpus: Mapping[str, ArrayLike] = field(default_factory=dict)
    """Sufficient statistics: `corpus_bleu` [seeds, examples, 10], `corpus_chrf` [.., .., 18]."""
    declared: Mapping[str, Metric] = field(default_factory=dict)
    """Meaning of metrics that METRICS does not know."""
    latency_ms: Mapping[str, ArrayLike] = field(default_factory=dict)
    """Per phase (prefill, decode): p50 of each round; round i ran beside the baseline's round i."""
    memory_bytes: float | None = None
    """Peak memory."""
    adapter_parameters: float | None = None
    adapter_flops_per_token: float | None = None
    kv_hits: ArrayLike | None = None
    """Reused cache entries per request."""
    kv_needed: ArrayLike | None = None
    """Cache entries that each request needed."""
    router: RouterFacts | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything that can be written as JSON; never judged."""

    def __post_init__(self) -> None:
        put = lambda key, value: object.__setattr__(self, key, value)  # noqa: E731
        put("example_ids", tuple(str(i) for i in self.example_ids))
        n = len(self.example_ids)
        _check_ids(self.name, self.example_ids)
        put("metrics", {k: self._scores(f"metrics.{k}", v, n) for k, v in self.metrics.items()})
        put("corpus", {k: self._statistics(k, v, n) for k, v in self.corpus.items()})
        put("slices", {k: self._mask(f"slices.{k}", v, n) for k, v in self.slices.items()})
        put("latency_ms", {k: self._row(f"latency_ms.{k}", v) for k, v in self.latency_ms.items()})
        if self.clusters is not None:
            put("clusters", tuple(str(c) for c in self.clusters))
            self._expect("clusters", len(self.clusters), n)
        for key in ("kv_hits", "kv_needed"):
            if getattr(self, key) is not None:
                put(key, self._row(key, getattr(self, key)))
        for key in self.metrics:
            if self.metric(key).kind == "corpus":
                raise DataError(f"{self.name}: {key} has no per-example scores; use corpus.{key}.")

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.example_ids)

    def metric(self, name: str) -> Metric:
        """What a metric's numbers mean; an unknown one must be declared."""
        known = self.declared.get(name) or METRICS.get(name)
        if known is None:
            raise DataError(
                f"{self.name}: metrics.{name} is unknown: say whether higher is better, "
                f"declared={{'{name}': Metric(higher_is_better=True, points_per_unit=100)}}. "
                f"Known: {', '.join(METRICS)}."
            )
        return known

    def aligned_to(self, ids: Sequence[str]) -> NDArray[np.intp]:
        """Positions of `ids` in this measurement.

        Raises:
            DataError: some of them were not measured here, or others were.
        """
        place = {example: i for i, example in enumerate(self.example_ids)}
        missing = [example for example in ids if example not in place]
        if missing or len(place) != len(ids):
            raise DataError(
                f"{self.name} was not measured on the same examples: it has {len(place)}, "
                f"{len(missing)} of {len(ids)} are missing"
                f"{f' (first: {missing[0]})' if missing else ''}."
            )
        return np.array([place[example] for example in ids], dtype=np.intp)

    def to_json(self, path: str | Path) -> Path:
        """Write as JSON, gzipped if the name ends in .gz."""
        from bem.stats.files import save

        return save(self, path)

    @staticmethod
    def from_json(path: str | Path) -> Measurement:
        """Read what `to_json` wrote, or a plain table (.csv, .jsonl; see `bem.stats.files`)."""
        from bem.stats.files import load

        return load(path)

    def _scores(self, where: str, values: ArrayLike, n: int) -> Floats:
        array = self._numbers(where, values)
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or array.shape[1] != n or len(array) == 0:
            raise DataError(f"{self.name}: {where} has shape {array.shape}, expected [seeds, {n}].")
        return array

    def _statistics(self, key: str, values: ArrayLike, n: int) -> Floats:
        if key not in CORPUS:
            raise DataError(f"{self.name}: corpus.{key} is unknown. Known: {', '.join(CORPUS)}.")
        array = self._numbers(f"corpus.{key}", values)
        array = array[None] if array.ndim == 2 else array
        width = CORPUS[key][0]
        if array.ndim != 3 or array.shape[1:] != (n, width):
            raise DataError(
                f"{self.name}: corpus.{key} has shape {array.shape}, "
                f"expected [seeds, {n}, {width}]."
            )
        return array

    def _mask(self, where: str, values: ArrayLike, n: int) -> Bools:
        array = np.asarray(values)
        if array.shape != (n,) or not np.isin(array, (0, 1)).all():
            raise DataError(f"{self.name}: {where} must be {n} booleans, got shape {array.shape}.")
        return array.astype(bool)

    def _row(self, where: str, values: ArrayLike) -> Floats:
        array = self._numbers(where, values)
        if array.ndim != 1:
            raise DataError(
                f"{self.name}: {where} has shape {array.shape}, expected one dimension."
            )
        return array

    def _numbers(self, where: str, values: ArrayLike) -> Floats:
        try:
            return np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{self.name}: {where} must be numbers in a rectangle.") from None

    def _expect(self, where: str, got: int, expected: int) -> None:
        if got != expected:
            raise DataError(f"{self.name}: {where} has {got} entries for {expected} examples.")


def _check_ids(name: str, ids: Sequence[str]) -> None:
    if not ids:
        raise DataError(f"{name}: example_ids is empty: nothing was measured.")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise DataError(f"{name}: example_ids holds {twice!r} twice; ids must be unique.")
