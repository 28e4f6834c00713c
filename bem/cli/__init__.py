"""The `bem` command: demo | run | train | evaluate | plan | validate | promote | serve | chat | online | safety | report | route ...

Exit codes: 0 done (or PROMOTE), 1 REJECT and nothing else, 2 INCONCLUSIVE, 3 a problem that the message
explains, 70 a defect of ours (with its traceback), 130 Ctrl-C, 141 nobody read the output.
Nothing is imported before `main` runs, so that a broken installation does not exit with 1 either, and
nothing heavy before a command needs it, so that `bem --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
import traceback
from importlib import import_module

from bem.errors import BemError

PROBLEM = 3
DEFECT = 70  # EX_SOFTWARE
INTERRUPTED = 130
UNREAD = 141  # what a shell says of a command that SIGPIPE ended


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every problem of the caller's becomes one message and exit code 3."""
    try:
        code = _exit_code(arguments)
    except KeyboardInterrupt:  # a second one, while the first was being told
        code = INTERRUPTED
    except BaseException as error:  # not even the message could be written
        code = DEFECT
        with contextlib.suppress(Exception):
            traceback.print_exception(error)
    sys.exit(code)


def _exit_code(arguments: list[str] | None) -> int:
    try:
        if threading.current_thread() is threading.main_thread():
            # A polite kill is a Ctrl-C: what is finished stays, what is running can be resumed.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        import_module("bem.experiments.start").hush()
        import_module("bem.cli.console").accept_every_character()
        app = import_module("bem.cli.app").app
        code = app(args=arguments, prog_name="bem", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException as error:
        code = _code_of(error)
    if code == INTERRUPTED:
        _tell("\nStopped.", "What is finished is kept; run the same command again.", "yellow")
    return code if isinstance(code, int) else 0


def _code_of(error: BaseException) -> int:
    """The exit code of an error, once it was told; never 1, which means REJECT."""
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):  # rich and click make it an exit with 1
            return _unread()
        if error.code in (None, 0, INTERRUPTED):
            return error.code or 0
    if isinstance(error, BrokenPipeError):
        return _unread()
    if isinstance(error, BemError):
        return _problem(str(error))
    if isinstance(error, OSError):
        return _problem(_system_problem(error))
    usage = import_module("bem.cli.app").usage_problem(error)
    if usage is not None:
        return _problem(usage) if usage else 0
    traceback.print_exception(error)
    _tell("Error:", f"this is a defect of bem ({type(error).__name__}); please report it.")
    return DEFECT


def _unread() -> int:
    import_module("bem.cli.console").read_by_nobody()
    return UNREAD


def _problem(message: str) -> int:
    _tell("Error:", message)
    return PROBLEM


def _tell(head: str, message: str, colour: str = "red") -> None:
    import_module("bem.cli.console").tell(head, message, colour)


def _system_problem(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full{where}. Finished parts are kept: free some space (old folders under "
            "runs/ are the first candidates) and run the same command again."
        )
    return f"{error.strerror or error}{where}"
