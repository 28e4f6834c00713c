"""The experiments of `bem demo`: one that is trained from nothing, and one that measures a release on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bem.config import ExperimentConfig, TaskConfig, load, parse
from bem.releases.named import RELEASES, Shipped

HERE = Path(__file__).parent
SHOWN = RELEASES["bem-smol"]
"""The release that the demo measures."""
ROWS = 10
"""Held-out rows of each task."""


def tiny(output: str) -> ExperimentConfig:
    """A small comparison on bem-tiny, trained and judged from nothing."""
    return load(HERE / "tiny.yaml").model_copy(update={"output": output})


def of_release(release: Shipped, output: str, rows: int = ROWS) -> ExperimentConfig:
    """A release's router against its static LoRA, on `rows` of its held-out rows a task; nothing is trained.

    Tasks, experts and gates are those of the run that the release comes from; its ranks are read from its files.

    Raises:
        CheckpointError: the release is not there.
    """
    made = release.config
    assert made.routing is not None, "scripts/make_release.py refuses a run without experts"
    gates = made.gates.model_dump(mode="json")
    # Too few rows to guard a single task or slice: the run that the release comes from guarded them.
    gates["waived"] = sorted({*gates["waived"], "slices"})
    values: dict[str, Any] = {
        "name": f"demo-{release.name}" + ("" if rows == ROWS else f"-{rows}"),
        "output": output,
        "base": made.base,
        "dtype": made.dtype,
        "seeds": made.seeds[:1],
        "workers": 2,
        "data": {"tasks": [_held_out(release, task) for task in made.data.tasks], "dev_rows": rows},
        "routing": {"checkpoint": release.address, "experts": made.routing.experts},
        "arms": [
            {"name": "static-lora", "checkpoint": release.address, "role": "baseline"},
            {"name": "router", "route": "ar1"},
        ],
        "training": {"max_length": made.training.max_length},
        "gates": gates,
        "latency_rounds": 4,
        "latency_seconds_max": 10,
    }
    return parse(ExperimentConfig, values, f"the demo of {release.name}")


def _held_out(release: Shipped, task: str | TaskConfig) -> dict[str, Any]:
    """The task with the release's own held-out rows."""
    if isinstance(task, str):
        return {"name": task, "dev": str(release.held_out(task))}
    values = task.model_dump(mode="json", exclude_defaults=True, exclude={"train"})
    return values | {"dev": str(release.held_out(task.name))}
