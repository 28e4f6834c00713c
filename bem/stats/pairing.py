"""Arms on the same examples: what one file alone says of them holds for all, and files must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from bem.errors import DataError
from bem.stats.measurement import Bools, Measurement
from bem.stats.scores import Metric

ANOTHER_UNIT = 20.0
"""Means further apart than this factor, one file within 1 and one within 100: one is in percent."""


def with_shared_groups(baseline: Measurement, candidates: Mapping[str, Measurement]) -> Measurement:
    """The baseline, with the clusters and slices that any arm has.

    Raises:
        DataError: an arm contradicts the baseline or an arm before it: other clusters, other members of
            a slice, another meaning of a metric, or scores in percent in one of them; names the arms and
            the first example.
    """
    shared, contradictions = shared_groups(baseline, candidates)
    for reason in contradictions.values():
        raise DataError(reason)
    return shared


def shared_groups(
    baseline: Measurement, candidates: Mapping[str, Measurement]
) -> tuple[Measurement, dict[str, str]]:
    """The same, and candidate -> what it contradicts. An arm on other examples is passed over: nothing of
    it can be compared."""
    shared, contradictions = baseline, dict[str, str]()
    for name, candidate in candidates.items():
        if set(candidate.example_ids) != set(baseline.example_ids):
            continue
        try:
            place = candidate.aligned_to(baseline.example_ids)
            groups = _with_slices(_with_clusters(shared, candidate, place), candidate, place)
            for metric in baseline.metrics.keys() & candidate.metrics.keys():
                _same_meaning(baseline, candidate, metric)
                _same_unit(baseline, candidate, metric)
            shared = groups
        except DataError as error:
            contradictions[name] = str(error)
    return shared, contradictions


def _with_clusters(groups: Measurement, candidate: Measurement, place: np.ndarray) -> Measurement:
    if candidate.clusters is None:
        return groups
    theirs = [str(candidate.clusters[int(i)]) for i in place]
    if groups.clusters is None:
        return replace(groups, clusters=theirs)
    for i, (one, other) in enumerate(zip(_first(groups.clusters), _first(theirs), strict=True)):
        if one != other:
            ids = groups.example_ids
            partner, where = (one, "there") if one != i else (other, "here")
            raise DataError(
                f"{candidate.name} has other clusters than the baseline {groups.name} or an arm before it: "
                f"{ids[i]!r} and {ids[partner]!r} share one only {where}. An example has one source document."
            )
    return groups


def _first(clusters: Sequence[str]) -> list[int]:
    """For each example the first one of its cluster: equal lists are the same clusters."""
    first: dict[str, int] = {}
    return [first.setdefault(name, i) for i, name in enumerate(clusters)]


def _with_slices(groups: Measurement, candidate: Measurement, place: np.ndarray) -> Measurement:
    slices = dict(groups.slices)
    for name, members in candidate.slices.items():
        theirs: Bools = np.asarray(members)[place]
        ours = np.asarray(slices.setdefault(name, theirs))
        if (ours != theirs).any():
            example = groups.example_ids[int(np.argmax(ours != theirs))]
            raise DataError(
                f"{candidate.name} and the baseline {groups.name} or an arm before it disagree whether "
                f"{example!r} is in slice {name!r}: a slice holds the same examples in every arm."
            )
    return replace(groups, slices=slices) if len(slices) > len(groups.slices) else groups


def _same_meaning(baseline: Measurement, candidate: Measurement, metric: str) -> None:
    one, other = baseline.metric(metric), candidate.metric(metric)
    if one != other:
        raise DataError(
            f"{metric} means something else in {candidate.name} ({_in_words(other)}) than in the baseline "
            f"{baseline.name} ({_in_words(one)}): declare it alike in every file."
        )


def _in_words(meaning: Metric) -> str:
    way = "higher" if meaning.higher_is_better else "lower"
    points = meaning.points_per_unit
    return f"{way} is better" + (f", {points:g} points in one unit" if points else ", no points")


def _same_unit(baseline: Measurement, candidate: Measurement, metric: str) -> None:
    """Refuses shares beside percent where the metric's range cannot tell: 0..100, or not known."""
    meaning = baseline.metric(metric)
    if not meaning.higher_is_better or meaning.limits[1] not in (100.0, float("inf")):
        return
    own, theirs = (np.abs(np.asarray(m.metrics[metric])) for m in (baseline, candidate))
    small, large = sorted((own, theirs), key=lambda scores: scores.max())
    if 0 < small.max() <= 1 < large.max() <= 100 and large.mean() > ANOTHER_UNIT * small.mean():
        raise DataError(
            f"{metric} is at most {own.max():g} in the baseline {baseline.name} and {theirs.max():g} in "
            f"{candidate.name}: is one of them in percent? Use one unit; if the scores are right, name the "
            f"column '{metric}:higher:1' in every file."
        )
