"""Output directions into which an update must not write, whatever its control.

For an orthonormal basis P (out, s) and every writer U of a residual stream: P^T U = 0, so that
P^T U diag(c) V x = 0 for every gate, mask, strength and sum of experts c. Held by projecting U in
float64, now and after every step. An update that has no such factor is projected where it is applied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bem.errors import AttachError

LEAK = 1e-6
"""Largest ||P^T u|| / ||u|| that stays as it is: float32 holds nothing better, and a state that is loaded
again must keep its bits."""


class Forbidden:
    """An orthonormal basis of the directions that are kept free."""

    def __init__(self, basis: Float[Tensor, "out s"]):
        """
        Raises:
            AttachError: not orthonormal within 1e-5, or not finite.
        """
        self.basis = basis.detach().double()
        inner = self.basis.mT @ self.basis
        error = float((inner - torch.eye(len(inner), dtype=inner.dtype, device=inner.device)).abs().max()) if inner.numel() else 0.0  # fmt: skip
        if not error <= 1e-5:  # also true for NaN
            raise AttachError(
                f"the basis {tuple(basis.shape)} is orthonormal only within {error:.1e}, 1e-5 is needed."
            )
        self._cast: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    @torch.no_grad()
    def keep_out(self, u: Float[Tensor, "out rank"]) -> None:
        """Project a factor in place, unless it leaks no more than `LEAK`."""
        if self.leak(u) > LEAK:
            exact, basis = u.detach().double(), self._as(torch.float64, u.device)
            u.copy_(exact - basis @ (basis.mT @ exact))

    def leak(self, u: Float[Tensor, "out rank"]) -> float:
        """||P^T u||_F / ||u||_F; 0 for a factor that is zero."""
        exact = u.detach().double()
        norm = float(exact.norm())
        return float((self._as(torch.float64, u.device).mT @ exact).norm()) / norm if norm > 0 else 0.0  # fmt: skip

    def without(self, delta: Float[Tensor, "*tokens out"]) -> Float[Tensor, "*tokens out"]:
        """(I - P P^T) of what is about to be added; in float32 at least."""
        wide = delta if delta.dtype == torch.float64 else delta.float()
        basis = self._as(wide.dtype, delta.device)
        return (wide - (wide @ basis) @ basis.mT).to(delta.dtype)

    def inside(self, reserved: Float[Tensor, "out r"]) -> Float[Tensor, "out m"]:
        """The directions of an orthonormal basis that are free of these: span(reserved) with P^T x = 0.

        Raises:
            AttachError: there are none.
        """
        mixed = self._as(torch.float64, reserved.device).mT @ reserved.double()
        _, values, right = torch.linalg.svd(mixed, full_matrices=True)
        rank = int((values > 1e-9).sum())
        if reserved.shape[1] and rank == reserved.shape[1]:
            raise AttachError(
                f"{reserved.shape[1]} reserved directions lie wholly within the {self.basis.shape[1]} forbidden ones: "
                "raise the expert's rank, or mount it without orthogonal=True."
            )
        return (reserved.double() @ right[rank:].mT).to(reserved.dtype)

    def _as(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if (dtype, device) not in self._cast:
            with torch.inference_mode(False):
                self._cast[dtype, device] = self.basis.to(device, dtype)
        return self._cast[dtype, device]
