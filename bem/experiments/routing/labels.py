"""A router over trained experts that learns who should answer from the makers' labels: no traces, no episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bem.experts.expert import read_expert
from bem.routing.mounted import check_files
from bem.training.data import Example
from bem.training.fit_router import fit_router

SHARED = "shared"
OF_THE_STACK = (
    "chunk_size", "router_layer", "orthogonal", "trust_radius", "trust_norm", "trust_relative",
)  # fmt: skip
"""Settings of the router that experts are trained under; the others are the policy's own."""
HELD_OUT = 0.15
"""Share of the labelled rows that the accuracy in fit.json is stated on."""


def fit_labels(
    model: Any,
    tokenizer: Any,
    experts: Path,
    rows: Sequence[Example],
    seed: int,
    max_length: int,
    folder: Path,
    on_progress: Callable[[str, int, int], None],
) -> None:
    """Fit a router to labelled conversations and write it with its experts.

    Args:
        experts: folder of a saved router, whose experts and trust region are taken.
        rows: see `Skills.labelled`.
        folder: where it goes.
    Raises:
        DataError: an expert with too few rows.
    """
    manifest = check_files(experts)
    abouts = {expert["name"]: expert["about"] for expert in manifest["experts"]}
    rules = {name: manifest["router"][name] for name in OF_THE_STACK}
    fit = fit_router(
        model,
        tokenizer,
        {
            name: replace(read_expert(experts / "experts" / name, model, name), about=about)
            for name, about in abouts.items()
        },
        rows,
        HELD_OUT,
        seed=seed,
        max_length=max_length,
        baselines=False,  # they are arms of their own, judged by their answers
        on_progress=on_progress,
        shared=SHARED if SHARED in abouts else None,
        **rules,
    )
    try:
        fit.save(folder)
    finally:
        fit.mounted.detach()
