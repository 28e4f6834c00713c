"""What every step did, kept while it runs: JSON lines, and TensorBoard files if that is installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bem.files import write_bytes
from bem.training.state import METRICS
from bem.training.trainer import StepResult

SHOWN = ("loss", "penalty", "grad_norm", "learning_rate")


class MetricsLog:
    """metrics.jsonl of a run, one `StepResult` a line; a line is written whole or not at all."""

    def __init__(self, folder: Path, steps: int):
        """steps: done already; what stands behind them is of a run that was killed, and goes.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = folder / METRICS
        before = path.read_bytes().splitlines(keepends=True)[:steps] if path.exists() else []
        write_bytes(path, b"".join(before))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._board = _tensorboard(folder, steps)

    def add(self, result: StepResult) -> None:
        """Append one step.

        Raises:
            OSError: the disk is full or not writable; nothing of the line is left.
        """
        at = self._file.tell()
        try:
            self._file.write(json.dumps(asdict(result)).encode() + b"\n")
        except OSError:
            self._file.truncate(at)
            raise
        if self._board:
            for name in SHOWN:
                self._board.add_scalar(name, getattr(result, name), result.step)

    def close(self) -> None:
        """Close both."""
        self._file.close()
        if self._board:
            self._board.close()


def _tensorboard(folder: Path, steps: int) -> Any:
    if not find_spec("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=steps + 1)
