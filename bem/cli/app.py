"""The commands: demo | run | train | evaluate | plan | validate | promote | rollback | history | store |
serve | chat | keys | online | report | route | index | base | safety | doctor."""

from __future__ import annotations

import typer

import bem
from bem.cli.base import base_app
from bem.cli.chat import chat
from bem.cli.demo import demo
from bem.cli.doctor import doctor
from bem.cli.experiment import evaluate, report, run, train_app
from bem.cli.index import index_app
from bem.cli.keys import keys_app
from bem.cli.online import online_app
from bem.cli.plan import plan
from bem.cli.route import route_app
from bem.cli.route_fit import fit
from bem.cli.safety import safety_app
from bem.cli.serve import serve
from bem.cli.store import history, promote, rollback, store_app
from bem.cli.verdict import validate

app = typer.Typer(
    help="Adapt a frozen language model chunk by chunk, and know whether it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo, run, evaluate, plan, validate, promote, rollback, history, serve, chat, report, doctor,
):  # fmt: skip
    app.command()(command)
app.add_typer(train_app, name="train")
route_app.command()(fit)
app.add_typer(route_app, name="route")
app.add_typer(index_app, name="index")
app.add_typer(base_app, name="base")
app.add_typer(store_app, name="store")
app.add_typer(safety_app, name="safety")
app.add_typer(online_app, name="online")
app.add_typer(keys_app, name="keys")


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


def usage_problem(error: BaseException) -> str | None:
    """What was wrong with the words on the command line; "" if only help was shown; None: another error.

    typer carries its own copy of click or uses an installed one: the base of either's errors has this name.
    """
    if not any(kind.__name__ == "ClickException" for kind in type(error).__mro__):
        return None
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "bem"
    return f"{message}\nSee `{where} --help`." if message else ""
