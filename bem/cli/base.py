"""`bem base list | get | info`: models by name, and what is known of one."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bem.cli.console import Terminal

base_app = typer.Typer(
    help="Models: by name, fetched once, used without network.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="A name of `list`, a folder, a .gguf file, or a hub id.")]


@base_app.command("list")
def show_all() -> int:
    """Show the models that have a name here."""
    from bem.bases.cache import cache_folder, is_here
    from bem.bases.named import NAMED, Package

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "licence", "download", "here", "what it is"):
        table.add_column(column, no_wrap=column != "what it is")
    for model in NAMED.values():
        size = f"{model.source.megabytes} MB" if isinstance(model.source, Package) else "-"
        here = "yes" if is_here(model) else "no"
        table.add_row(model.name, model.kind, model.licence, size, here, model.about)
    console = Terminal()
    console.print(table)
    console.print(Text(f"Kept in {cache_folder()}; any folder, .gguf file or hub id works too."))
    return 0


@base_app.command("get")
def get_one(name: Name) -> int:
    """Fetch a model once; from then on it is used without network."""
    from bem.bases.load import fetch

    folder = fetch(name)
    Terminal().print(Text(f"{name}: {folder}"), soft_wrap=True)
    return 0


@base_app.command("info")
def show_one(name: Name) -> int:
    """Show what a base is made of; it is fetched if it is not here."""
    from bem.bases.load import load_base

    model, tokenizer = load_base(name, dtype="auto")
    table = Table(box=None, pad_edge=False, show_header=False)
    for what, value in _facts(name, model, tokenizer):
        table.add_row(Text(what, style="bold"), Text(value))
    Terminal().print(table)
    return 0


def _facts(name: str, model: Any, tokenizer: Any) -> list[tuple[str, str]]:
    from bem.bases.named import NAMED

    config, known = model.config.get_text_config(), NAMED.get(name)
    tied = ", tied to the output" if config.tie_word_embeddings else ""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    template = getattr(tokenizer, "chat_template", None)
    facts = [
        ("about", f"{known.about}; {known.licence}" if known else type(model).__name__),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,} in {model.dtype}"),
        ("layers", f"{config.num_hidden_layers} of width {config.hidden_size}"),
        ("heads", f"{config.num_attention_heads}, {heads} for keys and values"),
        ("vocabulary", f"{config.vocab_size:,}{tied}"),
        ("positions", f"{config.max_position_embeddings:,}"),
        ("tokens", f"end {tokenizer.eos_token!r}, padding {tokenizer.pad_token!r}"),
        ("chat template", "yes" if template else "none"),
    ]
    return facts
