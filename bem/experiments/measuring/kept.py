"""What the same weights gave to the same tokens before, on disk: so that arms that share it compute it once.

    FOLDER/ACTING/BATCH.json     what one batch of rows was given, by the rows' keys

A file is written whole and is named by the keys that it holds. So a killed process loses the batch it was
at and no more, and two processes at once cannot disturb each other; at worst both compute a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bem
from bem.errors import MeasurementError
from bem.experiments.measuring.cache_use import CacheUse
from bem.experiments.measuring.given import Given
from bem.files import read_json, sha256_json, write_json
from bem.training.data import Encoded

FORMAT = 1


class KeptAnswers:
    """Rows and what they were given, for `measure`; see the module's docstring.

    What the model says to a row can differ by rounding with the rows beside it: a row that is taken
    over has the numbers of the batch it was first computed in.
    """

    def __init__(self, folder: Path, acting: str, model: Any):
        """
        Args:
            folder: of all such files; made when something is kept.
            acting: digest of all weights and settings that act, but for what a row's own route says.
            model: that computes: its dtype and kind of device are part of the keys.
        """
        facts = [FORMAT, bem.__version__, acting, str(model.dtype), model.device.type]
        self._folder = folder / sha256_json(facts)[:16]
        self._given: dict[str, Given] = {}
        self._read: set[str] = set()

    def refresh(self) -> None:
        """Read what this or another process has written since.

        Raises:
            MeasurementError: a file is not what `add` wrote.
        """
        for path in sorted(self._folder.glob("*.json")):
            if path.name not in self._read:
                self._given |= _given_in(path)
                self._read.add(path.name)

    def get(self, key: str) -> Given | None:
        """What the row of this key was given; None: it was not asked yet, as far as is known here."""
        return self._given.get(key)

    def add(self, given: Mapping[str, Given]) -> None:
        """Keep what the rows of a batch were given, by their keys."""
        name = f"{sha256_json(sorted(given))[:32]}.json"
        rows = {key: asdict(each) for key, each in given.items()}
        write_json(self._folder / name, rows, indent=None)
        self._given |= given
        self._read.add(name)


def key_of(prompt: Encoded, whole: Encoded, max_new_tokens: int) -> str:
    """sha256 of all that a row's answer and loss depend on beside the weights: tokens, turn starts,
    evidence, and the option of every token."""
    return sha256_json([asdict(prompt), asdict(whole), max_new_tokens])


def _given_in(path: Path) -> dict[str, Given]:
    try:
        rows = read_json(path, MeasurementError)
        return {
            key: Given(**{**row, "cache": CacheUse(**row["cache"])}) for key, row in rows.items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise MeasurementError(
            f"{path} holds no kept answers ({type(error).__name__}: {error}). Delete it: its rows are asked again."
        ) from None
