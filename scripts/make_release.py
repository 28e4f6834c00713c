"""Make a release out of a finished run: static LoRA, router with its experts, held-out rows, card.

    python scripts/make_release.py runs/smollm2 bem-smol --data DIR_OF_THE_PUBLIC_SETS --router fitted
    python scripts/make_release.py runs/mine mine --out somewhere/mine

Takes the baseline (a static LoRA) and one arm under a router, both of the run's first seed. LoRA weights are
rounded to the base's dtype, in which they compute anyway, and how far that moves the logits of held-out rows stands
in the card. Every number of the card is one of the run's verdict and records, whatever that verdict is.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bem  # noqa: E402
from bem.bases.named import NAMED  # noqa: E402
from bem.config import ExperimentConfig  # noqa: E402
from bem.config.arm import ROUTERS  # noqa: E402
from bem.errors import CheckpointError, ConfigError  # noqa: E402
from bem.experiments.inputs import RunInputs, load_inputs  # noqa: E402
from bem.files import read_json, sha256_file, whole_folder, write_bytes, write_json, write_text  # noqa: E402
from bem.releases.named import RELEASES, Shipped  # noqa: E402
from bem.report import words  # noqa: E402
from bem.runs.folder import NOT_COMPARED, RunFolder, read_jsonl  # noqa: E402
from bem.runs.verdicts import read_verdicts  # noqa: E402
from bem.stats.files import load as load_scores  # noqa: E402
from bem.tasks.embedded import EMBEDDED  # noqa: E402
from bem.training.data import collate, encode  # noqa: E402

MOST_MB = 16.0
"""Of a release that ships with the package."""
LORA = "adapter_model.safetensors"
SOURCES = {
    "qa_babi": "bAbI tasks v1.2 (Facebook), CC BY 3.0, by way of YerevaNN/Dynamic-memory-networks-in-Theano",
    "rnnlg_styles": "RNNLG (shawnwun/RNNLG), Apache-2.0",
    "snips_forms": "SNIPS custom intent engines (sonos/nlu-benchmark), CC0 1.0",
    "sql_wikisql": "WikiSQL (Salesforce) by way of jkkummerfeld/text2sql-data, BSD-3-Clause",
    "cmd_tldr": "tldr-pages, CC BY 4.0",
    **dict.fromkeys(EMBEDDED, "sources of the Python standard library, PSF-2.0"),
}
"""Source and licence of each task's rows."""
STATIC, ROUTER = "the static LoRA", "the router"
Load = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Part:
    """One of the two checkpoints of a release."""

    name: str
    arm: str
    source: Path
    load: Load
    training: Path
    """metrics.jsonl of the training that made it."""
    trained: Path
    """Checkpoint whose manifest says at which rate and up to which step."""


def parts_of(
    folder: RunFolder, config: ExperimentConfig, router: str | None = None
) -> dict[str, Part]:
    """`static` and `router`.

    Args:
        router: arm whose router it is; None: the only one.
    Raises:
        ConfigError: the run has no such arms, or its base has no name that others could load it by.
    """
    seed, baseline = config.seeds[0], config.baseline
    routed = [a.name for a in config.arms if a.route in ROUTERS and a.role == "candidate"]
    routed = [name for name in routed if router in (None, name)]
    if not baseline.is_trained or config.variant_of(baseline) != "s0" or len(routed) != 1:
        raise ConfigError(
            f"{folder.path}: a release needs a trained static LoRA (s0) as the baseline and one candidate under "
            f"a router ({', '.join(ROUTERS)}; --router ARM), found {baseline.name} and {', '.join(routed) or 'none'}."
        )
    if not config.trains_experts:
        raise ConfigError(f"{folder.path}: its experts were not trained here: release that run.")
    if config.base not in NAMED:
        raise ConfigError(f"{config.base} is no base of `bem base list`: nobody could load it.")
    if unknown := [task for task in tasks_of(config) if task not in SOURCES]:
        raise ConfigError(f"{unknown[0]} has no source and licence in SOURCES of {__file__}.")
    static, routing = folder.cell(baseline.name, seed), folder.routing(seed)
    checkpoint = folder.cell(routed[0], seed).checkpoint
    return {
        "static": Part(
            "static LoRA", baseline.name, static.checkpoint, bem.load, static.metrics, static.checkpoint
        ),
        "router": Part(
            "experts", routed[0], checkpoint, bem.load_router,
            routing / "experts-training/metrics.jsonl", routing / "experts",
        ),
    }  # fmt: skip


def tasks_of(config: ExperimentConfig) -> list[str]:
    return [task if isinstance(task, str) else task.name for task in config.data.tasks]


# --- what is written ------------------------------------------------------------------------------


def write_rounded(model: Any, part: Part, into: Path) -> None:
    """Save what a checkpoint holds with its LoRA weights rounded to the base's dtype, in files of it."""
    dtype = next(model.parameters()).dtype
    attached = part.load(model, part.source)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "policy" not in name:
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    manifest = read_json(part.source / "manifest.json", CheckpointError)
    attached.save(into, manifest["data"], extra=manifest["extra"])
    attached.detach()
    manifest = read_json(into / "manifest.json", CheckpointError)
    for path in into.rglob(LORA):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path, metadata)
        manifest["files"][path.relative_to(into).as_posix()] = sha256_file(path)
    write_json(into / "manifest.json", manifest, indent=2)


def moved(inputs: RunInputs, part: Part, other: Path, rows: int = 8) -> float:
    """Largest difference of a logit between a checkpoint and its rounded copy, on held-out rows."""
    examples = [row for task in inputs.tasks for row in task.dev[: -(-rows // len(inputs.tasks))]]
    length = inputs.config.training.max_length
    batch = collate([encode(row, inputs.tokenizer, length) for row in examples], inputs.pad_id)
    batch.pop("labels")
    logits = []
    for folder in (part.source, other):
        attached = part.load(inputs.model, folder)
        with torch.inference_mode():
            logits.append(attached.model(**batch).logits.float())
        attached.detach()
    return float((logits[0] - logits[1]).abs().max())


def write_rows(release: Shipped, inputs: RunInputs, rows: int) -> int:
    """The first `rows` held-out conversations of every task; how many in all."""
    written = 0
    for task in inputs.tasks:
        chosen = task.dev[:rows]
        lines = [json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in chosen]
        content = gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0)
        path = release.held_out(task.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
        written += len(chosen)
    return written


def write_config(release: Shipped, config: ExperimentConfig) -> None:
    """The run's config without what says where it ran."""
    manifest = read_json(release.router / "manifest.json", CheckpointError)
    experts = {
        expert["name"]: expert["about"].split(", ")
        for expert in manifest["experts"]
        if expert["name"] != manifest["router"]["shared"]
    }
    values = config.model_dump(mode="json", exclude=NOT_COMPARED - {"data.root"})
    values["data"].pop("root")
    values["routing"]["experts"] = experts  # the config may leave them to the tasks
    write_text(release.config_file, yaml.safe_dump(values, sort_keys=False))


# --- the card -------------------------------------------------------------------------------------


def training_of(part: Part) -> dict[str, Any]:
    """Steps, tokens, seconds and rate of a training, from its log and manifest."""
    steps = read_jsonl(part.training)
    extra = read_json(part.trained / "manifest.json", CheckpointError)["extra"]
    return {
        "steps": len(steps),
        "step kept": extra["step"],
        "tokens": sum(step["tokens"] for step in steps),
        "hours": round(sum(step["seconds"] for step in steps) / 3600, 2),
        "learning rate": f"{extra['learning_rate']:g}",
    }


CARD = """\
---
base_model: {base}
library_name: peft
license: other # see Data
tags: [bem, lora, routing]
---
# {name}

{about}

For `{base}` in {dtype}. `router/`: {experts}, and the router that chooses between them in every chunk of up to
{chunk} tokens; each expert is a plain PEFT LoRA. `static/`: one LoRA of rank {rank}, trained on the same rows. Router and experts
together have {parameters} parameters against it.

```python
import bem

model, tokenizer = bem.load_base("{base}", dtype="{dtype}")
mounted = bem.load_router(model, "{name}")  # or bem.load(model, "{name}"): the static LoRA
```

| expert | trained on |
|---|---|
{skills}

## Verdict

**{headline}.** {router} was judged {decision}. {sentence}

On {n} held-out conversations from {sources} sources, {seeds} seed(s). {changes}

| gate | value | limit | |
|---|---:|---:|---|
{gates}

{reported}

## Training

| | {columns} |
|---|{rules}
{training}

{how} On {cores} cores ({processor}).

LoRA weights are rounded to {dtype}: on held-out rows that moves a logit by at most {moved}.

## Data

{conversations}, made from

{data}

`held-out/` holds {rows} of the held-out rows that the verdict rests on; they keep the licences above. The weights are
released under Apache-2.0, like the base.
"""


def card(
    release: Shipped, folder: RunFolder, parts: Mapping[str, Part], rows: int, differ: float
) -> str:
    """The README of the release."""
    config, routing = folder.config, folder.config.routing
    assert routing is not None
    environment = read_json(folder.path / "environment.json", CheckpointError)
    manifest = read_json(release.router / "manifest.json", CheckpointError)
    training = {part.name: training_of(part) for part in parts.values()}
    first = next(iter(training.values()))
    return CARD.format(
        name=release.name,
        about=f"{release.about[:1].upper()}{release.about[1:]}.",
        base=config.base,
        dtype=manifest["base"]["dtype"],
        experts=_experts(release.router, manifest),
        chunk=manifest["router"]["chunk_size"],
        rank=read_json(release.static / "adapter_config.json", CheckpointError)["r"],
        skills="\n".join(f"| `{e['name']}` | {e['about']} |" for e in manifest["experts"]),
        **_verdict(folder, config, parts),
        columns=" | ".join(first),
        rules="---:|" * len(first),
        training="\n".join(
            f"| {name} | " + " | ".join(_number(v) for v in facts.values()) + " |"
            for name, facts in training.items()
        ),
        how=_how(config),
        cores=environment["cores"],
        processor=environment["cpu"],
        moved=f"{differ:.3g}",
        conversations="Conversations whose turns switch between the skills"
        if config.data.conversations
        else "Rows of the tasks",
        data="\n".join(f"- {task}: {SOURCES[task]}" for task in tasks_of(config)),
        rows=rows,
    )


def _experts(router: Path, manifest: Mapping[str, Any]) -> str:
    """`2 LoRAs of rank 3 and one of rank 2 that always acts`, as the files say."""
    ranks = {
        expert["name"]: read_json(
            router / "experts" / expert["name"] / "adapter_config.json", CheckpointError
        )["r"]
        for expert in manifest["experts"]
    }
    shared = ranks.pop(manifest["router"]["shared"], None)
    own = " and ".join(map(str, sorted(set(ranks.values()))))
    always = f" and one of rank {shared} that always acts" if shared else ""
    return f"{len(ranks)} LoRAs of rank {own}{always}"


def _verdict(
    folder: RunFolder, config: ExperimentConfig, parts: Mapping[str, Part]
) -> dict[str, Any]:
    """What the run decided about the router against the static LoRA, as it came out."""
    router, baseline = parts["router"].arm, parts["static"].arm
    verdict = read_verdicts(folder.verdicts).judgement.candidates[router]
    scores = load_scores(folder.cell(baseline, config.seeds[0]).measurement)
    plain = replace(verdict, baseline=STATIC, candidate=ROUTER)
    headline = words.headline({ROUTER: plain}, STATIC)
    gates = words.gates(verdict)
    apart = [gate for gate in gates if gate.name.startswith(("slice.", "regression."))]
    states = [gate.state for gate in apart]
    passed, failed = states.count("pass"), states.count("fail")
    changes = words.gate_changes(config.gates)
    return {
        "router": f"`{router}` (the router)",
        "headline": headline[:1].upper() + headline[1:],
        "decision": verdict.decision,
        "sentence": words.sentence(plain),
        "n": scores.n,
        "sources": len(set(scores.clusters if scores.clusters is not None else scores.ids)),
        "seeds": len(config.seeds),
        "parameters": next(g.value for g in gates if g.name == "budget.parameters"),
        "changes": f"Gates other than the defaults: {changes}." if changes else "",
        "gates": "\n".join(
            f"| {gate.name} | {gate.value} | {gate.limit} | {gate.state} |"
            for gate in gates
            if gate not in apart
        ),
        "reported": f"Of {len(apart)} guards of single tasks, slices and metrics {passed} passed and {failed} failed."
        if apart
        else "",
    }


def _how(config: ExperimentConfig) -> str:
    """How learning rate and last step were chosen."""
    if config.tuning is None:
        return "The learning rate was set, not searched for."
    rates = ", ".join(f"{rate:g}" for rate in config.tuning.rates)
    until = "; so was the step to stop at" if config.training.patience else ""
    return (
        f"The learning rate was searched for, from {rates} on, on rows that are neither trained on nor reported, for "
        f"both with the same budget{until}."
    )


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}"


# --- all of it ------------------------------------------------------------------------------------


def make(
    run: Path,
    release: Shipped,
    rows: int,
    most_mb: float,
    data: str | None = None,
    router: str | None = None,
) -> None:
    """Write the release whole, or not at all.

    Raises:
        ConfigError: the run cannot be released, or the release would be larger than `most_mb`.
        CheckpointError: the run has not finished, or the folder holds something else.
    """
    folder = RunFolder(run)
    config = folder.config
    parts = parts_of(folder, config, router)
    if data is not None:
        root = config.data.model_copy(update={"root": data})
        config = config.model_copy(update={"data": root})
    inputs = load_inputs(config, folder, lambda event: None)
    inputs.model.name_or_path = (
        config.base
    )  # what PEFT's files call it; else a folder of this machine
    with whole_folder(release.folder, _ours, CheckpointError) as work:
        made = replace(release, folder=work)
        differ = 0.0
        for kind, part in parts.items():
            into = made.folder / kind
            write_rounded(inputs.model, part, into)
            differ = max(differ, moved(inputs, part, into))
        written = write_rows(made, inputs, rows)
        write_config(made, config)
        write_text(made.card, card(made, folder, parts, written, differ))
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file()) / 1e6
        if size > most_mb:
            raise ConfigError(
                f"{release.name} would be {size:.1f} MB, more than {most_mb:g}: train smaller ranks, or give fewer --rows."
            )
    print(f"{release.folder}: {size:.1f} MB, {written} rows, logits moved by at most {differ:.3g}")


def _ours(folder: Path) -> list[str]:
    """Names in a folder that an earlier call wrote."""
    if not Shipped("", folder).is_there:
        return []
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help=f"of the release: {', '.join(RELEASES)}, or one of your own")
    parser.add_argument(
        "--out", type=Path, help="folder to write; default: where the package has it"
    )
    parser.add_argument("--rows", type=int, default=40, help="held-out rows of each task")
    parser.add_argument("--most-mb", type=float, default=MOST_MB, help="refuse to be larger")
    parser.add_argument(
        "--data", help="folder of the public sets; default: where the run read them"
    )
    parser.add_argument("--router", help="arm whose router it is; default: the only one")
    args = parser.parse_args(arguments)
    known = RELEASES.get(args.name)
    if args.out is None and known is None:
        parser.error(f"{args.name} is no release of the package: give --out.")
    release = known or Shipped(args.name, args.out, args.name)
    release = replace(release, folder=args.out) if args.out else release
    make(args.run, release, args.rows, args.most_mb, args.data, args.router)


if __name__ == "__main__":
    main()
