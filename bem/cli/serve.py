"""`bem serve`: a base and the versions of a store, over HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.text import Text

from bem.cli.console import Terminal
from bem.cli.options import Settings

DEFAULT, DEFAULT_LOG = Path("runs/store"), Path("runs/feedback.db")

Base = Annotated[str, typer.Option("--base", help="bem-tiny, a folder or a Hugging Face id.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the base; that for which the store's adapters were made."),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store", help="Folder of the version store; default: runs/store, if there is one."
    ),
]
Index = Annotated[Path | None, typer.Option("--index", help="Folder of passages, for `retrieve`.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", help="0: any that is free.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="File of API keys, see `bem keys`.")]
Log = Annotated[
    str | None,
    typer.Option(
        "--feedback", help="File (SQLite) or database URL for answers and what is said of them."
    ),
]
Canary = Annotated[
    list[str] | None,
    typer.Option(
        "--canary",
        metavar="VERSION=SHARE",
        help="Give a share of the conversations to a version of the store.",
    ),
]
Learn = Annotated[
    bool,
    typer.Option(
        "--learn", help="Learn from the feedback, in a process of its own; see `bem online`."
    ),
]
LearnFolder = Annotated[
    Path | None, typer.Option("--learn-folder", help="The learner's; default: runs/online.")
]


def serve(
    base: Base = "bem-tiny",
    dtype: Dtype = None,
    store: Store = None,
    index: Index = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    keys: Keys = None,
    feedback: Log = None,
    canary: Canary = None,
    learn: Learn = False,
    learn_folder: LearnFolder = None,
    settings: Settings = None,
) -> int:
    """Serve a base and the versions of a store by OpenAI's protocol."""
    from bem.config.serving import serving_config
    from bem.serving.server import Server

    _log()
    learns = learn or learn_folder is not None
    folder = store or (DEFAULT if learns or DEFAULT.is_dir() else None)
    given = {"base": base, "store": folder, "index": index, "host": host, "port": port}
    given |= {
        "keys": keys,
        "feedback": feedback or (DEFAULT_LOG if learns else None),
        "dtype": dtype,
    }
    values: dict[str, Any] = {n: str(v) if isinstance(v, Path) else v for n, v in given.items()}
    if learns:
        values["learn"] = {} if learn_folder is None else {"folder": str(learn_folder)}
    config = serving_config({k: v for k, v in values.items() if v is not None}, canary, settings)
    server = Server(config)
    _tell(server.url, config.base, folder)
    server.run()
    return 0


def _log() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Terminal(stderr=True), show_path=False, markup=False)],
    )
    logging.getLogger("bem").setLevel(logging.INFO)


def _tell(url: str, base: str, folder: Path | None) -> None:
    console = Terminal()
    where = f"versions of {folder}" if folder else "no version store: the bare base"
    console.print(Text.assemble(("Serving", "green"), f" {base}, {where}"), soft_wrap=True)
    console.print(Text(f"  {url}/v1"), soft_wrap=True)
    asked = '{"messages": [{"role": "user", "content": "Name a prime."}]}'
    line = f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{asked}'"
    console.print(Text(line), soft_wrap=True)
