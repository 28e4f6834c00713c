"""A routed conversation on the terminal, chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bem.config import ExperimentConfig
    from bem.routing.explain import Explained

SHOWN_CHARACTERS = 60
BAR = 8  # characters of a probability of 1
TOP = 3  # experts whose probability is shown


def show_routed(console: Console, run: Path, config: ExperimentConfig) -> None:
    """The first conversation that the report shows, if a router of ours took part in the run."""
    from bem.config.arm import ROUTERS
    from bem.routing.explain import Explained
    from bem.runs.folder import RunFolder

    arms = [arm.name for route in ROUTERS for arm in config.arms if arm.route == route]
    facts = [RunFolder(run).cell(arm, config.seeds[0]).path / "route.json" for arm in arms]
    known = next((path for path in facts if path.is_file()), None)
    if known is None or config.routing is None:
        return
    shown = json.loads(known.read_text(encoding="utf-8"))["conversations"]["shown"][0]
    texts = [chunk.pop("text") for chunk in shown["chunks"]]
    chunks = [Explained(**chunk) for chunk in shown["chunks"]]
    console.print(
        f"\nA held-out conversation under {arms[0]}, skills {', '.join(shown['skills'])}:"
    )
    console.print(table_of(chunks, texts, config.routing.router.chunk_size))


def table_of(chunks: Sequence[Explained], texts: Sequence[str], chunk_size: int) -> Table:
    """One line per chunk: the action, what the policy thinks, why, and the beginning of the text."""
    caption = f"Chunks of up to {chunk_size} tokens; > begins an answer."
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("", "expert", "rank", "strength", "what the policy thinks"):
        table.add_column(name, no_wrap=True)
    table.add_column("why", ratio=1)
    table.add_column("text", ratio=1)
    for chunk, text in zip(chunks, texts, strict=True):
        turn = ">" if chunk.turn else " "
        strength = f"{chunk.strength:g}" + (f" (-{chunk.fade:.0%})" if chunk.fade else "")
        table.add_row(
            f"{turn}{chunk.chunk}",
            f"[bold]{escape(chunk.expert)}[/]",
            str(chunk.rank) if chunk.expert != "base" else "",
            strength if chunk.expert != "base" else "",
            _bars(chunk.probabilities),
            escape(chunk.why),
            f"[dim]{escape(_short(text))}[/]",
        )
    return table


def _bars(probabilities: dict[str, float]) -> str:
    top = sorted(probabilities.items(), key=lambda item: -item[1])[:TOP]
    width = max(len(name) for name, _ in top)
    lines = (f"{n:<{width}} {'█' * round(BAR * p):<{BAR}} {p:.2f}" for n, p in top)
    return escape("\n".join(lines))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
