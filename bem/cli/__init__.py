"""The `bem` command: run | train | evaluate | plan | validate | promote | report | route | index | doctor.

Exit codes: 0 done (or PROMOTE), 1 REJECT, 2 INCONCLUSIVE, 3 a problem that the message explains,
130 Ctrl-C.
Nothing heavy is imported before a command needs it, so `bem --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

import typer
from rich.console import Console
from rich.markup import escape

import bem
from bem.cli.doctor import doctor
from bem.cli.experiment import evaluate, report, run, train_app
from bem.cli.index import index_app
from bem.cli.plan import plan
from bem.cli.route import route_app
from bem.cli.verdict import promote, validate
from bem.errors import BemError

PROBLEM = 3
INTERRUPTED = 130

app = typer.Typer(
    help="Adapt a frozen language model chunk by chunk, and know whether it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, evaluate, plan, validate, promote, report, doctor):
    app.command()(command)
app.add_typer(train_app, name="train")
app.add_typer(route_app, name="route")
app.add_typer(index_app, name="index")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bem {bem.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version."
    ),
) -> None:
    """Options of `bem` itself."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every problem of the caller's becomes one message and exit code 3."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    # A polite kill is a Ctrl-C: what is finished stays, what is running can be resumed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(args=arguments, prog_name="bem", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BemError as error:
        return _problem(str(error))
    except BrokenPipeError:  # `bem report ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _problem(_system_problem(error))
    except _USAGE_ERROR as error:  # pyright: ignore
        if not error.format_message():  # a bare `bem` has shown its help
            return 0
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "bem"
        return _problem(f"{error.format_message()}\nSee `{where} --help`.")
    if code == INTERRUPTED:
        Console(stderr=True).print(
            "\n[yellow]Stopped.[/] What is finished is kept; the same command resumes it."
        )
    return code if isinstance(code, int) else 0


# typer carries its own copy of click or uses an installed one; this is the base of either's errors.
_USAGE_ERROR = typer.BadParameter.__mro__[2]


def _problem(message: str) -> int:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]Error:[/] {escape(message)}")
    return PROBLEM


def _system_problem(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full{where}. Finished parts are kept: free some space (old folders under "
            "runs/ are the first candidates) and run the same command again."
        )
    return f"{error.strerror or error}{where}"
