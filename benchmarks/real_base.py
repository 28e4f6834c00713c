"""The contracts on a real, pretrained base: every variant, the router over experts on every linear layer, and
two LoRAs made with plain PEFT.

    bem base get smollm2-135m
    python benchmarks/real_base.py                         # writes benchmarks/results/real_base.md
    python benchmarks/real_base.py --base HuggingFaceTB/SmolLM2-360M-Instruct

The checks are those of benchmarks/architectures.py and of bem.routing.checks. A trained model's hidden states are
a thousand times larger than a tiny random one's, and so is what float32 rounds off: where a check is off by more
than 1e-4, the same check runs on the bare base, and both numbers are shown.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from architectures import (
    NOTES,
    OF_BASE,
    PLAN,
    ROOT,
    Bare,
    attached,
    exceeds,
    number,
    outcome,
    said,
)
from peft import LoraConfig, PeftModel, get_peft_model

import bem
from bem.adapters.checks import ARCHITECTURES, tiny_model
from bem.adapters.checks_probe import in_pieces, logits
from bem.adapters.copies import with_shared_weights
from bem.adapters.sites import find_linears
from bem.experts.expert import Expert, Update, from_updates
from bem.routing.checks import CHECKS as ROUTER_CHECKS
from bem.routing.checks_plans import token_ids

RANKS = {"a": 4, "b": 4, "c": 2}
FREE = {"chunk_size": 8, "switch_cost": 0.0, "hysteresis": 0.0, "spans": (1, 2)}
"""Few rules in the router's way."""


def variants(name: str) -> Iterator[list[str]]:
    """Rows of every variant: who, check, what was measured, the bare base, result."""
    for variant, checks in PLAN.items():
        for check in checks:
            passed, ours = outcome(name, check, partial(attached, variant))
            base = ""
            if not passed and check in OF_BASE:
                base_passed, base = outcome(name, check, Bare)
                passed = not exceeds(ours, base, base_passed)
            elif not passed and check in NOTES:
                base = "a note"
            yield [variant, check, ours, base, "passes" if passed else "FAILS"]


def routers(name: str) -> Iterator[list[str]]:
    """Rows of the router over experts that act on every linear layer of the blocks."""
    base = f"max |difference| {_off_by_itself(name):.1e}, token by token"
    for check, run in ROUTER_CHECKS.items():
        try:
            yield ["router", check, run(_everywhere, name), "", "passes"]
        except Exception as error:
            ours = said(error)
            own = re.sub(", token by token$", "", base)
            passed = number(ours) is not None and not exceeds(ours, own, False)
            yield ["router", check, ours, base, "passes" if passed else "FAILS"]


@torch.no_grad()
def _off_by_itself(name: str) -> float:
    """How far the bare base's logits through its cache, token by token, are from those without."""
    model, ids = tiny_model(name), token_ids()
    pieces = in_pieces(model, ids, list(range(1, ids.shape[1])))
    return float((pieces - logits(model, ids)).abs().max())


def _everywhere(model: Any) -> Any:
    experts = [_random(model, name, rank, i) for i, (name, rank) in enumerate(RANKS.items())]
    made = bem.mount(model, experts, **FREE)
    made.router.trained = True
    return made


def _random(model: Any, name: str, rank: int, seed: int) -> Expert:
    """An expert that moves every linear layer a little."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    updates = {
        site.name: Update(0.02 * draw(site.d_out, rank), draw(rank, site.d_in) / site.d_in**0.5)
        for site in find_linears(model).found
    }
    return from_updates(name, updates, "random")


@torch.no_grad()
def plain_peft(model: Any, work: Path) -> Iterator[list[str]]:
    """Two LoRAs of plain PEFT's on all linears: mounted and routed by hand, turn by turn; written and read back."""
    peers = {"a": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
             "b": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")}  # fmt: skip
    plain = {}
    for seed, (name, config) in enumerate(peers.items()):
        torch.manual_seed(seed)
        plain[name] = get_peft_model(with_shared_weights(model), config).eval()
        for key, parameter in plain[name].named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.02)
        plain[name].save_pretrained(work / name)
    mounted = bem.mount(with_shared_weights(model), [work / "a", work / "b"], chunk_size=8)
    ids = torch.randint(1, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    by_row = torch.tensor([1, 2])[:, None].expand_as(ids)
    ours = mounted.model(ids, route=by_row).logits
    theirs = torch.cat([plain[n](ids[i : i + 1]).logits for i, n in enumerate("ab")])
    yield _close("two LoRAs, one a row", ours, theirs)
    turns = torch.cat([torch.full((2, 16), 1), torch.full((2, 24), 2)], 1)
    whole = mounted.model(ids, route=turns).logits
    first = mounted.model(ids[:, :16], route=turns[:, :16], use_cache=True)
    second = mounted.model(ids[:, 16:], route=turns[:, 16:], past_key_values=first.past_key_values)
    yield _close("turn by turn, in pieces through the cache", torch.cat([first.logits, second.logits], 1), whole)  # fmt: skip
    said_by = mounted.model.generate(ids, route=turns, max_new_tokens=16, do_sample=False)
    last = mounted.model(said_by[:, :-1], route=torch.cat([turns, torch.full((2, 15), 2)], 1))
    same = bool((last.logits[:, 39:].argmax(-1) == said_by[:, 40:]).all())
    yield ["plain PEFT", "generated under a route = the forward's argmax", str(same), "", "passes" if same else "FAILS"]  # fmt: skip
    mounted.save(work / "routed")
    for i, name in enumerate("ab"):
        again = PeftModel.from_pretrained(
            with_shared_weights(model), work / "routed/experts" / name
        )
        yield _close(f"{name}: exported, loaded in plain PEFT", again.eval()(ids[i : i + 1]).logits, theirs[i : i + 1])  # fmt: skip


def _close(what: str, a: torch.Tensor, b: torch.Tensor) -> list[str]:
    off = float((a - b).abs().max() / b.abs().max())
    return ["plain PEFT", what, f"largest relative difference of logits {off:.1e}", "", "passes" if off < 1e-5 else "FAILS"]  # fmt: skip


def page(name: str) -> str:
    """All rows as Markdown."""
    model, _ = bem.load_base(name, dtype="float32")
    ARCHITECTURES[name] = lambda: with_shared_weights(model)
    lines = []
    with tempfile.TemporaryDirectory() as work:
        for row in chain(plain_peft(model, Path(work)), routers(name), variants(name)):
            print(" | ".join(row), flush=True)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    failed = sum("FAILS" in line for line in lines)
    return "\n".join(
        [
            f"# The contracts on {name}",
            f"\n`python benchmarks/real_base.py{'' if name == 'smollm2-135m' else f' --base {name}'}`, transformers "
            f"{transformers.__version__}, torch {torch.__version__}, float32 on CPU: {len(lines)} checks, {failed} fail.\n",
            "A number in the fourth column: the bare base is off by so much itself; an adapter may be off by ten "
            "times that.\n",
            "| who | check | measured | the bare base | result |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/real_base.md")
    given = parser.parse_args()
    given.out.write_text(page(given.base), encoding="utf-8")


if __name__ == "__main__":
    main()
