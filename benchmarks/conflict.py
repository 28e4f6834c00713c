"""Router against static LoRA where cues conflict: fresh held-out conversations of one family of a finished run.

    python benchmarks/conflict.py runs/smollm2 --data DIR_OF_THE_PUBLIC_SETS --task snips_forms --router fitted

A run shows on which family the experts help; that is a guess made from its rows, and has to be confirmed on others.
So the family's held-out rows are taken whose groups the run did not measure, as conversations of the same kind, and
the run's adapters answer them as they are: nothing is trained. Gates are those of the run, its report is like any other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from bem.cli.display import Display
from bem.config import ExperimentConfig, parse
from bem.config.arm import ROUTERS
from bem.experiments import run as runner
from bem.files import write_text
from bem.report import words
from bem.runs.folder import RunFolder
from bem.tasks.load import load_tasks
from bem.training.data import Example


def fresh_rows(folder: RunFolder, data: str, task: str, rows: int) -> list[Example]:
    """Conversations that end in a row of `task` whose group the run did not measure."""
    config = folder.config.data.model_copy(update={"root": data})
    measured = {row.group for row in _task(load_tasks(config), task).dev}
    everything = load_tasks(config.model_copy(update={"dev_rows": None}))
    fresh = [row for row in _task(everything, task).dev if row.group not in measured]
    return fresh if len(fresh) <= rows else random.Random(0).sample(fresh, rows)


def _task(tasks: list[Any], name: str) -> Any:
    found = {task.name: task for task in tasks}
    if name not in found:
        raise SystemExit(f"the run has no task {name!r}, but {', '.join(found)}")
    return found[name]


def confirmation(folder: RunFolder, task: str, rows: Path, router: str) -> ExperimentConfig:
    """The run's adapters, as they are, on these rows: the static LoRA, a router, and the maker's labels."""
    made = folder.config
    assert made.routing is not None, "a run with experts"
    seed = made.seeds[0]
    entry = next(t for t in made.data.tasks if (t if isinstance(t, str) else t.name) == task)
    metric = {} if isinstance(entry, str) or not entry.metric else {"metric": entry.metric}
    values: dict[str, Any] = {
        "name": f"{made.name}_{task}",
        "output": made.output,
        "base": made.base,
        "dtype": made.dtype,
        "seeds": made.seeds[:1],
        "data": {"tasks": [{"name": task, "dev": str(rows), **metric}], "dev_rows": None},
        "routing": {
            "checkpoint": str(folder.routing(seed) / router),
            "experts": made.routing.experts,
        },
        "arms": [
            {
                "name": "s0",
                "checkpoint": str(folder.cell(made.baseline.name, seed).checkpoint),
                "role": "baseline",
            },
            {"name": router, "route": "ar1"},  # the router that was saved, whichever it is
            {"name": "gold", "route": "gold", "role": "control"},
        ],
        "training": {"max_length": made.training.max_length},
        "gates": made.gates.model_dump(mode="json"),
    }
    return parse(ExperimentConfig, values, f"{task} of {made.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--router", default="ar1", choices=ROUTERS)
    parser.add_argument("--rows", type=int, default=300, help="at most")
    args = parser.parse_args()
    folder = RunFolder(args.run)
    rows = fresh_rows(folder, args.data, args.task, args.rows)
    kept = folder.path / f"fresh-{args.task}.jsonl"
    lines = [json.dumps(asdict(row), ensure_ascii=False, sort_keys=True) for row in rows]
    write_text(kept, "\n".join(lines) + "\n")
    print(f"{len(rows)} rows from {len({row.group for row in rows})} sources", flush=True)
    config = confirmation(folder, args.task, kept, args.router)
    with Display(Console()) as display:
        result = runner.run(config, display.show, command=f"python {' '.join(sys.argv)}")
    print(words.headline(result.verdicts, config.baseline.name))
    print(result.report)


if __name__ == "__main__":
    main()
