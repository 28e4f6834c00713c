"""`bem online`: what the learner does, why, and the whole loop on a recorded stream."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal
from bem.cli.display import quiet
from bem.errors import ConfigError, OnlineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bem.config import OnlineConfig
    from bem.online.loop import Loop, Round
    from bem.online.trainee import Trainee

DEFAULT = Path("runs/online")
SHORT = 12
COLOURS = {"promoted": "green", "rolled back": "yellow", "rejected": "red", "drift": "magenta"}

online_app = typer.Typer(
    help="Online learning: what the learner does, and why.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Option("--folder", help="The learner's folder.")]
Log = Annotated[
    Path, typer.Argument(help="JSON Lines: rows with right answers, or exported feedback.")
]
Model = Annotated[
    str, typer.Option("--base", help="A name of `bem base list`, a folder or a hub id.")
]
Start = Annotated[
    Path | None, typer.Option("--start", help="Checkpoint of an adapter or a router to begin with.")
]
Variant = Annotated[str, typer.Option("--variant", help="Without --start: a new adapter.")]
Rank = Annotated[int, typer.Option("--rank", min=1, help="Of a new one.")]
Trusted = Annotated[
    Path | None,
    typer.Option("--trusted", help="Rows that are known to be right, and must not be forgotten."),
]
Score = Annotated[str, typer.Option("--score", help="em, f1, chrf of real answers; exact, tokens.")]
Form = Annotated[str, typer.Option("--form", help="How answers are compared.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set margin=0.02."),
]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", help="The version store; default: store beside the folder."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


@online_app.command()
def replay(
    log: Log,
    base: Model = "bem-tiny",
    start: Start = None,
    variant: Variant = "s0",
    rank: Rank = 8,
    trusted: Trusted = None,
    score: Score = "em",
    form: Form = "text",
    settings: Settings = None,
    folder: Folder = DEFAULT,
    store: StoreFolder = None,
    device: Device = "cpu",
) -> int:
    """Run the whole loop on a recorded stream: answer, learn, watch, put on trial, promote, roll back.

    Stopped or killed, the same command goes on where it was, with the same result.
    """
    config = _config(settings)
    quiet()
    from bem.online.loop import Loop
    from bem.online.stream import read_stream
    from bem.runs.store import Store

    turns, known = read_stream(log), read_stream(trusted) if trusted else []
    trainee = _trainee(base, device, start, (variant, rank), (score, form), config)
    console = Terminal()
    target = Store(store or folder.parent / "store", by="bem online")
    with Loop(folder, target, trainee, config) as loop:
        if loop.rounds:
            console.print(Text(f"Goes on after event {loop.event}."))
        loop.trust(known)
        rounds = loop.go(turns, lambda r: _say_round(console, r))
        _summary(console, loop, rounds)
    return 0


@online_app.command()
def status(folder: Folder = DEFAULT) -> int:
    """What the learner does now."""
    from bem.online.desk import Desk

    found, console = Desk(folder).status(), Terminal()
    trial, counts = found["trial"], found["counts"]
    learning = "paused" if Desk(folder).paused else "on"
    lines = {
        "learning": f"{learning}; {counts['steps']} steps, {counts['discarded']} discarded",
        "events": f"{found['event']}; {counts['lessons']} lessons, {counts['held_out']} of them held out",
        "in use": _name(found["live"]),
        "drift": found["drift"],
        "watching" if found["watching"] else "on trial": "nothing"
        if trial is None
        else f"{_name(found['live'] if found['watching'] else found['candidate'])}: {trial['reason']}",
    }
    for name, text in lines.items():
        console.print(Text.assemble((f"{name}: ", "bold"), text), soft_wrap=True)
    for problem in found["problems"]:
        console.print(Text.assemble(("Damaged: ", "red"), problem), soft_wrap=True)
    return 1 if found["problems"] else 0


@online_app.command()
def pause(
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the folder.")] = "",
    folder: Folder = DEFAULT,
) -> int:
    """Stop learning from the next round on; answers, trials and watches go on."""
    from bem.online.desk import Desk

    Desk(folder).pause(reason)
    Terminal().print("Learning is paused.")
    return 0


@online_app.command()
def resume(folder: Folder = DEFAULT) -> int:
    """Learn again."""
    from bem.online.desk import Desk

    was = Desk(folder).resume()
    Terminal().print("Learning goes on." if was else "It was not paused.")
    return 0


@online_app.command()
def candidates(folder: Folder = DEFAULT) -> int:
    """Every candidate, what became of it, and by which evidence."""
    from bem.online.desk import Desk
    from bem.online.told import candidates as told_of

    desk, console = Desk(folder), Terminal()
    found = told_of(desk.entries(), desk.status()["trial"], sys.maxsize)
    table = Table(box=None, pad_edge=False)
    for column in ("number", "version", "what became of it", "events", "why"):
        table.add_column(column, overflow="fold", no_wrap=column != "why")
    for each in reversed(found):
        what, events = each["what"], str(each["events"] or "-")
        cells = (str(each["number"]), _name(each["version"]), events, each["why"])
        shown = Text(what, COLOURS.get(what, ""))
        table.add_row(Text(cells[0]), Text(cells[1]), shown, *map(Text, cells[2:]))
    console.print(table)
    return 0


@online_app.command()
def why(
    id: Annotated[str, typer.Argument(help="Number of a candidate, or digits of a version.")],
    folder: Folder = DEFAULT,
) -> int:
    """Everything that was noted of one candidate or version, with its e-values."""
    from bem.online.desk import Desk

    desk, console = Desk(folder), Terminal()
    desk.status()
    entries = [e for e in desk.entries() if _is_about(e, id)]
    if not entries:
        raise OnlineError(
            f"nothing is noted of {id!r} in {desk.journal}. `bem online candidates` lists what there is."
        )
    for entry in entries:
        head = Text(f"event {entry['event']}: ")
        head.append(entry["what"], COLOURS.get(entry["what"], "bold"))
        console.print(head.append(f" {_name(entry.get('version'))}"))
        trial = entry.get("trial") or {}
        for text in filter(None, (entry.get("reason"), trial.get("reason"))):
            console.print(Text(f"  {text}"), soft_wrap=True)
        for m in trial.get("metrics", []):
            mean = (
                "no data" if m["difference"] is None else f"mean difference {m['difference']:+.3f}"
            )
            console.print(
                f"  {m['metric']}: {m['n']} events, {mean}, e-value not worse {m['e_not_worse']:.3g}, "
                f"worse {m['e_worse']:.3g}",
                soft_wrap=True,
            )
    return 0


@online_app.command(hidden=True)
def learn() -> int:
    """The learner of `bem serve --learn`: told by the server what to do, on its standard input."""
    quiet()
    from bem.cli.learner import run

    return run()


# --- parts of replay ------------------------------------------------------------------------------


def _config(settings: Sequence[str] | None) -> OnlineConfig:
    import yaml

    from bem.config import OnlineConfig, parse

    values: dict[str, Any] = {}
    for text in settings or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set must be KEY=VALUE, such as margin=0.02; got {text!r}.")
        values[key.strip()] = yaml.safe_load(value)
    return parse(OnlineConfig, values, "--set")


def _trainee(
    base: str,
    device: str,
    start: Path | None,
    new: tuple[str, int],
    judged: tuple[str, str],
    config: OnlineConfig,
) -> Trainee:
    from bem.adapters.attach import attach, load
    from bem.bases.load import load_base
    from bem.cli.route import device_of
    from bem.online.adapter_trainee import AdapterTrainee
    from bem.online.marks import METRICS, marks_by
    from bem.online.router_trainee import RouterTrainee
    from bem.routing.mount import load_router
    from bem.routing.mounted import is_router

    if judged[0] not in METRICS:
        raise ConfigError(f"--score {judged[0]!r} is none of {', '.join(METRICS)}.")
    model, tokenizer = load_base(base, device_of(device))
    marks = marks_by(judged[0], tokenizer, config.max_length, form=judged[1])
    if start is not None and is_router(start):
        return RouterTrainee(load_router(model, start), tokenizer, marks, config)
    attached = load(model, start) if start else attach(model, new[0], rank=new[1])
    return AdapterTrainee(attached, tokenizer, marks, config)


def _say_round(console: Terminal, done: Round) -> None:
    if done.moved:
        words = {"promote": "promoted", "reject": "rejected", "rollback": "rolled back"}
        what = words[done.moved]
        console.print(Text.assemble(f"event {done.event}: ", (what, COLOURS[what])))


def _summary(console: Terminal, loop: Loop, rounds: Sequence[Round]) -> None:
    scores = [s for done in rounds for s in done.scores if s is not None]
    tenth = max(1, len(scores) // 10)
    parts = [scores[i : i + tenth] for i in range(0, len(scores), tenth)][:10]
    shown = " ".join(f"{sum(part) / len(part):.2f}" for part in parts) or "none"
    console.print(Text(f"Scores, by tenths of these events: {shown}"), soft_wrap=True)
    counts = loop.learner.counts
    text = (
        f"{counts.steps} steps, {counts.discarded} discarded, {counts.held_out} lessons held out."
    )
    console.print(Text(text), soft_wrap=True)
    live = loop.production.live.version
    where = f"Store: {loop.production.store.path}; folder: {loop.desk.folder}"
    console.print(Text(f"In use: {_name(live)}. {where}"), soft_wrap=True)


def _is_about(entry: dict[str, Any], id: str) -> bool:
    if id.isdigit() and str(entry.get("number")) == id:
        return True
    versions = (entry.get("version"), entry.get("to"))
    return len(id) >= 4 and any(v and v.startswith(id) for v in versions)


def _name(version: str | None) -> str:
    return f"version {version[:SHORT]}" if version else "the bare base"
