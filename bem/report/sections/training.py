"""The training loss of every arm and seed."""

from __future__ import annotations

from collections.abc import Mapping

from bem.config import ExperimentConfig
from bem.report.plots import figures
from bem.runs.folder import RunFolder, read_jsonl


def curves_of(folder: RunFolder, config: ExperimentConfig, colours: Mapping[str, int]) -> str:
    """The figure; "" if no arm has a curve (routes that nothing is trained for have none)."""
    curves = []
    for arm in config.arms:
        for seed in config.seeds:
            if rows := read_jsonl(folder.cell(arm.name, seed).metrics):
                steps, loss = [row["step"] for row in rows], [row["loss"] for row in rows]
                control = arm.role == "control"
                curves.append(figures.Curve(arm.name, steps, loss, colours[arm.name], control))
    return figures.training_curves(curves) if curves else ""
