"""`bem demo`: what this product does, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bem.cli.conversation import show_routed
from bem.cli.display import Display, quiet
from bem.cli.options import command
from bem.cli.verdict import show_decision
from bem.errors import BaseError
from bem.report import words

Rows = Annotated[
    int, typer.Option("--rows", min=4, help="Held-out conversations of each of five tasks.")
]


def demo(
    output: Annotated[str, typer.Option("--output", help="Folder of the runs.")] = "runs",
    rows: Rows = 10,
) -> int:
    """Train and judge a small comparison, then judge the shipped router on a real base.

    The real base is fetched once (93 MB); where that is not possible the first half is done alone.
    """
    from bem.experiments import demos

    console = Console()
    quiet()
    _title(console, 1, "two candidates for a tiny base, trained and judged on this machine")
    reports = [_run(console, demos.tiny(output))]
    _title(console, 2, "a released router on SmolLM2-135M, against one LoRA of the same size")
    if _base_is_there(console):
        config = demos.smol(output, rows)
        reports.append(_run(console, config))
        show_routed(console, reports[-1].parent, config)
        _show_card(console)
    console.print()
    for report in reports:
        console.print(f"Report: [bold]{escape(str(report))}[/]", soft_wrap=True)
    return 0


def _title(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]", highlight=False)


def _run(console: Console, config) -> Path:
    from bem.experiments import run as runner

    with Display(console) as display:
        result = runner.run(config, display.show, command=command())
    headline = words.headline(result.verdicts, config.baseline.name)
    console.print(f"\n[bold]{escape(headline)}[/]", highlight=False)
    for verdict in result.verdicts.values():
        show_decision(console, verdict)
    return result.report


def _base_is_there(console: Console) -> bool:
    """Fetch the release's base unless it is here; say so if it cannot be fetched."""
    from bem.bases.load import find_base
    from bem.experiments.demos import RELEASE
    from bem.releases.named import RELEASES

    base = RELEASES[RELEASE].base
    try:
        find_base(base)
    except BaseError as error:
        console.print(f"This half is left out: {base} cannot be fetched here.", highlight=False)
        console.print(escape(str(error)), highlight=False, soft_wrap=True)
        return False
    return True


def _show_card(console: Console) -> None:
    """What the whole run found, of which this was a small repetition."""
    from bem.experiments.demos import RELEASE
    from bem.releases.named import RELEASES

    card = (RELEASES[RELEASE].folder / "README.md").read_text(encoding="utf-8")
    verdict = card.split("## Verdict", 1)[1].split("## ", 1)[0].split("|", 1)[0].strip()
    console.print("\nThe run that the release comes from:", highlight=False)
    console.print(escape(verdict.replace("**", "")), highlight=False)
