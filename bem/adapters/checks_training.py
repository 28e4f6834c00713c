"""The contract: gradients, dtypes and compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bem.adapters.attached import Attached
from bem.adapters.checks_models import tiny_model
from bem.adapters.checks_probe import (
    TOLERANCE,
    assert_equal,
    difference,
    evidence_for,
    forward,
    logits,
    loss_of,
    perturbed,
    token_ids,
)
from bem.adapters.peft_method import BemSite
from bem.errors import TrainingError

Make = Callable[[Any], Attached]


def only_the_adapter_trains(make: Make, arch: str) -> str:
    """Adapter parameters all get a gradient; nothing else gets one."""
    attached = perturbed(make(tiny_model(arch)))
    attached.model.train()
    ids = token_ids()
    given = evidence_for(attached.model, len(ids))
    attached.model(input_ids=ids, labels=ids, use_cache=False, **given).loss.backward()
    own = dict(attached.named_parameters())
    silent = [n for n, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert own and not silent, f"no gradient: {silent[:4]}"
    of_adapter = {id(p) for p in own.values()}
    everything = attached.model.named_parameters()
    loud = [n for n, p in everything if id(p) not in of_adapter and p.grad is not None]
    assert not loud, f"the base got gradients: {loud[:4]}"
    return f"{len(own)} tensors"


def survives_checkpointing(make: Make, arch: str) -> str:
    """Gradients under gradient checkpointing are those without; the reentrant kind may be refused."""
    attached, ids = perturbed(make(tiny_model(arch))), token_ids()
    if not attached.base.supports_gradient_checkpointing:
        return "the base has no gradient checkpointing"
    attached.model.train()
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            attached.base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            attached.base.enable_input_require_grads()
        torch.manual_seed(0)  # the same noise in the rank mask
        try:
            loss_of(attached.model, ids).backward()
        except TrainingError:
            assert reentrant, "only the reentrant kind may be refused"
            continue
        gradients.append([p.grad.clone() for p in attached.parameters() if p.grad is not None])
        for parameter in attached.parameters():
            parameter.grad = None
    worst = max(
        difference(a, b) for g in gradients[1:] for a, b in zip(gradients[0], g, strict=True)
    )
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def runs_in_bfloat16(make: Make, arch: str) -> str:
    """A bfloat16 base: finite logits of its dtype, finite gradients for every adapter parameter."""
    attached = perturbed(make(tiny_model(arch).to(torch.bfloat16)))
    out = forward(attached.model, token_ids())
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all(), (
        "logits are not finite bfloat16"
    )
    attached.model.train()
    loss_of(attached.model, token_ids()).backward()
    bad = [
        n
        for n, p in attached.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert not bad, f"gradients are not finite: {bad[:3]}"
    return ""


def moves_to_another_dtype(make: Make, arch: str) -> str:
    """Cast after attaching, the model does what the adapter does on a base that was cast before: up to
    one rounding of its weights."""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16):
        attached = perturbed(make(tiny_model(arch)))
        attached.model.to(dtype)
        ahead = make(tiny_model(arch).to(dtype))
        ahead.load_state_dict(attached.state_dict())
        ahead.model.eval()
        cast, whole = (logits(a.model, token_ids()) for a in (attached, ahead))
        assert cast.dtype == dtype and torch.isfinite(cast).all(), f"no finite {dtype} logits"
        worst = max(worst, difference(cast, whole) / float(whole.abs().max()))
        attached.model.generate(
            input_ids=token_ids()[:, :5],
            attention_mask=torch.ones(2, 5, dtype=torch.long),
            max_new_tokens=2,
            pad_token_id=0,
            **evidence_for(attached.model, 2),
        )
    assert worst < 2**-6, f"max |difference| {worst:.1e} of the largest logit"
    return f"{worst:.0e}"


def compiles(make: Make, arch: str) -> str:
    """torch.compile finds no graph break in an adapted layer, and changes nothing."""
    attached, ids = perturbed(make(tiny_model(arch))), token_ids()
    eager = logits(attached.model, ids)
    torch._dynamo.reset()
    parents = [
        (m, n, c)
        for m in attached.base.modules()
        for n, c in m.named_children()
        if isinstance(c, BemSite)
    ]
    for parent, name, site in parents:
        parent.__dict__["_modules"][name] = _Compiled(site)
    with torch._dynamo.config.patch(recompile_limit=10 * len(parents)):  # type: ignore[attr-defined]
        result = assert_equal(logits(attached.model, ids), eager, 1e-5)
    for parent, name, site in parents:
        parent.__dict__["_modules"][name] = site
    assert isinstance(attached.base, nn.Module) and parents
    return result


class _Compiled(torch.nn.Module):
    """An adapted layer under torch.compile(fullgraph=True): a graph break is an error."""

    def __init__(self, site: Any):
        super().__init__()
        self.weight = site.weight
        self._run = torch.compile(site.forward, fullgraph=True, backend="eager", dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)
