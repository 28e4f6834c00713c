"""`bem route fit | explain | export | distill`: a router for LoRAs that exist, what it does, and static LoRAs
made of its experts."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bem.cli.conversation import table_of
from bem.cli.display import Display, quiet
from bem.cli.options import Base, ConfigFile, DataFolder, Settings, load
from bem.errors import ConfigError, DataError
from bem.releases.named import RELEASES

if TYPE_CHECKING:
    from bem.adapters.attach import Attached
    from bem.config import ExperimentConfig
    from bem.routing.explain import Explained
    from bem.routing.mounted import Mounted
    from bem.training.data import Example

ROLES = ("user", "assistant")
TURN = re.compile(r"(user|assistant):", re.IGNORECASE)

route_app = typer.Typer(
    help="Fit a router to LoRAs that exist; ask it what it does and why; make static LoRAs of its experts.",
    no_args_is_help=True,
)

Router = Annotated[
    Path,
    typer.Argument(
        help="Folder of a router (see `bem route fit`, `bem train router`), or a release: bem-smol."
    ),
]
RouterOption = Annotated[
    Path, typer.Option("--router", help="Folder of the router, or a release: bem-smol.")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--base", help="A name, a folder or a hub id; default: a release's own, else bem-tiny."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]


@dataclass(frozen=True)
class Read:
    """A text as the router read it, and what the model said."""

    chunks: list[Explained]
    texts: list[str]
    """Of each chunk."""
    answer: str | None


@route_app.command()
def explain(
    text: Annotated[
        str,
        typer.Argument(
            help="What the user says, or a conversation: lines that begin with `user:` and "
            "`assistant:` begin turns. `-` reads it from standard input."
        ),
    ],
    router: RouterOption,
    base: Model = None,
    answer: Annotated[
        bool,
        typer.Option("--answer", help="Let the model answer, and show the answer's route too."),
    ] = False,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Longest answer, in tokens.")
    ] = 64,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Show what a router does with a text and why, chunk by chunk."""
    row, answered = conversation(sys.stdin.read() if text == "-" else text)
    if answer and answered:
        raise DataError("The text ends with an answer: leave it out, or drop --answer.")
    mounted, tokenizer = _mounted(router, base, device)
    read = _read(mounted, tokenizer, row, answered, new_tokens if answer else 0)
    if as_json:
        named = zip(read.chunks, read.texts, strict=True)
        chunks = [{**asdict(chunk), "text": text} for chunk, text in named]
        result = {"router": str(router), "base": _base_of(router, base), "chunks": chunks}
        print(json.dumps(result | {"answer": read.answer}, ensure_ascii=False))
        return 0
    console = Console()
    console.print(table_of(read.chunks, read.texts, mounted.router.chunk_size))
    if read.answer is not None:
        console.print(f"\n[bold]answer:[/] {escape(read.answer)}", highlight=False)
    return 0


@route_app.command()
def export(
    router: Router,
    out: Annotated[Path, typer.Option("--out", help="New folder for the LoRA.")],
    expert: Annotated[str | None, typer.Option("--expert", help="This expert alone.")] = None,
    gates: Annotated[
        str | None,
        typer.Option(
            "--gates", help='Several at once, by how much: \'{"json": 1.0, "sql": 0.5}\'.'
        ),
    ] = None,
    base: Model = None,
    device: Device = "auto",
) -> int:
    """Write one expert, or all under a fixed gate, as a plain PEFT LoRA for any server that takes those.

    All ranks act, with strength 1, inside the router's trust region.
    """
    if (expert is None) == (gates is None):
        raise ConfigError("Name either --expert NAME or --gates JSON.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name a new folder.")
    chosen = {expert: 1.0} if expert is not None else _gates(gates or "")
    mounted, _ = _mounted(router, base, device)
    import torch

    from bem.experts.expert import write_lora
    from bem.experts.stack import fixed_updates

    names = [e.name for e in mounted.experts]
    _check_names(chosen, names)
    gate = torch.tensor([chosen.get(name, 0.0) for name in names], device=mounted.base.device)
    updates = fixed_updates(mounted.stacks, gate, mounted.router.region)
    write_lora(updates, out, None if base == "bem-tiny" else base)
    rank = max((len(update.v) for update in updates.values()), default=0)
    console = Console()
    size = f"{len(updates)} sites, rank {rank}"
    console.print(f"LoRA: [bold]{escape(str(out))}[/] ({size})", soft_wrap=True, highlight=False)
    shared = mounted.router_config.shared
    if shared and shared not in chosen:
        always = json.dumps({**chosen, shared: 1.0})
        note = f"{shared!r}, which the router lets act in every chunk, is not in it: --gates '{always}'"
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True, highlight=False)
    return 0


@route_app.command()
def distill(
    router: Annotated[
        Path, typer.Argument(help="Folder of a router, or of any adapter of ours: the teacher.")
    ],
    config: ConfigFile,
    out: Annotated[Path, typer.Option("--out", help="Folder for the student.")],
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the student at each site.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of its start and of the data order.")] = 0,
    data: DataFolder = None,
    settings: Settings = None,
    base: Base = None,
) -> int:
    """Fit one static LoRA to what a router does, on the training rows of a config.

    The config gives base, data and training. The same command resumes what was interrupted.
    """
    experiment = load(config, data, settings, base)
    console = Console()
    quiet()
    with Display(console) as display:
        before, after = _distil(experiment, router, out, rank, seed, display)
    change = f"{before:.4g} nats per answer token for the bare base, {after:.4g} for the student"
    console.print(f"KL to the teacher on held-out rows: {change}", soft_wrap=True, highlight=False)
    for what, name in (("Checkpoint", "adapter"), ("PEFT LoRA", "lora")):
        console.print(f"{what}: [bold]{escape(str(out / name))}[/]", soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------------ reading


def conversation(text: str) -> tuple[Example, bool]:
    """The text as an example, and whether it ends with an answer.

    Raises:
        DataError: nothing is said, or the turns do not alternate, the user first.
    """
    from bem.training.data import Example

    turns = _turns(text)
    for number, (role, words) in enumerate(turns):
        expected = ROLES[number % 2]
        if role != expected or not words:
            what = "says nothing" if role == expected else f"is the {role}'s, not the {expected}'s"
            raise DataError(f"Turn {number + 1} of the text {what}. Turns alternate, user first.")
    texts = [words for _, words in turns]
    *earlier, last = [texts[i : i + 2] for i in range(0, len(texts), 2)]
    history = tuple((user, assistant) for user, assistant in earlier)
    return Example("the text", last[0], tuple(last[1:]) or ("",), history=history), len(last) == 2


def _turns(text: str) -> list[tuple[str, str]]:
    """(role, words) of each turn; a text that begins with no role is one turn of the user."""
    lines = text.strip().splitlines()
    if not lines or not TURN.match(lines[0]):
        return [("user", text.strip())]
    turns: list[tuple[str, list[str]]] = []
    for line in lines:
        if begins := TURN.match(line):
            turns.append((begins[1].lower(), [line[begins.end() :]]))
        else:
            turns[-1][1].append(line)
    joined = [(role, "\n".join(lines).strip()) for role, lines in turns]
    return joined[:-1] if joined[-1] == ("assistant", "") else joined  # the answer is yet to come


def _read(mounted: Mounted, tokenizer: Any, row: Example, answered: bool, new_tokens: int) -> Read:
    """Route a conversation, and let the model answer it if `new_tokens` says so."""
    from bem.experiments.measuring.answers import context_length
    from bem.routing import explain as explaining
    from bem.training.answers import greedy_answers
    from bem.training.data import encode

    room = context_length(mounted.base) - new_tokens
    encoded = encode(row, tokenizer, room, with_answer=answered)
    ids, turns = list(encoded.input_ids), list(encoded.turn_starts)
    if not answered:
        turns[-1] = True  # here `generate` begins the answer's first chunk
    answer = None
    if new_tokens:
        generated = greedy_answers(mounted.model, tokenizer, [encoded], new_tokens)[0]
        answer = tokenizer.decode(generated, skip_special_tokens=True).strip()
        ids, turns = ids + generated, turns + [False] * len(generated)
    chunks = explaining.explain(mounted, ids, turns)
    texts = [tokenizer.decode(ids[chunk.start : chunk.stop]) for chunk in chunks]
    return Read(chunks, texts, answer)


def _mounted(folder: Path, base: str | None, device: str) -> tuple[Mounted, Any]:
    if not folder.is_dir() and str(folder) not in RELEASES:
        raise ConfigError(
            f"No router at {folder}, and no release of that name ({', '.join(RELEASES)}). `bem route fit` or "
            "`bem train router CONFIG` makes one."
        )
    quiet()
    from bem.bases.load import load_base
    from bem.routing.mount import load_router, saved_base

    dtype: Any = saved_base(folder).dtype.partition("+")[0]  # in another one it is another base
    model, tokenizer = load_base(_base_of(folder, base), device_of(device), dtype)
    return load_router(model, folder), tokenizer


def _base_of(router: Path, base: str | None) -> str:
    """The base that is named; else that of a release, or bem-tiny."""
    release = RELEASES.get(str(router))
    return base or (release.config.base if release else "bem-tiny")


def device_of(name: str) -> str:
    """The device that an option names.

    Raises:
        ConfigError: there is none of that name here.
    """
    import torch

    gpu = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if gpu else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not gpu):
        raise ConfigError(f"No device {name!r} here. There is: {'cpu, cuda' if gpu else 'cpu'}.")
    return name


# ----------------------------------------------------------------------------------------- exporting


def _gates(text: str) -> dict[str, float]:
    """Expert -> gate from JSON.

    Raises:
        ConfigError: not a JSON object of finite numbers.
    """
    try:
        gates = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--gates is not JSON: {error}. It looks like '{{\"json\": 1.0}}'."
        ) from None
    right = isinstance(gates, dict) and all(_is_number(gate) for gate in gates.values())
    if not gates or not right:
        raise ConfigError(f"--gates must give experts numbers, as '{{\"json\": 1.0}}', got {text}.")
    return {name: float(gate) for name, gate in gates.items()}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_names(chosen: Iterable[str], names: list[str]) -> None:
    for name in chosen:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"No expert {name!r}.{hint} Experts: {', '.join(names)}.")


# ---------------------------------------------------------------------------------------- distilling


def _distil(
    config: ExperimentConfig, folder: Path, out: Path, rank: int, seed: int, display: Display
) -> tuple[float, float]:
    """Fit and save the student; KL of the bare base and of the student to the teacher, held-out."""
    from bem.adapters.copies import without_adapter
    from bem.bases.load import load_base
    from bem.experiments.run import Event, device_of
    from bem.tasks.load import load_tasks, training_mixture, validation_mixture
    from bem.tasks.retrieval import with_evidence
    from bem.training.distill import distill, divergence

    display.show(Event("reading the data"))
    tasks = [with_evidence(task, None) for task in load_tasks(config.data)]
    held_out = [row for task in tasks for row in task.dev]
    display.show(Event("loading the base"))
    model, tokenizer = load_base(config.base, device_of(config), config.dtype)
    teacher = _teacher(model, folder)
    steps, length = config.training.steps, config.training.max_length
    made = distill(
        teacher,
        tokenizer,
        training_mixture(tasks),
        rank,
        config.training,
        out / "training",
        seed,
        lambda step: display.show(
            Event("distilling", done=step.step, total=steps, detail=f"KL {step.loss:.4f}")
        ),
        validation_mixture(tasks),
    )
    made.student.save(out / "adapter", made.training.data_hash, extra={"teacher": str(folder)})
    made.student.save_lora(out / "lora")
    display.show(Event("measuring"))
    sides = without_adapter(teacher), made.student.model
    size = config.eval_batch_size
    before, after = (divergence(teacher, m, tokenizer, held_out, length, size) for m in sides)
    return before, after


def _teacher(model: Any, folder: Path) -> Attached:
    """What the folder holds, a router or a single adapter, on its base."""
    import bem
    from bem.routing.mounted import is_router

    if not folder.is_dir():
        raise ConfigError(f"No router or adapter at {folder}.")
    return bem.load_router(model, folder) if is_router(folder) else bem.load(model, folder)
