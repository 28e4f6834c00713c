"""The state of a training run on disk: whole or not there, and refused when it is another run's."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bem.errors import TrainingError
from bem.files import write_bytes
from bem.variants.digest import weights_digest

STATE, METRICS = "state.pt", "metrics.jsonl"
MARK = b"sha256:"
TRAILER = len(MARK) + 64
"""Bytes behind torch's own: a zip file lets some of its middle be lost without anyone noticing."""


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values whole or not at all, with their sha256 at the end.

    Raises:
        OSError: the disk is full or not writable; what was there is whole.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.seek(0, io.SEEK_END)
    buffer.write(MARK + digest.encode())
    write_bytes(path, buffer.getbuffer())


def read_state(path: Path, device: torch.device | str, label: str) -> dict[str, Any]:
    """What `write_state` wrote, on a device.

    Raises:
        TrainingError: not readable, half written or changed.
    """
    try:
        content = path.read_bytes()
        body, trailer = content[:-TRAILER], content[-TRAILER:]
        if trailer != MARK + hashlib.sha256(body).hexdigest().encode():
            raise TrainingError(
                f"{label}: {path} is half written or was changed. Delete it to begin anew."
            )
        return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
    except TrainingError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise TrainingError(
            f"{label}: {path} cannot be read ({type(error).__name__}: {error}). Delete it to begin anew."
        ) from error


def check_same_run(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], label: str
) -> None:
    """Raise TrainingError if a state depends on something else than the run at hand; names what."""
    changes = _changes(before, json.loads(json.dumps(now)))
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise TrainingError(
            f"{label}: {path} belongs to a run with other settings: {'; '.join(changes[:3])}{more}. "
            f"Set them back, or delete {path.parent} to begin anew."
        )


def check_same_start(
    path: Path,
    start: str,
    saved: Sequence[Mapping[str, Tensor]],
    now: Mapping[str, Tensor],
    label: str,
) -> None:
    """Raise TrainingError unless the weights at hand are those that a run began with, or has come to.

    Args:
        start: `weights_digest` of the weights that the run began with.
        saved: weights of its state, and those that it would go back to.
        now: weights at hand.
    """
    if weights_digest(now) not in (start, *map(weights_digest, saved)):
        raise TrainingError(
            f"{label}: {path} was begun from other weights than these. Start from those, or delete "
            f"{path.parent} to begin anew."
        )


UNKNOWN = "not known"
"""A setting that the version did not have yet, or has no more."""


def _both(before: dict[str, Any], now: dict[str, Any], key: str) -> tuple[Any, Any]:
    """The values of one key; where one side lacks it, None on the other is the same."""
    one, other = before.get(key), now.get(key)
    return (
        one if key in before or other is None else UNKNOWN,
        other if key in now or one is None else UNKNOWN,
    )


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs, as "training.steps was 100, is 200"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            change
            for key in keys
            for change in _changes(*_both(before, now, key), f"{name}.{key}".lstrip("."))
        ]
    if before == now:
        return []
    return [f"{name} was {str(before)[:12]}, is {str(now)[:12]}"]


@contextmanager
def disk(label: str, what: str, folder: Path, saved: str) -> Iterator[None]:
    """Turn an OSError inside into a TrainingError that says what is whole: `saved`."""
    try:
        yield
    except OSError as error:
        reason = "no space is left" if error.errno == errno.ENOSPC else str(error)
        raise TrainingError(
            f"{label}: {what} could not be written to {folder}: {reason}. {saved}"
            "Free some space and start again: it goes on from there."
        ) from error
