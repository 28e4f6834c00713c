"""`bem index build | search | evidence | info`: folders of searchable passages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bem.config import EVIDENCE_FEATURES
from bem.errors import ConfigError

if TYPE_CHECKING:
    from bem.evidence.encoders import Encoder
    from bem.evidence.index import Hit
    from bem.evidence.retriever import Evidence
    from bem.evidence.storage import Manifest

SHOWN_CHARACTERS = 200

index_app = typer.Typer(
    help="Build, search and inspect an index of passages.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="Folder of an index.")]


@index_app.command()
def build(
    corpus: Annotated[Path, typer.Argument(help='JSONL (or .gz) rows {"id", "title", "text"}.')],
    out: Annotated[Path, typer.Option("--out", help="Folder for the index.")],
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            help="What makes vectors. none: BM25 alone; minilm, or any sentence-transformers folder or hub id; "
            "base: the base model's own states, which find less than BM25.",
        ),
    ] = "none",
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="With `--encoder base`, whose states: a name of `bem base list`, a folder, a hub id. "
            "[default: bem-tiny]",
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Look at every vector, however many there are.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Delete vectors that another encoder made there.")
    ] = False,
) -> int:
    """Index a corpus; the same command resumes what was interrupted.

    Whoever queries the folder meanwhile gets what it held before.
    """
    from bem.evidence import index as indexes
    from bem.evidence.passages import read_corpus
    from bem.evidence.storage import read_manifest

    passages = read_corpus(corpus)
    made_by = _encoder(encoder, base)
    console = Console()
    with _Display(console) as display:
        indexes.build(passages, out, made_by, display.show, exact, force)
    _show(console, out, read_manifest(out))
    return 0


@index_app.command()
def search(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Passages to show.")] = 5,
    method: Annotated[str, typer.Option("--method", help="bm25, dense or hybrid.")] = "bm25",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per passage.")] = False,
) -> int:
    """Show the passages that an index finds for a query."""
    from bem.evidence import index as indexes

    methods = get_args(indexes.Method)
    if method not in methods:
        raise ConfigError(f"No search method {method!r}; there are {', '.join(methods)}.")
    index = indexes.open_index(folder)
    if method != "bm25":
        _quiet()
    hits = index.search([query], k, method)[0]  # pyright: ignore[reportArgumentType]
    if as_json:
        for hit in hits:
            print(json.dumps(_plain(hit), ensure_ascii=False))
        return 0
    _list(Console(), hits, method)
    return 0


@index_app.command()
def evidence(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="The question.")],
    shown: Annotated[int, typer.Option("--shown", min=1, help="Passages for the prompt.")] = 3,
    candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Passages that the reranker judges.")
    ] = 20,
    reranker: Annotated[
        str, typer.Option("--reranker", help="tiny, or a sentence-transformers CrossEncoder.")
    ] = "tiny",
    timeout_ms: Annotated[
        float | None, typer.Option("--timeout-ms", min=0.1, help="Time from question to evidence.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Passages and record as JSON.")] = False,
) -> int:
    """Show what a model would be given and told for a question: passages, and how good they are."""
    from bem.evidence.index import open_index
    from bem.evidence.rerank import load_reranker
    from bem.evidence.retriever import Retriever

    _quiet()
    judge = load_reranker(reranker)
    most = max(candidates, shown)
    evidence = Retriever(
        open_index(folder), judge, candidates=most, shown=shown, timeout_ms=timeout_ms
    ).retrieve(query)
    if as_json:
        passages = [{"id": p.id, "title": p.title, "text": p.text} for p in evidence.passages]
        record = {**vars(evidence.record), "features": evidence.record.features()}
        print(json.dumps({"passages": passages, "record": record}, ensure_ascii=False))
        return 0
    _tell(Console(), evidence)
    return 0


@index_app.command()
def info(folder: Folder) -> int:
    """Check every file of an index against its manifest, and say what it holds."""
    from bem.evidence.storage import check_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    console = Console()
    _show(console, folder, manifest)
    console.print(f"[green]ok[/] {len(manifest.files)} files are as the manifest says")
    return 0


def _encoder(name: str, base: str | None) -> Encoder | None:
    if base is not None and name != "base":
        raise ConfigError(
            f"--base {base} names whose states become vectors, but --encoder is {name}. Add `--encoder base`, or "
            "leave --base out."
        )
    if name == "none":
        return None
    from bem.evidence.encoders import OWN, load_encoder

    _quiet()
    return load_encoder(f"{OWN}{base or 'bem-tiny'}" if name == "base" else name)


def _quiet() -> None:
    """No bars for loading a few megabytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _plain(hit: Hit) -> dict[str, object]:
    passage = hit.passage
    return {
        "id": passage.id,
        "score": hit.score,
        "lexical": hit.lexical,
        "title": passage.title,
        "text": passage.text,
    }


def _list(console: Console, hits: list[Hit], method: str) -> None:
    if not hits:
        console.print("Nothing found: no passage shares a word with the query.")
    for rank, hit in enumerate(hits, 1):
        line = f"[bold]{rank}[/] [cyan]{escape(hit.passage.id)}[/] {method} {hit.score:.4g}"
        if method != "bm25":
            line += f", bm25 {hit.lexical:.4g}"
        console.print(line, soft_wrap=True, highlight=False)
        console.print(escape(_short(hit.passage.shown)), highlight=False)


def _tell(console: Console, evidence: Evidence) -> None:
    record = evidence.record
    if not evidence.passages:
        console.print("Nothing found: no passage shares a word with the question.")
    scores = record.scores or (None,) * len(evidence.passages)
    for passage, score in zip(evidence.passages, scores, strict=False):
        relevance = "" if score is None else f" relevant with probability {score:.2f}"
        console.print(f"[cyan]{escape(passage.id)}[/]{relevance}", soft_wrap=True, highlight=False)
        console.print(escape(_short(passage.shown)), highlight=False)
    if record.timed_out:
        console.print("[yellow]Time was up before the reranker was done:[/] order of the search.")
    features = zip(EVIDENCE_FEATURES, record.features(), strict=True)
    told = "  ".join(f"{name} {value:.2f}" for name, value in features)
    console.print(f"\n[bold]told to the model:[/] {told}", highlight=False, soft_wrap=True)
    console.print(f"{1000 * record.seconds:.1f} ms", highlight=False)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _show(console: Console, folder: Path, manifest: Manifest) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a long path is worth its lines
    vectors = "none: BM25 alone"
    if manifest.encoder is not None:
        encoder = manifest.encoder
        vectors = f"{encoder.name}, {encoder.dimension} dimensions, search {manifest.search}"
    size = sum(facts["bytes"] for facts in manifest.files.values()) / 2**20
    copies = f" ({manifest.copies:,} copies left out)" if manifest.copies else ""
    for name, value in {
        "index": str(folder),
        "passages": f"{manifest.passages:,}{copies}",
        "vectors": vectors,
        "size": f"{size:,.1f} MiB",
        "corpus": manifest.corpus_hash[:12],
    }.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    console.print(table)


class _Display:
    """A bar per stage of a build on a terminal; elsewhere the result alone."""

    def __init__(self, console: Console):
        self._bars: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done)  # pyright: ignore[reportArgumentType]
