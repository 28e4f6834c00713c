"""A server that listens: from a config to requests that are answered, until it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from bem.config import ServingConfig
from bem.errors import ConfigError, EngineError, MissingExtra

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Refuse to start without what serving needs.

    Raises:
        MissingExtra: names what to install.
    """
    for library in NEEDED:
        try:
            import_module(library)
        except ImportError:
            raise MissingExtra(library, "serve", "Serving") from None


class Server:
    """One server in this process. `run` blocks; `start` and `stop` do the same in a thread."""

    def __init__(self, config: ServingConfig, base: tuple[Any, Any] | None = None):
        """
        Args:
            base: model and tokenizer that are loaded already; None: `config.base` is loaded.
        Raises:
            MissingExtra: a library is not installed.
            ConfigError: the port is taken.
            BemError: base, store or index cannot be served.
        """
        check_installed()
        uvicorn = import_module("uvicorn")
        self.config = config
        self.socket = _bound(config.host, config.port)
        try:
            self.serving = import_module("bem.serving.state").Serving(config, base)
            app = import_module("bem.serving.api").build_app(self.serving)
            settings = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=int(config.drain_s) or 1,
                server_header=False,
            )
        except BaseException:
            self.socket.close()
            raise
        self._server = uvicorn.Server(settings)
        self._server.capture_signals = self._signals
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{'[' + host + ']' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Answer requests until `stop`, SIGTERM or Ctrl-C; what runs then is finished first."""
        self._server.run(sockets=[self.socket])

    def start(self) -> Server:
        """`run` in a thread; returns when it answers.

        Raises:
            EngineError: it never did.
        """
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)
        if not self._server.started:
            raise EngineError("the server did not start: its log says why.")
        return self

    def stop(self) -> None:
        """Take no request any more, finish what runs, end the engines."""
        self.serving.draining = True
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A polite kill lets answers finish; a second one does not wait for them. Neither is an error."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._told) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: Any) -> None:
        self.serving.draining = True
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True


BACKLOG = 2048
"""Connections that wait to be taken, as uvicorn has it."""


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(BACKLOG)  # whoever reads the address may connect at once, and waits
    except OSError as error:
        made.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Another --port, or --port 0 for any that is free."
        ) from None
    return made
