"""What is usual: a Gaussian of vectors, and the distance that so many of the pictures it knows stay below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from bem.errors import DataError

FEWEST = 20
RIDGE = 1e-3
"""Added to every variance."""


@dataclass(frozen=True)
class Usual:
    """mean over a picture's vectors of |(x - centre) whiten|^2 / d, against its limit."""

    centre: Tensor
    """(d,)."""
    whiten: Tensor
    """(d, d)."""
    limit: float

    def distance(self, vectors: Tensor) -> Tensor:
        """Of each vector (..., d): squared Mahalanobis distance per dimension (...)."""
        return ((vectors - self.centre) @ self.whiten).square().mean(-1)

    def strangeness(self, vectors: Tensor) -> Tensor:
        """Of one picture's vectors (n, d): above 1 it lies beyond the limit."""
        return self.distance(vectors).mean() / self.limit

    @property
    def digest(self) -> str:
        """Of all of it."""
        raw = (
            self.centre.numpy().tobytes() + self.whiten.numpy().tobytes() + str(self.limit).encode()
        )
        return sha256(raw).hexdigest()


def fit_usual(known: Sequence[Tensor], kept: Sequence[Tensor], share: float = 0.99) -> Usual:
    """Fit the Gaussian to some pictures, and the limit to others (split-conformal).

    Args:
        known, kept: vectors (n, d) of each picture.
        share: of further pictures of this kind that stay below the limit.
    Raises:
        DataError: fewer than 20 pictures in either.
    """
    if min(len(known), len(kept)) < FEWEST:
        raise DataError(
            f"what is usual needs {FEWEST} pictures to fit and as many to set its limit, got {len(known)} and {len(kept)}."
        )
    vectors = torch.cat(list(known)).double()
    centre = vectors.mean(0)
    covariance = torch.cov(vectors.T) + RIDGE * torch.eye(vectors.shape[1]).double()
    whiten = torch.linalg.cholesky(torch.linalg.inv(covariance)).contiguous()
    fitted = Usual(centre.float(), whiten.float(), 1.0)
    far = sorted(float(fitted.strangeness(one)) for one in kept)
    limit = far[min(len(far), math.ceil(share * (len(far) + 1))) - 1]
    return Usual(fitted.centre, fitted.whiten, limit)
