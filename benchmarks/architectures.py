"""Every causal LM class of transformers under the contract of an adapter, as a tiny random model.

    python benchmarks/architectures.py                     # goes on where it stopped
    python benchmarks/architectures.py --only llama mamba  # measures these again
    python benchmarks/architectures.py --again             # measures all of them again

Writes benchmarks/results/architectures.json after every class, and architectures.md from it. A class
is measured in a process of its own, forked once everything is imported, within `--seconds`.

What an adapter cannot do is compared with what the base cannot do: where a check fails, the same
check runs on the bare base, and an adapter may be off by ten times what the base is off by itself
(its cache, its padding). That is said in the table, and is not counted as a plain pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_configs import CLASSES, tiny_model_of  # noqa: E402

import bem  # noqa: E402
from bem.adapters.checks import ARCHITECTURES, CHECKS, tiny_model  # noqa: E402
from bem.adapters.checks_probe import logits, token_ids  # noqa: E402
from bem.adapters.hooks import Runtime  # noqa: E402
from bem.errors import AttachError  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "architectures"
ATTACHED = ["identity_at_birth", "detach_restores", "disable_restores", "only_the_adapter_trains"]
RUNNING = [
    "blind_to_the_future",
    "cache_is_exact",
    "padding_is_invisible",
    "generation_is_exact",
    "threads_are_exact",
    "turns_restart_chunks",
    "round_trip",
    "price_is_true",
    "survives_checkpointing",
    "runs_in_bfloat16",
]
FEW = ["identity_at_birth", "disable_restores", "price_is_true"]
PLAN = {
    "s0": [*FEW, "round_trip", "generation_is_exact"],
    "v1": [*ATTACHED, *RUNNING],
    "v4": [*FEW, "cache_is_exact", "padding_is_invisible"],
    "pt1": FEW,
    "v2": FEW,
    "v3": FEW,
}
"""Variant -> the checks that it takes. `compiles` is left out: slow, and about our layers alone."""
MAIN = ("s0", "v1", "v4")
OF_BASE = {
    "blind_to_the_future",
    "cache_is_exact",
    "padding_is_invisible",
    "generation_is_exact",
    "threads_are_exact",
    "runs_in_bfloat16",
}
"""What a base may fail by itself."""
SLACK = 10  # times what the base itself is off by
CANNOT = 1e-2  # off by more than this, a base does not do it at all
NOTES = ("round_trip", "survives_checkpointing")
"""Checks that say so where PEFT or the base leaves nothing to check."""
NUMBER = re.compile(r"[\d.]+e[+-]\d+")

PASSES, AS_BASE, PARTLY, REFUSED = (
    "passes",
    "passes as far as its base",
    "partly refused",
    "refused",
)
FAILS, NOT_RUN = "FAILS", "not run"
MEANING = {
    PASSES: "every check of s0, v1 and v4, and of pt1, v2 and v3 wherever they find what they adapt (the reason is "
    "shown where not); where a check is off by a rounding with one draw of the weights, it is exact with another, and "
    "that is shown",
    AS_BASE: "what it fails, the bare base fails too, or it is off by no more than ten times what the base "
    "is off by itself; named in the table",
    PARTLY: "some variants pass, BEM refuses the others when they are attached, with the reason shown",
    REFUSED: "by BEM when it is attached, with the reason shown",
    NOT_RUN: "transformers cannot build the class here, or it cannot be called with token ids alone",
    FAILS: "attached, and then an error or another answer",
}


class Bare:
    """A base with nothing attached, where a check expects an adapter's handle."""

    def __init__(self, model: Any):
        self.model = self.base = model
        model.__dict__["bem_runtime"] = Runtime()
        model.register_forward_pre_hook(_without_turns, with_kwargs=True)

    def parameters(self) -> Iterator[Any]:
        """None: it adds none."""
        return iter(())

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """None: it adds none."""
        return iter(())


def _without_turns(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    return args, {k: v for k, v in kwargs.items() if k != "turn_starts"}


# --- one class ------------------------------------------------------------------------------------


def measured(kind: str) -> dict[str, Any]:
    """The row of one model type."""
    ARCHITECTURES[kind] = partial(tiny_model_of, kind)
    try:
        tiny_model(kind)
    except Exception as error:  # of foreign code: whatever it raises is the reason
        return {"result": NOT_RUN, "reasons": {"base": said(error)}, "sites": ""}
    sites, refusals, failures, of_base = "", {}, {}, {}
    for variant in PLAN:
        try:
            handle = attached(variant, tiny_model(kind))
            sites = sites or sites_of(handle)
        except AttachError as error:
            refusals[variant] = str(error)
        except Exception as error:
            failures[variant] = said(error)
    left = [variant for variant in PLAN if variant not in {**refusals, **failures}]
    try:
        if left:
            logits(tiny_model(kind), token_ids())
    except Exception as error:
        return {"result": NOT_RUN, "reasons": {"base": said(error)}, "sites": sites}
    for variant in left:
        for check in PLAN[variant]:
            judge(kind, variant, check, failures, of_base)
    result = FAILS if failures else REFUSED if not left else PASSES
    if result == PASSES:
        result = PARTLY if set(refusals) & set(MAIN) else AS_BASE if beside(of_base) else PASSES
    reasons = {**merged(failures), **merged(of_base), **merged(refusals)}
    return {"result": result, "reasons": reasons, "sites": sites}


def beside(of_base: dict[str, str]) -> bool:
    """Is there more than notes?"""
    return any(
        name.split()[1] not in NOTES and "; exact with" not in reason
        for name, reason in of_base.items()
    )


def judge(kind: str, variant: str, check: str, failures: dict, of_base: dict) -> None:
    """Run one check; where it fails, see what the bare base does."""
    name, (passed, ours) = f"{variant} {check}", outcome(kind, check, partial(attached, variant))
    if passed:
        if check in NOTES and ours and number(ours) is None:
            of_base[name] = ours
        return
    if (number(ours) or 1.0) < CANNOT and draws_well(kind, check, variant):
        of_base[name] = f"{ours}; exact with other weights: a rounding fell to the other side"
        return
    base_passed, base = outcome(kind, check, Bare)
    if base == ours or (check in OF_BASE and not exceeds(ours, base, base_passed)):
        of_base[name] = f"{ours} (the bare base: {base})"
    else:
        failures[name] = f"{ours} (the bare base: {base or 'passes'})" if check in OF_BASE else ours


def exceeds(ours: str, base: str, base_passed: bool) -> bool:
    """Is what an adapter is off by more than what its base explains?"""
    off, own = number(ours), number(base)
    if own is None:
        return base_passed
    return off is None or (own <= CANNOT and off > SLACK * own)


def draws_well(kind: str, check: str, variant: str) -> bool:
    """Does a check pass with other weights? Experts, top-k and the grid of a code are chosen by numbers that
    may be as good as equal: then the last bit decides."""
    ARCHITECTURES[kind] = partial(tiny_model_of, kind, draw=1)
    passed, _ = outcome(kind, check, partial(attached, variant))
    ARCHITECTURES[kind] = partial(tiny_model_of, kind)
    return passed


def attached(variant: str, model: Any) -> Any:
    """A variant with small chunks."""
    chunks = {} if variant in ("s0", "v3") else {"chunk_size": 8}
    return bem.attach(model, variant, rank=4, **chunks)


def outcome(kind: str, check: str, make: Any) -> tuple[bool, str]:
    """Whether a check passes, and what it measured or why not."""
    try:
        return True, CHECKS[check](make, kind)
    except Exception as error:  # of foreign code: whatever it raises is its result
        return False, said(error)


def number(text: str) -> float | None:
    """The difference that a check names."""
    found = NUMBER.fullmatch(text.rpartition(" ")[2])
    return float(text.rpartition(" ")[2]) if found else None


def said(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def merged(reasons: dict[str, str]) -> dict[str, str]:
    """The same reason once, under all that have it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return {", ".join(names): reason for reason, names in by_reason.items()}


def sites_of(handle: Any) -> str:
    """The names of the adapted layers, a star for the block, and how many there are."""
    names = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in handle.plan.parts)
    ends = [f"{name.rpartition('*.')[2]} x {count}" for name, count in names.items()]
    return ", ".join(ends) + "".join(
        f"; not {e.where}: {e.why}" for e in handle.plan.left_alone if not e.by_choice
    )


# --- all of them ----------------------------------------------------------------------------------


def forked(kind: str, seconds: float) -> dict[str, Any]:
    """`measured` in a process of its own, which may hang or die."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        try:
            row = measured(kind)
        except BaseException as error:
            row = {"result": FAILS, "reasons": {"benchmark": repr(error)[:300]}, "sites": ""}
        os.write(writing, json.dumps(row).encode())
        os._exit(0)
    os.close(writing)
    data, end = b"", time.monotonic() + seconds
    while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
        if not (part := os.read(reading, 1 << 16)):
            break
        data += part
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    if data:
        return json.loads(data)
    return {
        "result": FAILS,
        "reasons": {"benchmark": f"no answer within {seconds:.0f} s (status {status})"},
        "sites": "",
    }


def versions() -> dict[str, str]:
    """What the rows hold for."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def kept(again: bool) -> dict[str, Any]:
    """Rows that are there already, of these versions."""
    file = OUT.with_suffix(".json")
    if again or not file.is_file():
        return {}
    saved = json.loads(file.read_text())
    return saved["rows"] if saved["versions"] == versions() else {}


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown: counts first."""
    counts = Counter(row["result"] for row in rows.values())
    lines = ["# Every causal LM class of transformers, as a tiny random model", ""]
    tools = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines += [
        f"`python benchmarks/architectures.py`, {tools}: {len(rows)} of {len(CLASSES)} classes.",
        "",
    ]
    lines += [f"- {counts[name]} {name}: {text}." for name, text in MEANING.items() if counts[name]]
    lines += [
        "",
        "The checks are those of `bem.adapters.checks`, in float32 where a name says no more:",
        "",
    ]
    lines += [f"- {variant}: {', '.join(checks)}" for variant, checks in PLAN.items()]
    lines += [""]
    lines += ["| class | model type | result | adapted | why |", "|---|---|---|---|---|"]
    for kind, row in rows.items():
        why = "<br>".join(f"{name}: {reason}" for name, reason in row["reasons"].items())
        cells = [CLASSES[kind], kind, row["result"], row["sites"], why]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def write(rows: dict[str, Any]) -> None:
    """Both files, in the order of transformers."""
    rows = {kind: rows[kind] for kind in CLASSES if kind in rows}
    saved = {"versions": versions(), "rows": rows}
    OUT.with_suffix(".json").write_text(json.dumps(saved, indent=1) + "\n")
    OUT.with_suffix(".md").write_text(table(rows))


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CLASSES), metavar="TYPE")
    parser.add_argument("--again", action="store_true", help="keep no row of an earlier run")
    parser.add_argument("--seconds", type=float, default=180, help="time limit per class")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = kept(args.again)
    todo = args.only or [kind for kind in CLASSES if kind not in rows]
    for index, kind in enumerate(todo, 1):
        start = time.monotonic()
        rows[kind] = forked(kind, args.seconds)
        write(rows)
        seconds = time.monotonic() - start
        print(f"{index}/{len(todo)} {kind}: {rows[kind]['result']} ({seconds:.0f} s)", flush=True)
        for name, reason in rows[kind]["reasons"].items():
            print(f"    {name}: {reason}", flush=True)
    print("\n".join(table(rows).split("\n| class")[0].splitlines()[2:]))


if __name__ == "__main__":
    main()
