"""`bem serve`: a base and the versions of a store, over HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.logging import RichHandler
from rich.text import Text

from bem.cli.console import Terminal
from bem.cli.options import Settings

if TYPE_CHECKING:
    from bem.serving.server import Server

DEFAULT, DEFAULT_LOG = Path("runs/store"), Path("runs/feedback.db")

Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="A name, a folder or a Hugging Face id; default: that for which the store's releases were made, else bem-tiny.",
    ),
]
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
Vision = Annotated[
    str | None,
    typer.Option("--vision", help="Tower for pictures: tiny, or a folder of a CLIP or SigLIP."),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", help="0: any that is free.")]
Keys = Annotated[Path | None, typer.Option("--keys", help="File of API keys, see `bem keys`.")]
Log = Annotated[
    str | None,
    typer.Option(
        "--feedback", help="File (SQLite) or database URL for answers and what is said of them."
    ),
]
Policy = Annotated[
    Path | None, typer.Option("--policy", help="File of a safety policy, see docs/safety.md.")
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
    base: Base = None,
    dtype: Dtype = None,
    store: Store = None,
    index: Index = None,
    vision: Vision = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    keys: Keys = None,
    feedback: Log = None,
    policy: Policy = None,
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
    if base is None and folder is not None:
        base, made_for = _base_of(folder)
        dtype = dtype or made_for
    log = feedback or (DEFAULT_LOG if learns else None)
    given = {"base": base, "store": folder, "index": index, "host": host, "port": port}
    given |= {"keys": keys, "feedback": log, "dtype": dtype, "vision": vision, "policy": policy}
    values: dict[str, Any] = {n: str(v) if isinstance(v, Path) else v for n, v in given.items()}
    if learns:
        values["learn"] = {} if learn_folder is None else {"folder": str(learn_folder)}
    config = serving_config({k: v for k, v in values.items() if v is not None}, canary, settings)
    server = Server(config)
    _tell(server, folder)
    server.run()
    return 0


def _base_of(folder: Path) -> tuple[str | None, str | None]:
    """(base, dtype) that a store's releases need."""
    from bem.runs.loading import base_of
    from bem.runs.store import Store

    store = Store(folder)
    is_new = not (store.journal.pointer_file.exists() or store.journal.ledger_file.exists())
    return (None, None) if is_new else base_of(store) or (None, None)


def _log() -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Terminal(stderr=True), show_path=False, markup=False)],
    )
    logging.getLogger("bem").setLevel(logging.INFO)


def _tell(server: Server, folder: Path | None) -> None:
    config, url, console = server.config, server.url, Terminal()
    where = f"versions of {folder}" if folder else "no version store: the bare base"
    console.print(Text.assemble(("Serving", "green"), f" {config.base}, {where}"), soft_wrap=True)
    residents = server.serving.residents
    if residents.store is not None and residents.current is residents.bare:
        kept = ", ".join(f"bem@{release.short}" for release in server.serving.kept()[:3])
        said = f"  nothing is in use: `bem` is the bare base; the store keeps {kept or 'nothing'}"
        console.print(Text(said), soft_wrap=True)
    console.print(Text(f"  {url}/v1"), soft_wrap=True)
    asked = '{"messages": [{"role": "user", "content": "Name a prime."}], "temperature": 0}'
    line = f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{asked}'"
    console.print(Text(line), soft_wrap=True)
