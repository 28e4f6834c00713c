"""A detector in a process of its own: what hangs or dies there takes no server along, and is noticed.

    detector = DetectorProcess(timeout_ms=500)
    detector.check(text)                       # DetectorDown: no answer in time, or the process is gone

One text after another, a line of JSON each way over a socket. After a failure the next text starts it anew.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bem.errors import SafetyError
from bem.safety.detector import SHIPPED, Checked, Finding, ViolationDetector
from bem.safety.personal import PersonalData

START_S = 60.0
"""For the process to load its weights; on a busy machine Python itself takes seconds."""
PATIENCE = 0.7
"""Of its time the detector itself takes so much: a text that is too long is then refused, and nobody killed."""
PIECE = 1 << 16
COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from bem.safety.worker import main; main()"


class DetectorDown(SafetyError):
    """A detector that gave no answer: nothing is known of the text."""


class DetectorProcess:
    """`ViolationDetector.check` of another process; threads take turns."""

    def __init__(self, folder: str | Path = SHIPPED, timeout_ms: float = 2000.0):
        """
        Args:
            folder: of a detector's weights.
            timeout_ms: for one text; the process is then killed.
        """
        self.folder, self.timeout_s = str(folder), timeout_ms / 1000
        self.restarts = -1
        """How often it was started beyond the first time; -1: never yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start it now rather than with the first text.

        Raises:
            DetectorDown: it does not answer.
        """
        with self._lock:
            self._started()

    @property
    def alive(self) -> bool:
        """Does the process run?"""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def check(self, text: str) -> Checked:
        """What the detector says of a text.

        Raises:
            DetectorDown: nothing; the next text finds a new process.
        """
        with self._lock:
            self._started()
            return _checked(self._asked({"text": text}, self.timeout_s))

    def close(self) -> None:
        """End it."""
        with self._lock:
            self._kill()

    def _started(self) -> None:
        if self.alive:
            return
        self._kill()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-c", COMMAND, json.dumps(sys.path)]
        with theirs:  # a session of its own: Ctrl-C is the server's
            end = theirs.fileno()
            self._process = subprocess.Popen(command, stdin=end, stdout=end, start_new_session=True)
        self._socket = ours
        self.restarts += 1
        first = {"folder": self.folder, "timeout_ms": 1000 * PATIENCE * self.timeout_s}
        self._asked(first, START_S)

    def _asked(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert self._socket is not None
        until, heard = time.monotonic() + seconds, b""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(json.dumps(question).encode() + b"\n")
            while not heard.endswith(b"\n"):
                self._socket.settimeout(max(1e-3, until - time.monotonic()))
                piece = self._socket.recv(PIECE)
                if not piece:
                    raise ConnectionResetError("it is gone")
                heard += piece
            return json.loads(heard)
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            self._kill()
            why = str(error) or type(error).__name__
            raise DetectorDown(
                f"the detector's process gave no answer within {seconds:g} s: {why}."
            ) from None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None


def main() -> None:
    """The process: first a line that names the weights, then texts, until the socket closes."""
    detector: ViolationDetector | None = None
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            question = json.loads(line)
            if detector is None:
                detector = ViolationDetector(question["folder"], question["timeout_ms"])
                said: dict[str, Any] = {"ready": True}
            else:
                said = asdict(detector.check(question["text"]))
            sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
            sys.stdout.buffer.flush()


def _checked(said: dict[str, Any]) -> Checked:
    findings = tuple(Finding(**f) for f in said["findings"])
    personal = tuple(PersonalData(**p) for p in said["personal"])
    return Checked(said["score"], findings, personal, said["scores"], said["error"])
