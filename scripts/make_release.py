"""Make a release out of a finished run: static LoRA, router with its experts, held-out rows, card.

    python scripts/make_release.py runs/smollm2 bem-smol --rows 40

Takes the baseline and the arm `ar1` of the run's first seed. LoRA weights are rounded to bfloat16, which is what
computes on a bfloat16 base anyway; that nothing changes is checked on the rows before anything is written. The
card's numbers are those of the run's verdict and records.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bem  # noqa: E402
from bem.errors import CheckpointError  # noqa: E402
from bem.experiments.inputs import RunInputs, load_inputs  # noqa: E402
from bem.files import read_json, sha256_file, write_bytes, write_json, write_text  # noqa: E402
from bem.releases.named import RELEASES, Release  # noqa: E402
from bem.report import words  # noqa: E402
from bem.runs.folder import RunFolder, read_jsonl  # noqa: E402
from bem.runs.verdicts import read_verdicts  # noqa: E402
from bem.stats.files import load as load_scores  # noqa: E402
from bem.training.data import collate, encode  # noqa: E402

LORA = "adapter_model.safetensors"
SOURCES = {
    "qa_babi": "bAbI tasks v1.2 (Facebook), CC BY 3.0, by way of YerevaNN/Dynamic-memory-networks-in-Theano",
    "rnnlg_styles": "RNNLG (shawnwun/RNNLG), Apache-2.0",
    "snips_forms": "SNIPS custom intent engines (sonos/nlu-benchmark), CC0 1.0",
    "sql_wikisql": "WikiSQL (Salesforce) by way of jkkummerfeld/text2sql-data, BSD-3-Clause",
    "cmd_tldr": "tldr-pages, CC BY 4.0",
}
"""Source and licence of each task's rows."""


def rounded(folder: Path, load: Any, into: Path) -> None:
    """Save what a checkpoint holds with its LoRA weights rounded to bfloat16, in files of bfloat16."""
    attached = load(folder)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "policy" not in name:
                parameter.copy_(parameter.bfloat16().to(parameter.dtype))
    manifest = read_json(folder / "manifest.json", CheckpointError)
    attached.save(into, manifest["data"], extra=manifest["extra"])
    attached.detach()
    manifest = read_json(into / "manifest.json", CheckpointError)
    for path in into.rglob(LORA):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path, metadata)
        manifest["files"][path.relative_to(into).as_posix()] = sha256_file(path)
    write_json(into / "manifest.json", manifest, indent=2)


def largest_difference(
    inputs: RunInputs, load: Any, one: Path, other: Path, rows: int = 8
) -> float:
    """Between the logits of two checkpoints on held-out conversations."""
    examples = [row for task in inputs.tasks for row in task.dev[: -(-rows // len(inputs.tasks))]]
    batch = collate([encode(row, inputs.tokenizer, 512) for row in examples], inputs.pad_id)
    batch.pop("labels")
    logits = []
    for folder in (one, other):
        attached = load(folder)
        with torch.inference_mode():
            logits.append(attached.model(**batch).logits)
        attached.detach()
    return float((logits[0] - logits[1]).abs().max())


def write_rows(release: Release, inputs: RunInputs, rows: int) -> int:
    """The first `rows` held-out conversations of every task; how many in all."""
    written = 0
    for task in inputs.tasks:
        chosen = task.dev[:rows]
        lines = [json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in chosen]
        content = gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0)
        write_bytes(release.held_out(task.name), content)
        written += len(chosen)
    return written


def training_of(folder: RunFolder, seed: int, baseline: str) -> dict[str, dict[str, float]]:
    """Steps, tokens, seconds and rate of both trainings, from their logs and manifests."""
    logs = {
        "static LoRA": (
            folder.cell(baseline, seed).metrics,
            folder.cell(baseline, seed).checkpoint,
        ),
        "experts": (
            folder.routing(seed) / "experts-training/metrics.jsonl",
            folder.routing(seed) / "experts",
        ),
    }
    facts = {}
    for name, (log, checkpoint) in logs.items():
        steps = read_jsonl(log)
        extra = read_json(checkpoint / "manifest.json", CheckpointError)["extra"]
        facts[name] = {
            "steps": len(steps),
            "step kept": extra["step"],
            "tokens": sum(step["tokens"] for step in steps),
            "hours": round(sum(step["seconds"] for step in steps) / 3600, 2),
            "learning rate": extra["learning_rate"],
        }
    return facts


def card(
    release: Release, folder: RunFolder, rows: int, training: dict[str, dict[str, float]]
) -> str:
    """The README of the release."""
    config, verdicts = folder.config, read_verdicts(folder.verdicts).judgement
    verdict = verdicts.candidates["ar1"]
    base = load_scores(folder.cell(config.baseline.name, config.seeds[0]).measurement)
    sources = len(set(base.clusters or ()))
    table = ["| | " + " | ".join(next(iter(training.values()))) + " |", "|---|" + "---:|" * 5]
    table += [
        f"| {n} | " + " | ".join(f"{v:,}" for v in f.values()) + " |" for n, f in training.items()
    ]
    assert config.routing is not None
    experts = [
        f"- `{name}`: {', '.join(skills)}" for name, skills in config.routing.experts.items()
    ]
    checks = [
        f"| {gate.name} | {gate.value} | {gate.limit} | {gate.state} |"
        for gate in words.gates(verdict)
        if not gate.name.startswith(("slice.", "regression."))
    ]
    lines = [
        "---",
        f"base_model: {release.base}",
        "library_name: peft",
        "license: other # see Data",
        "tags: [bem, lora, routing]",
        "---",
        f"# {release.name}: {release.about}",
        "",
        f"For `{release.base}` in bfloat16. `router/`: {len(experts)} LoRAs of rank {config.routing.expert_rank}, one of rank "
        f"{config.routing.shared_rank} that always acts, and the router that chooses between them in every chunk of up to 64 "
        "tokens; each is a plain PEFT LoRA. `static/`: one LoRA of as many parameters, trained on the same rows in the same "
        "order.",
        "",
        "```python",
        "import bem",
        "",
        f'model, tokenizer = bem.load_base("{release.base}", dtype="bfloat16")',
        f'mounted = bem.load_router(model, "{release.name}")  # bem.load(model, "{release.name}"): the static LoRA',
        "```",
        "",
        *experts,
        "",
        "## Verdict",
        "",
        f"**ar1 against the static LoRA: {verdict.decision}.** {words.sentence(verdict)}",
        "",
        f"On {base.n} held-out conversations from {sources} sources, {len(config.seeds)} seed(s). Whole report, with every "
        f"gate, slice and control: benchmarks/results/{config.name}.md in the project's repository. "
        f"{words.gate_changes(config.gates)}",
        "",
        "| gate | value | limit | |",
        "|---|---:|---:|---|",
        *checks,
        "",
        "## Training",
        "",
        *table,
        "",
        "On two CPU cores. The learning rate was chosen among "
        f"{', '.join(f'{rate:g}' for rate in config.tuning.rates) if config.tuning else '-'} on rows that are neither trained "
        "on nor reported, for both with the same budget; so was the step to stop at.",
        "",
        "## Data",
        "",
        "Conversations whose turns switch between the skills, made from",
        "",
        *(f"- {task}: {SOURCES[task]}" for task in _tasks(config)),
        "",
        f"`held-out/` holds {rows} conversations of the held-out side; its rows keep the licences above. The weights are "
        "released under Apache-2.0, like the base.",
        "",
    ]
    return "\n".join(lines)


def _tasks(config: Any) -> list[str]:
    return [task if isinstance(task, str) else task.name for task in config.data.tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=RELEASES)
    parser.add_argument("--rows", type=int, default=40, help="held-out rows of each task")
    args = parser.parse_args()
    folder, release = RunFolder(args.run), RELEASES[args.name]
    config = folder.config
    seed, baseline = config.seeds[0], config.baseline.name
    inputs = load_inputs(config, folder, lambda event: None)
    loads = {
        "static": lambda path: bem.load(inputs.model, path),
        "router": lambda path: bem.load_router(inputs.model, path),
    }
    for kind, arm, into in (
        ("static", baseline, release.static),
        ("router", "ar1", release.router),
    ):
        source = folder.cell(arm, seed).checkpoint
        rounded(source, loads[kind], into)
        print(
            kind,
            "largest difference of a logit:",
            largest_difference(inputs, loads[kind], source, into),
        )
    rows = write_rows(release, inputs, args.rows)
    write_text(
        release.folder / "README.md",
        card(release, folder, rows, training_of(folder, seed, baseline)),
    )
    size = sum(file.stat().st_size for file in release.folder.rglob("*") if file.is_file())
    print(f"{release.folder}: {size / 1e6:.1f} MB, {rows} rows")


if __name__ == "__main__":
    main()
