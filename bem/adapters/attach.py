"""Attach a variant to a frozen model; save it, load it, take it off again.

attached = bem.attach(model, "v1", rank=8)
attached.model(**batch).loss.backward()
attached.save("out")
attached = bem.load(model, "out")
model = attached.detach()          # the model as it was, bit for bit
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bem.adapters.budget import Price, price_of
from bem.config import VARIANTS, AdapterConfig, parse
from bem.control.controller import ChunkReader
from bem.errors import AttachError
from bem.variants.head_gate import HeadGate

NAME = "default"  # the adapter's name inside PEFT


class Attached:
    """A frozen model with one adapter. `model` is a `peft.PeftModel`."""

    def __init__(self, peft_model: Any, config: AdapterConfig, trainable_before: dict[str, bool]):
        self.model = peft_model
        self.config = config
        self._trainable_before = trainable_before

    @property
    def base(self) -> Any:
        """The Hugging Face model inside."""
        return self.model.base_model.model

    def modules(self) -> list[Any]:
        """The adapter's modules, bottom to top: updates, modulations, the controller."""
        from bem.adapters.peft_method import adapters_of

        parts = [part for _, part in adapters_of(self.base, NAME)]
        found = [m for p in parts for m in (p.update, p.film, p.shaping, p.controller)]
        return [m for m in found if m is not None]

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, the only ones that train."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of the adapter alone."""
        mine = {id(p) for m in self.modules() for p in m.parameters()}
        return [(n, p) for n, p in self.base.named_parameters() if id(p) in mine]

    def penalty(self) -> Tensor:
        """Sum of the variant's weighted regularisers for the last forward pass; 0 if there are none."""
        found = [
            p for m in self.modules() if hasattr(m, "penalty") and (p := m.penalty()) is not None
        ]
        return torch.stack(found).sum() if found else torch.zeros((), device=self.base.device)

    @property
    def n_evidence(self) -> int:
        """Evidence features that the adapter reads; 0: it reads none."""
        readers = (m for m in self.modules() if isinstance(m, ChunkReader))
        return next((m.conditioning.get("evidence", 0) for m in readers), 0)

    def gate_magnitude(self) -> Tensor | None:
        """Mean gate over all head-gated sites, (batch, tokens), in the last forward pass.

        None if the variant has no head gates.
        """
        runtime = self.base.bem_runtime
        last = runtime.ambient.last
        if runtime.wiring is None or last is None:
            return None
        gates = [
            m.magnitude(last.control_per_token(i))
            for i, m in enumerate(runtime.wiring.members)
            if isinstance(m, HeadGate)
        ]
        return torch.stack(gates).mean(0).float() if gates else None

    def after_step(self) -> None:
        """Call after every optimiser step: keeps spectral cap and trust radius."""
        for module in self.modules():
            if hasattr(module, "after_step"):
                module.after_step()

    def price(self, tokens: int = 512) -> Price:
        """Parameters, and matrix FLOPs per token of a prefill of `tokens` tokens."""
        from bem.adapters.peft_method import adapters_of

        return price_of(dict(adapters_of(self.base, NAME)), tokens)

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors (buffers that belong to a checkpoint included), detached."""
        names = {n for n, _ in self.named_parameters()}
        buffers = {id(b) for m in self.modules() for b in m.state_dict(keep_vars=True).values()}
        whole = self.base.state_dict(keep_vars=True)
        return {n: t.detach() for n, t in whole.items() if n in names or id(t) in buffers}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors as `state_dict` names them.

        Raises:
            AttachError: a tensor is missing, unknown or of another shape.
        """
        mine = self.state_dict()
        if mine.keys() != tensors.keys():
            odd = sorted(mine.keys() ^ tensors.keys())
            raise AttachError(
                f"the tensors do not fit this adapter: {len(odd)} differ, first {odd[0]!r}."
            )
        for name, tensor in mine.items():
            if tensor.shape != tensors[name].shape:
                raise AttachError(
                    f"{name}: {tuple(tensors[name].shape)} does not fit {tuple(tensor.shape)}."
                )
            tensor.copy_(tensors[name])

    def save(
        self,
        folder: str | Path,
        data_hash: str = "",
        parent: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint that PEFT, transformers and `bem.load` read; see `checkpoint.save`."""
        from bem.adapters import checkpoint

        return checkpoint.save(self, Path(folder), data_hash, parent, extra or {})

    def save_lora(self, folder: str | Path) -> Path:
        """Write a static LoRA (s0) as a plain PEFT LoRA checkpoint, for anything that serves those."""
        from bem.adapters import checkpoint

        return checkpoint.save_lora(self, Path(folder))

    def detach(self) -> Any:
        """Take the adapter off and return the model as it was, bit for bit."""
        model = self.model.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = self._trainable_before.get(name, parameter.requires_grad)
        return model


def attach(model: Any, variant: str | AdapterConfig | None = None, **overrides: Any) -> Attached:
    """Attach an adapter to a causal LM and freeze the rest.

    Args:
        model: any Hugging Face causal LM.
        variant: `s0 pt1 v1 v2 v3 v4`, or a whole config.
        **overrides: fields of `AdapterConfig`, such as rank=8.
    Raises:
        AttachError: unknown variant, no site found, or something is attached already.
        ConfigError: an unknown or impossible setting.
    """
    if isinstance(variant, str) and variant not in VARIANTS:
        raise AttachError(f"unknown variant {variant!r}: use one of {', '.join(VARIANTS)}.")
    values = (
        variant.model_dump() if isinstance(variant, AdapterConfig) else {"variant": variant or "s0"}
    )
    config = parse(AdapterConfig, {**values, **overrides}, "attach")
    if getattr(model, "peft_config", None):
        raise AttachError(
            "the model already carries a PEFT adapter: detach it first, or use PEFT's add_adapter."
        )
    from peft import get_peft_model

    from bem.adapters.peft_method import BemConfig

    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    peft_model = get_peft_model(
        model, BemConfig(**config.model_dump(), task_type="CAUSAL_LM"), adapter_name=NAME
    )
    return Attached(peft_model, config, trainable)


def load(model: Any, folder: str | Path, trainable: bool = False) -> Attached:
    """Attach what a checkpoint holds: one of ours, or a PEFT LoRA (read as s0).

    Args:
        model: the base that it was made for.
        folder: written by `Attached.save`, `PeftModel.save_pretrained` or PEFT's LoRA.
        trainable: False: frozen, for inference.
    Raises:
        CheckpointError: missing, foreign or changed files.
        BaseMismatch: made for another base.
    """
    from bem.adapters import checkpoint

    return checkpoint.load(model, Path(folder), trainable)


__all__ = ["Attached", "attach", "load"]
