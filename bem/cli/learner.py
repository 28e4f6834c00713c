"""The process that `bem serve --learn` starts: one line of JSON on standard input is the server's config, and
the end of it means that the server is gone."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading

import torch
from rich.logging import RichHandler

from bem.cli.console import Terminal
from bem.config import ServingConfig, parse
from bem.errors import ConfigError
from bem.online.beside import learn


def run() -> int:
    """Learn until the server ends, or somebody ends this process."""
    told = sys.stdin.buffer.readline()
    try:
        config = parse(ServingConfig, json.loads(told), "the server")
    except ValueError:
        raise ConfigError(
            "this is the process that `bem serve --learn` starts: start that."
        ) from None
    if config.learn is None:
        raise ConfigError("this server has no learner: start it with --learn.")
    handler = RichHandler(console=Terminal(stderr=True), show_path=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="learner: %(message)s", handlers=[handler])
    with contextlib.suppress(OSError):  # it may run where nobody may be nicer
        os.nice(config.learn.niceness)
    torch.set_num_threads(config.learn.threads)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    threading.Thread(target=_wait_for_the_end, args=(stopped,), daemon=True).start()
    learn(config, stopped)
    return 0


def _wait_for_the_end(stopped: threading.Event) -> None:
    """Standard input ends when the server does, however it ends. Read without Python's buffer, whose lock a
    thread that never comes back would keep."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    stopped.set()
