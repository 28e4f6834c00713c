"""The record that every arm is judged by: scores per example, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bem.errors import DataError
from bem.stats.corpus import CORPUS
from bem.stats.inputs import Floats, labels, numbers
from bem.stats.scores import METRICS, Metric

Bools = NDArray[np.bool_]
FLOAT32 = 1e-6
"""Means of float32 scores overshoot the end of a range by less than this share of it."""


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

    def __post_init__(self) -> None:
        if self.plan_lengths is not None:
            _vector("router.plan_lengths", self.plan_lengths)
        if self.clusters is not None:
            object.__setattr__(self, "clusters", labels("router.clusters", self.clusters))
        for key in ("index_swap", "answer_loss"):
            for condition, values in (_mapping(f"router.{key}", getattr(self, key)) or {}).items():
                numbers(f"router.{key}.{condition}", values)


@dataclass(frozen=True, eq=False)
class Measurement:
    """One arm, measured. Arrays may be given as lists.

    NaN is allowed in here so that one diverged arm does not hide the others: `judge` finds it,
    names its place and does not pass the gate.

    Raises:
        DataError: a wrong shape or type, a score outside the metric's range (em of 100), an unknown
            metric, an id that is missing or stands twice; names the arm, the field and the place.
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
        if not isinstance(self.name, str):
            raise DataError(f"name must be text, got {self.name!r:.40}.")
        put = lambda key, value: object.__setattr__(self, key, value)  # noqa: E731
        try:
            for key, value in self._checked().items():
                put(key, value)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None

    def _checked(self) -> dict[str, Any]:
        """Every field in the form that it promises."""
        ids = labels("example_ids", self.example_ids)
        _check_ids(ids)
        clusters = None if self.clusters is None else labels("clusters", self.clusters)
        if clusters is not None and len(clusters) != len(ids):
            raise DataError(f"clusters has {len(clusters)} entries for {len(ids)} examples.")
        costs = ("memory_bytes", "adapter_parameters", "adapter_flops_per_token")
        for key in costs:
            _number(key, getattr(self, key))
        for key, meaning in (_mapping("declared", self.declared) or {}).items():
            _instance(f"declared.{key}", meaning, Metric)
        _instance("router", self.router, RouterFacts | None)
        _mapping("meta", self.meta)
        rows = {key: getattr(self, key) for key in ("kv_hits", "kv_needed")}
        return {
            "example_ids": ids,
            "clusters": clusters,
            "metrics": self._each("metrics", lambda key, v: self._scores(key, v, ids)),
            "corpus": self._each("corpus", lambda key, v: _statistics(key, v, len(ids))),
            "slices": self._each("slices", lambda key, v: _mask(f"slices.{key}", v, len(ids))),
            "latency_ms": self._each("latency_ms", lambda key, v: _vector(f"latency_ms.{key}", v)),
            **{key: None if row is None else _vector(key, row) for key, row in rows.items()},
        }

    def _each(self, key: str, check: Callable[[str, Any], Any]) -> dict[str, Any]:
        return {
            name: check(name, v) for name, v in (_mapping(key, getattr(self, key)) or {}).items()
        }

    @property
    def n(self) -> int:
        """Examples."""
        return len(self.example_ids)

    def metric(self, name: str) -> Metric:
        """What a metric's numbers mean; an unknown one must be declared."""
        meaning = self.declared.get(name) or METRICS.get(name)
        if meaning is None:
            raise DataError(
                f"metrics.{name} is unknown: say whether higher is better, "
                f"declared={{'{name}': Metric(higher_is_better=True, points_per_unit=100)}}. "
                f"Known: {', '.join(METRICS)}."
            )
        return meaning

    def aligned_to(self, ids: Sequence[str]) -> NDArray[np.intp]:
        """Positions of `ids` in this measurement.

        Raises:
            DataError: some of them were not measured here, or others were.
        """
        place = {example: i for i, example in enumerate(self.example_ids)}
        missing = [example for example in ids if example not in place]
        if missing or len(place) != len(ids):
            raise DataError(f"{self.name} {_other_examples(missing, list(ids), list(place))}")
        return np.array([place[example] for example in ids], dtype=np.intp)

    def _scores(self, key: str, values: ArrayLike, ids: Sequence[str]) -> Floats:
        where, meaning = f"metrics.{key}", self.metric(key)
        if meaning.kind == "corpus":
            raise DataError(f"{key} has no per-example scores; use corpus.{key}.")
        array = np.atleast_2d(numbers(where, values))
        if array.ndim != 2 or array.shape[1] != len(ids) or len(array) == 0:
            raise DataError(f"{where} has shape {array.shape}, expected [seeds, {len(ids)}].")
        _check_range(key, meaning, array, ids)
        return array


def outside(metric: str, meaning: Metric, value: float) -> str:
    """Why a score cannot be one of this metric, and what to do; empty if it can be one.

    NaN and inf are left to `judge`.
    """
    low, high = meaning.limits
    slack = FLOAT32 * high if high < inf else 0.0
    if not isfinite(value) or low - slack <= value <= high + slack:
        return ""
    points = meaning.points_per_unit
    why = f"{metric} lies in {low:g} to {high:g}"
    why += f" ({points:g} points in one unit)" if points else ""
    if points != 100 or not 0 <= value <= 100:
        return f"{why}."
    way = "higher" if meaning.higher_is_better else "lower"
    return (
        f"{why}: is it in percent? Divide by 100 in every file, or name the column '{metric}:{way}:1' "
        "(1 point in one unit) in every file."
    )


def _check_range(key: str, meaning: Metric, array: Floats, ids: Sequence[str]) -> None:
    low, high = meaning.limits
    for seed, i in np.argwhere((array < low) | (array > high)):
        if problem := outside(key, meaning, float(array[seed, i])):
            raise DataError(f"metrics.{key} of {ids[i]!r} is {array[seed, i]:g}; {problem}")


def _other_examples(missing: list[str], ids: list[str], own: list[str]) -> str:
    """Says that two arms hold different examples, and how their ids differ."""
    others = set(own) - set(ids)
    text = (
        f"was not measured on the same examples: it has {len(own)}, "
        f"{len(missing)} of {len(ids)} are missing"
    )
    if missing:
        text += f" (first: {missing[0]!r})"
    if others:
        text += f", {len(others)} are in it alone (first: {next(i for i in own if i in others)!r})"
    return text + ". Ids must be written alike, and every example scored in every arm."


def _statistics(key: str, values: ArrayLike, n: int) -> Floats:
    if key not in CORPUS:
        raise DataError(f"corpus.{key} is unknown. Known: {', '.join(CORPUS)}.")
    array = numbers(f"corpus.{key}", values)
    array = array[None] if array.ndim == 2 else array
    width = CORPUS[key][0]
    if array.ndim != 3 or array.shape[1:] != (n, width) or len(array) == 0:
        raise DataError(f"corpus.{key} has shape {array.shape}, expected [seeds, {n}, {width}].")
    return array


def _mask(where: str, values: ArrayLike, n: int) -> Bools:
    array = numbers(where, values)
    if array.shape != (n,) or not np.isin(array, (0, 1)).all():
        raise DataError(f"{where} must be {n} booleans, got shape {array.shape}.")
    return array.astype(bool)


def _vector(where: str, values: ArrayLike) -> Floats:
    array = numbers(where, values)
    if array.ndim != 1:
        raise DataError(f"{where} has shape {array.shape}, expected one dimension.")
    return array


def _number(where: str, value: Any) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float | np.number)
    ):
        raise DataError(f"{where} must be a number, got {value!r:.40}.")


def _instance(where: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise DataError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r:.40}.")


def _mapping(where: str, values: Any) -> Mapping[str, Any] | None:
    if values is not None and not isinstance(values, Mapping):
        raise DataError(f"{where} must map names to values, got {values!r:.40}.")
    return values


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise DataError("example_ids is empty: nothing was measured.")
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(f"example_ids holds {twice!r} twice; ids must be unique.")
