"""What every variant and a router over experts add to a base's memory, and where it goes.

    python benchmarks/memory.py                          # writes benchmarks/results/memory.md
    python benchmarks/memory.py --base bem-tiny --where  # who holds what at the worst moment, on the screen

The number is that of the gate (`bem.experiments.measuring.memory`): parameters and buffers that the base does not
have, and the difference between the peaks of all live tensors over two sequences, a prefill of 256 tokens and 16 decoded
ones each: what decoding leaves behind lies beside the second prefill. The
variants of configs/public.yaml stand beside the static LoRA of as many parameters, the router over seven experts of rank
6 and a shared one of rank 16 (configs/routing.yaml, configs/smollm2.yaml) beside the one of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import bem
from bem.adapters.budget import match_rank, price
from bem.adapters.copies import with_shared_weights
from bem.config import AdapterConfig
from bem.experiments.measuring import memory
from bem.experts.expert import Expert, Update, from_updates
from bem.routing.mount import blank_expert

ROOT = Path(__file__).resolve().parent.parent
ROUTED_RANK = {"bem-tiny": 64, "smollm2-135m": 59}
"""Of the static LoRA with as many parameters as the experts and their router."""
PUBLIC_RANK = 12


def arms(base: nn.Module, name: str) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(arm, whose ratio it is, how it is made)."""
    static = price(base, AdapterConfig(variant="s0", rank=PUBLIC_RANK))
    configs = {"s0": AdapterConfig(variant="s0", rank=PUBLIC_RANK)}
    for variant in ("pt1", "v1", "v2"):
        config = AdapterConfig(variant=variant, rank=PUBLIC_RANK)  # type: ignore[arg-type]
        configs[variant] = match_rank(base, config, static)
    configs["v3"] = AdapterConfig(variant="v3", rank=1)
    configs["v4"] = AdapterConfig(variant="v4", rank=PUBLIC_RANK)
    for variant, config in configs.items():
        yield variant, "s0", lambda c=config: bem.attach(with_shared_weights(base), c)
    wide, large = AdapterConfig(variant="s0", rank=ROUTED_RANK[name]), "s0, large"
    yield large, large, lambda: bem.attach(with_shared_weights(base), wide)
    yield "router, 7 experts and a shared one", large, lambda: routed(with_shared_weights(base))


def routed(model: Any) -> Any:
    """A router over experts with random weights, as if it were trained."""
    names = [*(f"expert{i}" for i in range(7)), "shared"]
    experts = [drawn(model, n, 16 if n == "shared" else 6, i) for i, n in enumerate(names)]
    mounted = bem.mount(model, experts, shared="shared")
    mounted.router.trained = True
    return mounted


def drawn(model: Any, name: str, rank: int, seed: int) -> Expert:
    """An expert at the default sites."""
    generator = torch.Generator().manual_seed(seed)
    blank = blank_expert(model, name, rank)
    updates = {
        site: Update(0.01 * torch.randn(u.u.shape, generator=generator), u.v)
        for site, u in blank.updates.items()
    }
    return from_updates(name, updates)


def measured(base: nn.Module, make: Callable[[], Any]) -> dict[str, float]:
    """Bytes: parameters and buffers, what is still held besides after a pass, and all in all."""
    arm = make()
    (added,) = memory.added_memory({"arm": arm}, base).values()
    owned = memory._storages(base)
    held = memory._storages(memory.model_of(arm)).items()
    parameters = sum(size for at, size in held if at not in owned)
    kept = left_behind(make()) - left_behind(base)
    return {"parameters": parameters, "kept": kept, "added": added}


def left_behind(arm: Any) -> int:
    """Bytes that are still held when a pass is over and its cache is gone."""
    with memory._LiveBytes() as live:
        ids = torch.zeros((1, 256), dtype=torch.long)
        memory._prefill_and_decode(memory.model_of(arm).eval(), ids, 16)
        return live.now


# --- who holds what -------------------------------------------------------------------------------


class _Holders(memory._LiveBytes):
    """Notes who made what lives; `at_peak`: (bytes, shape, call site) of everything at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, str]] = {}
        self.at_peak: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known, peak = {id(t.untyped_storage()) for t in memory._tensors((args, kwargs))}, self.peak
        now = self.now
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in memory._tensors(result):
            storage = tensor.untyped_storage()
            if self.now > now and id(storage) not in known and id(storage) not in self.live:
                said = f"{storage.nbytes():>9} {tuple(tensor.shape)} {_site()} {func}"
                self.live[id(storage)] = (storage.nbytes(), said)
                weakref.finalize(storage, self.live.pop, id(storage), None)
        if self.peak > peak:
            self.at_peak = list(self.live.values())
        return result


def _site() -> str:
    frames = [f for f in traceback.extract_stack() if "torch/" not in f.filename]
    frames = [f for f in frames if Path(f.filename).name != "memory.py"]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-1:-4:-1])


def where(base: nn.Module, make: Callable[[], Any]) -> None:
    """Print what lives at the worst moment of an arm and does not in the base."""
    held = []
    for model in (base, make()):
        with torch.no_grad(), _Holders() as live:
            memory.two_sequences(
                memory.model_of(model).eval(), torch.zeros((1, 256), dtype=torch.long), 16
            )
        held.append((live.peak, Counter(text for _, text in live.at_peak)))
    (bare, of_base), (peak, of_arm) = held
    print(f"peak {peak:,} bytes, of the base {bare:,}: {peak - bare:,} more")
    for text, times in sorted((of_arm - of_base).items(), reverse=True)[:40]:
        print(f"  + {times:>3} x {text}")
    for text, times in sorted((of_base - of_arm).items(), reverse=True)[:20]:
        print(f"  - {times:>3} x {text}")


# --- report ---------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    """One Markdown table; before: of another version, as `--json` wrote it."""
    names = ["parameters", "kept", "at work", "added", "of the static LoRA's"]
    lines = ["| arm | " + " | ".join([*names, *(["before"] if before else [])]) + " |"]
    lines.append("|---" + "|---:" * (len(names) + bool(before)) + "|")
    for arm, row in rows.items():
        at_work = row["added"] - row["parameters"]
        numbers = (row["parameters"], row["kept"], at_work, row["added"])
        cells = [f"{number:,.0f}" for number in numbers] + [_ratio(rows, arm)]
        if before:
            cells.append(f"{before[arm]['added']:,.0f}, {_ratio(before, arm)}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _ratio(rows: dict[str, dict[str, Any]], arm: str) -> str:
    return f"×{rows[arm]['added'] / rows[rows[arm]['reference']]['added']:.3f}"


def report(found: dict[str, Any], before: dict[str, Any]) -> str:
    text = [
        "# Memory that an adapter adds",
        "",
        "`python benchmarks/memory.py`, float32 on a CPU: every number is a count of bytes, the same on every machine.",
        "",
        "parameters: and buffers, that the base does not have. kept: still held besides when a pass is over and its cache "
        "is gone. at work: the peak of all live tensors over two sequences, one after the other, a prefill of 256 tokens and "
        "16 decoded ones each, less the bare base's: what decoding leaves behind is charged beside the second prefill. added: parameters and at work, what the gate (limit ×1.05) compares with the static LoRA of as many "
        "parameters; v3 and v4 have fewer of them by definition.",
        "",
    ]
    if before:
        text += [
            "before: the version before experts were held once, over one sequence. Its router had three rank budgets and strengths; with as "
            "many, today's adds ×1.045 on bem-tiny and ×1.011 on smollm2-135m.",
            "",
        ]
    for name, rows in found.items():
        text += [f"## {name}", "", *table(rows, before.get(name, {})), ""]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", nargs="*", default=["bem-tiny", "smollm2-135m"])
    parser.add_argument("--arms", nargs="*", help="only arms whose name begins with one of these")
    parser.add_argument("--where", action="store_true", help="who holds what, on the screen")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--before", type=Path, help="what --json wrote, to be shown beside")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.md")
    args = parser.parse_args()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.base:
        base, _ = bem.load_base(name)
        rows = found[name] = {}
        for arm, reference, make in arms(base, name):
            if args.arms and not arm.startswith(tuple(args.arms)):
                continue
            if args.where:
                print(f"--- {arm} on {name}")
                where(base, make)
                continue
            rows[arm] = {**measured(base, make), "reference": reference}
            print(name, arm, rows[arm], flush=True)
    if args.where or args.arms:
        return
    if args.json:
        args.json.write_text(json.dumps(found))
    before = json.loads(args.before.read_text()) if args.before else {}
    args.out.write_text(report(found, before))


if __name__ == "__main__":
    main()
