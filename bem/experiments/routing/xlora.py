"""X-LoRA (arXiv:2402.07148): the base is run once, a classifier on its last hidden states weighs every
expert at every token and site, and the base is run again with those weights.

What it took on transformers 5.24 and PEFT 0.21:
  * X-LoRA refuses a config with `use_cache=True` (both passes would write into one cache). Decoding
    reads the whole conversation twice for every token; `model(..., use_cache=True)` hands back the
    tokens read in place of a cache (`TokensRead`), so that whoever decodes step by step pays that too.
  * X-LoRA wants its experts to be called "0", "1", ...; other names fail later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from peft import XLoraConfig, get_peft_model
from torch import Tensor

from bem.experiments.routing.peer import (
    Folders,
    Peer,
    bare,
    count,
    peer_config,
    read_experts,
    seeded,
    without_ours,
)

CLASSIFIER = ".internal_xlora_classifier."


def xlora(
    model: Any,
    folders: Folders,
    depth: int = 1,
    layerwise: bool = True,
    top_k: int | None = None,
    seed: int = 0,
) -> Peer:
    """X-LoRA over experts; its classifier is trained by `bem.training.fit.fit`.

    Args:
        model: the base that the experts were made for.
        folders: at least two plain PEFT LoRAs.
        depth: linear layers of the classifier.
        layerwise: weights of their own at every site (as in the paper), or one set for all.
        top_k: keep the largest weights only; None: all.
        seed: of the classifier's initial weights.
    Raises:
        AttachError: too few experts, or an impossible top_k.
        CheckpointError: a folder holds no plain LoRA, or one for another base.
    """
    experts = read_experts(model, folders, top_k)
    base = bare(model)
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): str(folder) for i, folder in enumerate(folders.values())},
        xlora_depth=depth,
        layerwise_scalings=layerwise,
        top_k_lora=top_k,
    )
    model.config.use_cache = False
    with seeded(model, seed):
        wrapped = get_peft_model(model, config)
    settings = {"depth": depth, "layerwise": layerwise, "top_k": top_k, "seed": seed}
    made_of = peer_config("xlora", folders, settings)
    peer = Peer(wrapped, made_of, count(experts), base, trained=CLASSIFIER)
    _Reread(wrapped)
    return peer


@dataclass(frozen=True)
class TokensRead:
    """Stands where a cache would: the tokens of the conversation so far, to be read again."""

    ids: Int[Tensor, "batch tokens"]


class _Reread:
    """Hooks that let a model without a cache be called as if it had one: it reads all again."""

    def __init__(self, model: Any):
        self.ids: Tensor | None = None
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple, given: dict[str, Any]) -> tuple[tuple, dict]:
        given = without_ours(given)
        read = given.pop("past_key_values", None)
        keep = given.pop("use_cache", False)
        if isinstance(read, TokensRead):
            given.setdefault("logits_to_keep", given["input_ids"].shape[1])
            given["input_ids"] = torch.cat([read.ids, given["input_ids"]], 1)
            given.pop("position_ids", None)  # were those of the new tokens alone
        self.ids = given["input_ids"] if keep else None
        return args, {**given, "use_cache": False}

    def after(self, module: Any, args: tuple, output: Any) -> Any:
        if self.ids is not None:
            output.past_key_values = TokensRead(self.ids)
        return output
