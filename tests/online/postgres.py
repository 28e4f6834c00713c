"""A PostgreSQL server of its own, for tests: real, on a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pytest

OWNER = "postgres"


class Postgres:
    """One server."""

    def __init__(self, folder: Path, binaries: Path, user: str | None):
        """user: who runs it, as it refuses to be run by root; None: whoever runs the tests."""
        self.folder, self.binaries, self.user = folder, binaries, user
        self.url = f"postgresql+psycopg://{OWNER}@/postgres?host={folder}"
        self._process: subprocess.Popen | None = None

    def run(self, name: str, *arguments: str) -> None:
        command = [str(self.binaries / name), *arguments]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd=self.folder)

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        command = [str(self.binaries / "postgres"), "-D", "data", "-k", str(self.folder), "-h", ""]
        self._process = subprocess.Popen(
            command, stdout=log, stderr=log, user=self.user, cwd=self.folder
        )
        ready = [str(self.binaries / "pg_isready"), "-q", "-h", str(self.folder), "-t", "60"]
        while subprocess.run(ready).returncode:  # 1: it starts, 2: it does not listen yet
            if self._process.poll() is not None:
                raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def end(self, how: int = signal.SIGINT) -> None:
        """SIGINT: it takes leave of its clients; SIGKILL: it does not."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait()


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += [Path(place) for place in sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    return next((place for place in places if (place / "postgres").exists()), None)


@contextmanager
def running() -> Iterator[Postgres]:
    """A server that runs; the test is skipped where there can be none."""
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'bem[postgres]'")
    binaries, user = _binaries(), None
    if binaries is None:
        pytest.skip("needs PostgreSQL's server: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="bem-postgres-"))
    try:
        if os.getuid() == 0:
            try:
                user = pwd.getpwnam(OWNER).pw_name
            except KeyError:
                pytest.skip("PostgreSQL is not run by root, and there is no user postgres")
            shutil.chown(folder, user)
        server = Postgres(folder, binaries, user)
        server.run("initdb", "-D", "data", "-N", "-A", "trust", "-U", OWNER, "-E", "UTF8")
        server.start()
        yield server
        server.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
