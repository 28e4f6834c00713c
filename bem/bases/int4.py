"""A frozen base whose decoder reads four bits a weight where few rows are computed, on a CPU.

Decoding one row reads weights and does little else, so a quarter of the bytes is up to half of the time; many rows at
once are faster as bfloat16 (benchmarks/results/int4.md). So a layer keeps both forms of the same numbers and
takes the one that is faster for the rows at hand:

    weight = d * q + m        q: 0 to 15, d and m: one for each 32 neighbours along the input

These are the blocks of a Q4_1 file (ggml), which are taken as they are: nothing is rounded twice. Weights that are no
such blocks are rounded to them, in both forms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from bem.bases.writes import written
from bem.errors import BaseError

log = logging.getLogger(__name__)

GROUP = 32
LEVELS = 15
FEW = 4
"""Rows up to which four bits are faster: benchmarks/results/int4.md."""


HELD = ("packed", "scales")
"""Buffers of a layer beside its weight."""


class PackedWeight(nn.Parameter):
    """The bfloat16 form of a weight, until it is written to (PEFT merging into it, say) or trains: then it is an
    `nn.Parameter` like any other, and the only form that counts."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_iter(written(func, args, kwargs)):
            if isinstance(leaf, PackedWeight):
                leaf.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedWeight, (self.data, self.requires_grad)


class Int4Linear(nn.Linear):
    """A frozen linear layer with its weight in bfloat16 and in groups of four bits.

    After a write to its weight it computes in bfloat16 alone.
    """

    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Int4Linear:
        """Both forms of a layer's weight, rounded to groups unless it consists of them."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        q, d, m = quantised(linear.weight.detach().float())
        made.weight = PackedWeight(dequantised(q, d, m).bfloat16(), requires_grad=False)
        if linear.bias is not None:
            made.bias = nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        made.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
        # what the kernel computes is (q - 8) * scale + zero
        scales = torch.stack([d, m + 8 * d], -1).transpose(0, 1).contiguous()
        made.register_buffer("scales", scales.bfloat16())
        made.training = linear.training
        return made

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        rows = input.numel() // self.in_features
        if not self._few(input, rows):
            with (
                torch._C.DisableTorchFunctionSubclass()
            ):  # a compiler cannot read what would be told
                return F.linear(input, self.weight, self.bias)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            input.reshape(rows, self.in_features), self.packed, GROUP, self.scales
        )
        y = y.reshape(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _few(self, input: Tensor, rows: int) -> bool:
        """The four-bit form is faster, and nothing asks for a gradient or another dtype."""
        if not 0 < rows <= FEW or (torch.is_grad_enabled() and input.requires_grad):
            return False
        if type(self._parameters["weight"]) is not PackedWeight:
            return False  # four bits would be those of before
        here = input.device.type == self.packed.device.type == "cpu"
        return here and input.dtype == self.scales.dtype == torch.bfloat16

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """A cast or a move is of both forms alike."""
        with self._both_forms():
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Numbers that come with their four bits are of both forms too."""
        alike = all(f"{prefix}{name}" in state_dict for name in ("weight", *HELD))
        with self._both_forms() if alike else nullcontext():
            super()._load_from_state_dict(state_dict, prefix, *rest)

    @contextmanager
    def _both_forms(self) -> Iterator[None]:
        """What is written inside is written to both forms."""
        was = type(self._parameters["weight"])
        yield
        weight = self._parameters["weight"]
        if was is PackedWeight and weight is not None:
            weight.__class__ = PackedWeight


def quantised(
    weight: Float[Tensor, "out in"],
) -> tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """(q, d, m) of a float32 weight: exactly its own where it consists of Q4_1 blocks, whose largest and
    smallest member are 15 and 0."""
    groups = weight.view(len(weight), -1, GROUP)
    m, largest = groups.amin(-1), groups.amax(-1)
    d = ((largest - m) / LEVELS).half().float()  # as a Q4_1 file holds it
    steps = (groups - m[..., None]) / d.where(d > 0, torch.ones_like(d))[..., None]
    return steps.round().clamp(0, LEVELS).to(torch.int32).view_as(weight), d, m


def dequantised(
    q: Int[Tensor, "out in"], d: Float[Tensor, "out groups"], m: Float[Tensor, "out groups"]
) -> Float[Tensor, "out in"]:
    """d * q + m, float32."""
    groups = q.view(len(q), -1, GROUP)
    return (d[..., None] * groups + m[..., None]).view(q.shape)


@torch.no_grad()
def with_int4(model: Any, exact: Any) -> Any:
    """The model with its decoder's linear layers in both forms, in place.

    Args:
        model: in bfloat16, on the CPU.
        exact: the same model in float32: the blocks of a Q4_1 file are still to be seen in it.
    Raises:
        BaseError: not on a CPU, or no layer has this form.
    """
    if model.device.type != "cpu":
        raise BaseError(f"dtype='int4' is for a CPU; this base is on {model.device}. Use bfloat16.")
    head = model.get_output_embeddings()
    places = [place for place in _linears(model) if place[2] is not head]
    if not places:
        raise BaseError(
            f"{type(model).__name__} has no linear layer of {GROUP} inputs or a multiple of them: load it in "
            "bfloat16."
        )
    layers, worst = dict(exact.named_modules()), 0.0
    for path, parent, linear in places:
        source = layers[path]
        made = Int4Linear.of(source)
        off = (dequantised(*quantised(source.weight)) - source.weight).abs().max()
        worst = max(worst, float(off / source.weight.abs().max()))
        made.training = linear.training
        setattr(parent, path.rpartition(".")[2], made)
    if worst:
        log.warning(
            "int4: weights were rounded by up to %.1f %% of a layer's largest.", 100 * worst
        )
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Linear]]:
    """(path, parent, layer) of plain linear layers that fit."""
    for above, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            assert isinstance(child, nn.Linear)
            if child.in_features % GROUP == 0 and child.out_features % 16 == 0:
                yield f"{above}.{name}".lstrip("."), parent, child
