"""Options that several commands share, and the config that they make."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from bem import config as configuration

ConfigFile = Annotated[Path, typer.Argument(help="Experiment as YAML; see configs/.")]
DataFolder = Annotated[
    str | None, typer.Option("--data", help="Folder of public sets; default: the embedded suite.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value: --set training.steps=50."),
]
Base = Annotated[
    str | None, typer.Option("--base", help="bem-tiny, a folder or a Hugging Face id.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run (its folder).")]
Output = Annotated[str | None, typer.Option("--output", help="Folder that holds all runs.")]


def load(
    path: Path,
    data: str | None,
    settings: list[str] | None,
    base: str | None,
    name: str | None = None,
    output: str | None = None,
) -> configuration.ExperimentConfig:
    """The config with the options of the command line applied as overrides."""
    given = {"data.root": data, "base": base, "name": name, "output": output}
    options = [f"{key}={_yaml(value)}" for key, value in given.items() if value is not None]
    return configuration.load(path, [*(settings or []), *options])


def _yaml(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def command() -> str:
    """This command as it was typed, for reports."""
    return shlex.join(["bem", *sys.argv[1:]])
