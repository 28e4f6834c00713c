"""The learner beside a server: a process of its own, started again when it dies. Whatever becomes of it, the
server serves on: it follows the version store, and knows of the learner only what lies in its folder."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys

from bem.config import ServingConfig

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Seconds between looks at whether it runs."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
"""Until a learner that ended is started again: doubled each time, until one has run for the longest."""
STOP_S = 10.0
"""It has so long to end its round and write its snapshot; one that is killed goes on from the last."""


class LearnerProcess:
    """One process at a time."""

    def __init__(self, config: ServingConfig):
        """config: the server's; it goes over standard input, because databases have passwords and every
        user of the machine can read a command line."""
        self.config = config
        self.restarts = 0
        self.ended = ""
        """How the last one ended; empty: none has."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Does it run?"""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process that runs."""
        return self._process.pid if self._process is not None and self.alive else None

    async def run(self) -> None:
        """Keep one running until cancelled."""
        wait_s, clock = FIRST_WAIT_S, asyncio.get_running_loop().time
        while True:
            began = clock()
            self.ended = await self._one()
            wait_s = FIRST_WAIT_S if clock() - began > LONGEST_WAIT_S else wait_s
            log.error("the learner ended: %s; another begins in %.0f s", self.ended, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            self.restarts += 1

    async def _one(self) -> str:
        """One process from its start to its end, and how it ended."""
        try:
            process = self._start()
        except OSError as failed:  # no memory, too many processes: it may be better later
            return f"it could not be started: {failed.strerror}"
        while (code := process.poll()) is None:
            await asyncio.sleep(LOOK_S)
        self._close_pipe()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "bem", "online", "learn"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self._process = process
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it died at once: `_one` sees that
            process.stdin.write(self.config.model_dump_json().encode() + b"\n")
            process.stdin.flush()
        log.info("the learner is process %d", process.pid)
        return process

    def stop(self) -> None:
        """End it, with a snapshot if it can be had in time."""
        if self._process is None:
            return
        self._close_pipe()  # the end of its standard input is its signal
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
