"""Arrow (arXiv:2405.11157): at each site and token, the experts whose update has its main input
direction most in line with the token. Nothing is trained.

PEFT's `create_arrow_model` puts its router on every layer whose last name an expert has (all `o_proj`)
and fails at the first one that no expert adapts (PEFT 0.21). So we make the same calls with the
experts' own sites. All experts need the same sites and ranks; it is dense over them for any top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import ArrowConfig, LoraConfig, PeftModel

from bem.adapters.lora import Lora
from bem.errors import AttachError
from bem.experiments.routing.peer import (
    Folders,
    Peer,
    bare,
    count,
    peer_config,
    prefill_flops,
    read_experts,
    seeded,
    without_ours,
)

ROUTER = "arrow_router"


def arrow(model: Any, folders: Folders, top_k: int = 1, temperature: float = 1.0) -> Peer:
    """Arrow over experts: nothing to train.

    Args:
        model: the base that the experts were made for.
        folders: at least two plain PEFT LoRAs with the same sites and ranks.
        top_k: experts that act on a token at a site.
        temperature: of the softmax over their scores.
    Raises:
        AttachError: too few experts, other sites or ranks, or an impossible top_k.
        CheckpointError: a folder holds no plain LoRA, or one for another base.
    """
    experts = read_experts(model, folders, top_k)
    ranks = _common_ranks(experts)
    base = bare(model)
    names = [f"task_{i}" for i in range(len(experts))]
    first, *others = [str(folder) for folder in folders.values()]
    # the seed is of the power iteration that finds each expert's direction
    method = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    method.task_adapter_names, method.gks_adapter_names = names, []
    router = LoraConfig(arrow_config=method, target_modules=sorted(ranks), r=max(ranks.values()))
    with seeded(model, 0):  # PEFT draws weights before it loads ours
        wrapped = PeftModel.from_pretrained(model, first, adapter_name=names[0])
        for name, folder in zip(names[1:], others, strict=True):
            wrapped.load_adapter(folder, adapter_name=name)
        wrapped.add_adapter(ROUTER, router)
    wrapped.set_adapter(ROUTER)
    settings = {"top_k": top_k, "temperature": temperature}
    peer = Peer(wrapped, peer_config("arrow", folders, settings), count(experts), base)
    wrapped.register_forward_pre_hook(
        lambda _, args, given: (args, without_ours(given)), with_kwargs=True
    )
    prefill_flops(wrapped)  # finds the directions now, so that no request or price pays for it
    return peer


def _common_ranks(experts: Mapping[str, Mapping[str, Lora]]) -> dict[str, int]:
    """Site -> rank, the same for all experts."""
    ranks = [{site: len(lora.a) for site, lora in expert.items()} for expert in experts.values()]
    for name, own in zip(experts, ranks, strict=True):
        if own != ranks[0]:
            raise AttachError(
                f"Arrow needs experts of the same sites and ranks: {next(iter(experts))} and {name} differ. "
                "Train them with one config."
            )
    return ranks[0]
