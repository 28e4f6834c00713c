"""`bem keys`: who may ask a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal

keys_app = typer.Typer(help="API keys of a server: add, list, remove.", no_args_is_help=True)

File = Annotated[Path, typer.Option("--keys", help="File of the keys' digests.")]
Name = Annotated[str, typer.Argument(help="On whose behalf the key asks.")]
DEFAULT = Path("keys.json")


@keys_app.command()
def add(
    name: Name,
    keys: File = DEFAULT,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", help="Default: no limit.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", help="Requests at once; default: no limit.")
    ] = None,
) -> int:
    """Make a key and print it: only its digest is kept, it cannot be shown again."""
    from bem.serving.keys import add_key

    print(add_key(keys, name, requests_per_minute, concurrent))
    return 0


@keys_app.command("list")
def show(keys: File = DEFAULT) -> int:
    """Say whose keys there are."""
    from bem.serving.keys import read_keys

    table = Table(box=None, pad_edge=False)
    for column in ("name", "made (UTC)", "requests a minute", "at once"):
        table.add_column(column, no_wrap=True)
    for key in read_keys(keys).keys:
        limits = (str(n or "no limit") for n in (key.requests_per_minute, key.concurrent))
        table.add_row(Text(key.name), key.created[:19].replace("T", " "), *limits)
    Terminal().print(table)
    return 0


@keys_app.command()
def remove(name: Name, keys: File = DEFAULT) -> int:
    """Take a key away; a server that runs notices at once."""
    from bem.serving.keys import remove_key

    remove_key(keys, name)
    return 0
