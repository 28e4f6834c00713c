"""`bem route fit`: a router for LoRAs that exist, from a few rows of each skill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal
from bem.cli.display import Display, quiet
from bem.errors import ConfigError

if TYPE_CHECKING:
    from bem.training.fit_router import RouterFit
    from bem.training.router_scores import Estimate, Score


Experts = Annotated[
    list[str],
    typer.Option("--expert", metavar="NAME=LORA", help="A PEFT LoRA: folder or hub id. Repeat it."),
]
Examples = Annotated[
    Path,
    typer.Option(
        "--examples",
        help='A .jsonl file; a row has an answer, or "label": NAME. From 20 rows of a skill.',
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the router.")]
Model = Annotated[
    str, typer.Option("--base", help="A name of `bem base list`, a folder or a hub id.")
]
HeldOut = Annotated[
    float, typer.Option("--held-out", help="Share of the rows that the numbers are stated on.")
]
Test = Annotated[
    Path | None, typer.Option("--test", help="State them on the rows of this file instead.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Same seed, same router.")]
MaxLength = Annotated[
    int, typer.Option("--max-length", min=16, help="Tokens of a conversation that are read.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Rows of one forward pass.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Vision = Annotated[
    str | None,
    typer.Option(
        "--vision", help='Look at the rows\' "image" through this tower: tiny, or a folder.'
    ),
]


def fit(
    expert: Experts,
    examples: Examples,
    out: Out,
    base: Model = "bem-tiny",
    held_out: HeldOut = 0.25,
    test: Test = None,
    seed: Seed = 0,
    max_length: MaxLength = 1024,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    vision: Vision = None,
) -> int:
    """Fit a router to LoRAs that exist: which of them should answer, from a few rows of each skill.

    Rows are those of `bem.training.routing_rows`: prompt and completion, input and references, or messages.
    """
    experts = _experts(expert)
    quiet()
    from bem.bases.load import load_base
    from bem.cli.route import device_of
    from bem.experiments.events import Event
    from bem.training.fit_router import fit_router
    from bem.training.routing_rows import read_routing_rows

    _check_out(out)
    given, other, tower = _looked_at(vision, examples, test)
    read_routing_rows(given, list(experts))  # broken rows are known before the base is loaded
    console = Terminal()
    with Display(console) as display:
        display.show(Event("loading the base"))
        model, tokenizer = load_base(base, device_of(device))
        found = fit_router(
            model, tokenizer, experts, given, other or held_out,
            seed=seed, max_length=max_length, batch_size=batch_size, **tower,  # pyright: ignore[reportArgumentType]
            on_progress=lambda stage, done, of: display.show(Event(stage, done=done, total=of)),
        )  # fmt: skip
        folder = found.save(out)
    _show(console, found)
    where = escape(str(folder))
    console.print(f"\nRouter: [bold]{where}[/] (the numbers: {where}/fit.json)", soft_wrap=True)
    ask = f"bem route explain TEXT --router {where} --base {escape(base)}"
    console.print(f"Ask it: {ask}", soft_wrap=True)
    return 0


def _looked_at(
    vision: str | None, examples: Path, test: Path | None
) -> tuple[Any, Any, dict[str, str]]:
    """(rows, rows of the test, the tower that the router is told of)."""
    if vision is None:
        return examples, test, {}
    from bem.tasks.pictures import rows_with_images
    from bem.vision.eyes import Eyes
    from bem.vision.load import load_tower

    eyes = Eyes(load_tower(vision))
    rows = [None if path is None else rows_with_images(path, eyes) for path in (examples, test)]
    return rows[0], rows[1], {"vision": eyes.encoder_id}


def _experts(given: list[str]) -> dict[str, str]:
    """Name -> LoRA.

    Raises:
        ConfigError: not NAME=LORA, a name twice, or one expert alone.
    """
    experts: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ConfigError(f"--expert must be NAME=LORA, such as sql=loras/sql; got {text!r}.")
        if name in experts:
            raise ConfigError(f"--expert {name} was given twice: {experts[name]} and {source}.")
        experts[name] = source
    return experts


def _check_out(out: Path) -> None:
    """Known before minutes are spent.

    Raises:
        ConfigError: the folder holds something that is not a router, or cannot be made.
    """
    from bem.routing.mounted import is_router

    if out.exists() and not (out.is_dir() and (is_router(out) or not any(out.iterdir()))):
        raise ConfigError(f"{out} exists already and holds no router: name a new folder.")
    parent = next(p for p in out.absolute().parents if os.path.exists(p))
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"{out} cannot be written: {parent} is no folder that you may write to.")


def _show(console: Terminal, found: RouterFit) -> None:
    for side, counts in found.rows.items():
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        console.print(Text(f"{side.replace('_', ' ')}: {sum(counts.values())} rows ({listed})"))
    measured = any(score.regret for score in found.scores)
    columns = ["layer", "accuracy, %", *(["regret"] if measured else []), "flips"]
    table = Table(box=None, pad_edge=False)
    for name in ("", *columns, "router leads by"):
        table.add_column(name, overflow="fold")  # narrow consoles lose no number
    for score in found.scores:
        table.add_row(*_row(score, measured))
    console.print(table)
    if found.as_it_acts is not None:
        text = f"Regret of the router's real forward passes: {_nats(found.as_it_acts)} nats per answer token."
        console.print(Text(text))
    for note in found.notes:
        console.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)


def _row(score: Score, measured: bool) -> list[str]:
    regret = [] if not measured else ["-" if score.regret is None else _nats(score.regret)]
    lead = "" if score.lead is None else _share(score.lead, sign="+")
    layer = score.reads.removeprefix("layer ")
    name, flips = score.name.removeprefix("nearest "), score.flip_rate
    shown = "-" if flips is None else f"{flips:.2f}"
    return [name, layer, _share(score.accuracy), *regret, shown, lead]


def _share(found: Estimate, sign: str = "") -> str:
    low, high = (f"{100 * end:{sign}.0f}" for end in (found.low, found.high))
    return f"{100 * found.value:{sign}.1f} [{low}, {high}]"


def _nats(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
