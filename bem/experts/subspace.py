"""Experts that cannot disturb each other: each writes into output directions of its own.

If U_e^T U_f = 0 for every two experts, the squared norm of a composed update is the sum of the squared
norms of its parts, and what one expert writes is not undone by another. Directions are reserved before
training, as random orthonormal bases; whether skills still get into each other's way (through the
layers above) is measured, see `interference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bem.errors import AttachError, MeasurementError


def reserve(d_out: int, dims: Sequence[int], seed: int) -> list[Float[Tensor, "out dim"]]:
    """One orthonormal basis (d_out, dim) for each expert, all orthogonal to each other. Float32.

    Args:
        d_out: width of the site's output.
        dims: directions of each expert; 0: none.
        seed: same seed, same bases.
    Raises:
        AttachError: more directions than the output has.
    """
    if min(dims, default=0) < 0 or sum(dims) > d_out:
        raise AttachError(
            f"{len(dims)} experts want {sum(dims)} directions of their own ({', '.join(map(str, dims))}), the output "
            f"has {d_out}. Lower the ranks or the number of experts, or share directions."
        )
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(d_out, sum(dims), generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.linalg.qr(random).Q.float()
    return [part.contiguous() for part in basis.split(list(dims), dim=1)]


def orthogonality_error(blocks: Sequence[Float[Tensor, "out dim"]]) -> float:
    """Largest |cosine| between a column of one block and a column of another; zero columns count 0."""
    units = [
        torch.nn.functional.normalize(block.detach().double(), dim=0, eps=1e-300)
        for block in blocks
    ]
    worst = 0.0
    for i, one in enumerate(units):
        for other in units[i + 1 :]:
            if one.numel() and other.numel():
                worst = max(worst, float((one.t() @ other).abs().max()))
    return worst


def orthonormality_error(basis: Float[Tensor, "out dim"]) -> float:
    """Largest |B^T B - I| of a basis."""
    if not basis.numel():
        return 0.0
    inner = basis.detach().double().t() @ basis.detach().double()
    return float(
        (inner - torch.eye(len(inner), dtype=inner.dtype, device=inner.device)).abs().max()
    )


@dataclass(frozen=True)
class Loss:
    """One expert's answer loss alone and with the others mounted (nats per token, or any loss > 0)."""

    expert: str
    alone: float
    mounted: float

    @property
    def growth(self) -> float:
        """Relative: 0.02 is two percent worse."""
        return self.mounted / self.alone - 1.0


@dataclass(frozen=True)
class Interference:
    """What each expert loses when the others are mounted."""

    losses: tuple[Loss, ...]
    limit: float

    @property
    def passed(self) -> bool:
        """No expert loses more than the limit."""
        return all(loss.growth <= self.limit for loss in self.losses)

    def table(self) -> str:
        """Plain text, one line per expert."""
        width = max(len("expert"), *(len(loss.expert) for loss in self.losses))
        lines = [f"{'expert':<{width}}   alone  mounted   growth"]
        for loss in self.losses:
            verdict = "ok" if loss.growth <= self.limit else f"over {self.limit:.1%}"
            lines.append(
                f"{loss.expert:<{width}}  {loss.alone:6.4f}   {loss.mounted:6.4f}  {loss.growth:+7.2%}  {verdict}"
            )
        return "\n".join(lines)


def interference(
    alone: dict[str, float], mounted: dict[str, float], limit: float = 0.02
) -> Interference:
    """Compare each expert's loss alone with its loss among the others.

    Args:
        alone: expert -> loss on its own data, nothing else mounted.
        mounted: expert -> the same with all experts mounted.
        limit: largest relative growth that passes.
    Raises:
        MeasurementError: other experts on one side, or a loss that is not a positive number.
    """
    if alone.keys() != mounted.keys() or not alone:
        odd = sorted(alone.keys() ^ mounted.keys())
        raise MeasurementError(
            f"interference needs both losses of every expert; missing: {odd or 'all'}."
        )
    for name, loss in [*alone.items(), *mounted.items()]:
        if not (math.isfinite(loss) and loss > 0):
            raise MeasurementError(
                f"the loss of expert {name!r} is {loss}: growth cannot be computed."
            )
    return Interference(tuple(Loss(n, alone[n], mounted[n]) for n in alone), limit)
