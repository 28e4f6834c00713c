"""The canonical form of a low-rank update: its singular value decomposition."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bem.adapters.lora import Update


def singular_form(
    update: Update, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """(U S, V^T) of u @ v in float64, largest singular value first, padded to `rank`.

    V^T has unit rows, orthogonal to each other as long as the input is wide enough, also where S is
    zero and where ranks are padded: a rank that does nothing yet can still learn. The SVD is that of
    the small core R_u R_v^T of the factors' QR decompositions.
    """
    if _is_canonical(update, rank):
        return update.u.detach().double(), update.v.detach().double()
    q_u, r_u = torch.linalg.qr(update.u.detach().double())
    q_v, r_v = torch.linalg.qr(update.v.detach().double().t())
    left, values, right = torch.linalg.svd(r_u @ r_v.t(), full_matrices=False)
    u, v = q_u @ (left * values), (q_v @ right.t()).t()
    missing = rank - len(values)
    if missing <= 0:
        return u, v
    spare = u.new_zeros(len(u), missing)
    return torch.cat([u, spare], 1), torch.cat([v, _orthogonal_rows(v, missing)])


def _orthogonal_rows(v: Float[Tensor, "rank in"], count: int) -> Float[Tensor, "count in"]:
    """Unit rows orthogonal to those of v and to each other; random ones where there is no room left."""
    generator = torch.Generator().manual_seed(len(v))
    rows = torch.randn(count, v.shape[1], generator=generator, dtype=v.dtype, device="cpu").to(
        v.device
    )
    free = min(count, v.shape[1] - len(v))
    inside = rows[:free]
    for _ in range(2):  # twice: what rounding leaves of the first time
        inside = inside - (inside @ v.t()) @ v
        inside = torch.linalg.qr(inside.t()).Q.t()
    others = torch.nn.functional.normalize(rows[free:], dim=1)
    return torch.cat([inside, others])


def _is_canonical(update: Update, rank: int) -> bool:
    """Is it in this form already, up to float32 rounding? Then it keeps its bits: what is saved and
    read again has the digest that it had."""
    if len(update.v) != rank or not rank:
        return False
    u, v = update.u.detach().double(), update.v.detach().double()
    values = u.norm(dim=0)
    off = (v @ v.t() - torch.eye(len(v), dtype=v.dtype, device=v.device)).abs().max()
    inner = u.t() @ u
    across = (inner - torch.diag(inner.diagonal())).abs().max()
    ordered = bool((values[:-1] >= values[1:] * (1 - 1e-6)).all())
    return ordered and not (off > 1e-5 or across > 1e-5 * float(values.max()) ** 2)
