"""How a process of a run begins: nothing heavy is imported before other libraries' loggers are told to be quiet."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

TALKATIVE = ("torchao", "torch.utils._pytree")
"""Loggers that warn of GPU kernels as soon as PEFT imports torchao, on every machine without them."""


def hush() -> None:
    """Let them tell of errors alone."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def work(*arguments: Any) -> None:
    """`workers.work` in a process that was just spawned."""
    hush()
    import_module("bem.experiments.workers").work(*arguments)
