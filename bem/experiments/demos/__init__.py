"""The experiments of `bem demo`: one on the shipped tiny base, one on a real base with the release for it."""

from __future__ import annotations

from pathlib import Path

from bem.config import ExperimentConfig, load
from bem.releases.named import RELEASES

HERE = Path(__file__).parent
RELEASE = "bem-smol"


def tiny(output: str) -> ExperimentConfig:
    """A small comparison on bem-tiny, trained and judged from nothing."""
    return load(HERE / "tiny.yaml", [f"output={output}"])


def smol(output: str, rows: int) -> ExperimentConfig:
    """The release's router against its static LoRA, on `rows` of its held-out conversations a task."""
    config = load(HERE / "smol.yaml", [f"output={output}", f"data.dev_rows={rows}"])
    release = RELEASES[RELEASE]
    tasks = [
        {
            **({"name": task} if isinstance(task, str) else task.model_dump(exclude_unset=True)),
            "dev": str(release.held_out(task if isinstance(task, str) else task.name)),
        }
        for task in config.data.tasks
    ]
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"]["tasks"] = tasks
    return ExperimentConfig.model_validate(values)
