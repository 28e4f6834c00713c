"""Modules that a command needs and `bem --help` does not: imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """A module that is imported when one of its names is first asked for.

    runner = Lazy("bem.experiments.run")
    runner.run(config)      # here torch is loaded
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
