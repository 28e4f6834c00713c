"""`bem doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from typing import Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bem.runs.machine import cpu_flags, cpu_name, installed, usable_cores

NEEDED_DISK_GIB = 1.0
"""What a run of the shipped configs writes, with room to spare."""

EXTRAS = {
    "datasets": ("datasets", "Hugging Face datasets as tasks"),
    "gguf": ("gguf", ".gguf files as bases (smollm2-135m is one)"),
    "sentence_transformers": ("retrieval", "encoders and rerankers from sentence-transformers"),
    "faiss": ("retrieval", "dense search in 100,000 passages and more"),
    "fastapi": ("serve", "bem serve"),
    "tensorboard": ("tensorboard", "training curves in TensorBoard"),
    "arch": ("benchmarks", "benchmarks/bca.py against arch"),
    "PIL": ("vision", "pictures: bem serve --vision, bem route fit --vision"),
    "pytest": ("dev", "make test"),
}


class Check(NamedTuple):
    state: Literal["ok", "note", "missing"]
    what: str
    found: str
    remedy: str = ""


def doctor() -> int:
    """Say what this machine can do, what is missing, and how to install it."""
    checks = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    marks = {"ok": "[green]ok[/]", "note": "[yellow]--[/]", "missing": "[red]missing[/]"}
    for check in checks:
        remedy = f"\n[dim]-> {escape(check.remedy)}[/]" if check.remedy else ""
        what = f"[bold]{escape(check.what)}[/]"
        table.add_row(marks[check.state], what, escape(check.found) + remedy)
    console = Console()
    console.print(table)
    missing = [check for check in checks if check.state == "missing"]
    if missing:
        console.print(f"\n[red]{len(missing)} thing(s) missing[/]; each says what to do.")
        return 3
    console.print("\n[green]Ready.[/] Try `bem demo`.")
    return 0


def examine() -> list[Check]:
    """Every check, in the order in which it is shown."""
    checks = [
        Check("ok", "python", f"{platform.python_version()} on {platform.platform()}"),
        Check("ok", "cpu", f"{cpu_name()}, {usable_cores()} core(s) usable"),
        _disk(),
        *_libraries(),
    ]
    if all(check.state == "ok" for check in checks if check.what in ("torch", "transformers")):
        checks += [*_torch(), _base(), _detector(), _probe(), _tower()]
    return [*checks, *_extras()]


def _disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    if free < NEEDED_DISK_GIB:
        return Check("missing", "disk", f"{free:.1f} GiB free here", "free some space: runs/ ?")
    return Check("ok", "disk", f"{free:.0f} GiB free here")


def _libraries() -> list[Check]:
    checks = []
    needed = ("torch", "transformers", "peft", "scipy", "sacrebleu", "bm25s", "matplotlib")
    for name in needed:
        found = installed(name)
        if found:
            checks.append(Check("ok", name, found))
        else:
            checks.append(Check("missing", name, "not installed", "pip install -e ."))
    return checks


def _torch() -> list[Check]:
    import torch

    checks = [Check("ok", "threads", f"torch uses {torch.get_num_threads()}")]
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        checks.append(Check("ok", "gpu", ", ".join(sorted(names))))
        fast = torch.cuda.is_bf16_supported()
    else:
        checks.append(Check("note", "gpu", "none: everything runs on the CPU"))
        fast = "amx_bf16" in cpu_flags() or "avx512_bf16" in cpu_flags()
    found = "supported in hardware" if fast else "emulated here: keep training.precision=float32"
    return [*checks, Check("ok" if fast else "note", "bf16", found)]


def _base() -> Check:
    from bem.bases.load import load_base
    from bem.errors import BemError

    try:
        model, tokenizer = load_base("bem-tiny")
    except BemError as error:
        return Check("missing", "bem-tiny", str(error), "reinstall, or use --base FOLDER_OR_HUB_ID")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return Check("ok", "bem-tiny", f"{size:.1f} M parameters, {len(tokenizer)} tokens")


def _detector() -> Check:
    from bem.errors import BemError
    from bem.safety.detector import ViolationDetector
    from bem.safety.personal import KINDS

    try:
        categories = ViolationDetector().weights.categories
    except BemError as error:
        return Check("missing", "violation detector", str(error), "reinstall")
    limits = ", ".join(f"{c.name} above {c.limit:.2f}" for c in categories)
    kinds = ", ".join(dict.fromkeys(kind.partition(" ")[0] for kind in KINDS))
    return Check("ok", "violation detector", f"flags {limits}; finds {kinds}")


def _tower() -> Check:
    from bem.errors import BemError

    try:
        from bem.vision.load import load_tower

        tower = load_tower("tiny")
    except (BemError, ImportError) as error:
        return Check(
            "missing", "vision tower", str(error), "reinstall, or pip install 'bem[vision]'"
        )
    named = f"{tower.encoder_id}: {len(tower.concepts)} concepts; CLIP, SigLIP: from local folders"
    return Check("ok", "vision tower", named)


def _probe() -> Check:
    from bem.errors import BemError
    from bem.safety.probe import read_probe

    try:
        probe = read_probe()
    except BemError as error:
        return Check("missing", "hidden-state probe", str(error), "reinstall")
    return Check("ok", "hidden-state probe", f"for {probe.about['base']}, block {probe.block}")


def _extras() -> list[Check]:
    checks = []
    for library, (extra, purpose) in EXTRAS.items():
        if importlib.util.find_spec(library):
            checks.append(Check("ok", f"[{extra}]", f"{library}: {purpose}"))
        else:
            remedy = f"pip install -e '.[{extra}]'"
            checks.append(Check("note", f"[{extra}]", f"no {library}: no {purpose}", remedy))
    return checks
