"""What every variant declares, and the code from which it makes its control.

A variant adds an update to the output of one frozen linear layer, or modulates the residual stream.
What changes from chunk to chunk is its *control*: a short vector that it derives from the
controller's code and that then holds for every token of the chunk. Width 0: static.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bem.errors import AttachError
from bem.variants.forbidden import Forbidden


@dataclass(frozen=True)
class Code:
    """What the controller knows about each chunk, from the tokens before it.

    z and heads lie on a coarse grid (see `Controller`), so that a sequence has the same code alone, in a
    batch and through a cache. Whatever is made of them is computed in float64 and rounded once.
    """

    z: Float[Tensor, "batch chunks d_control"]
    heads: Float[Tensor, "batch chunks stats"] | None
    """2 statistics of each head over the last chunk."""
    number: Int[Tensor, "batch chunks"]
    """How many chunks came before in the sequence, plus one."""
    real: Bool[Tensor, "batch chunks"]
    """The slot holds tokens."""
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    """Name -> (batch, chunks, width), known before each chunk; all zero where nothing was given."""
    dtype: torch.dtype = torch.float32
    """In which the control will be applied."""


@dataclass(frozen=True)
class Flops:
    """Matrix-product floating point operations (a multiply and an add count as two)."""

    per_token: int = 0
    per_chunk: int = 0  # spent once for every chunk slot, not for every token


Update = Callable[..., Tensor]
"""See `Adapter.update`."""


class Adapter(nn.Module, ABC):
    """An update to one frozen linear layer. Abstract: subclasses are final."""

    control_width: int = 0  # floats of control per chunk; 0: static
    rank: int = 0
    scale: float = 1.0  # factor of the update
    forbidden: Forbidden | None = None
    """Output directions that it leaves alone; see `protect`."""

    def control(self, code: Code) -> Float[Tensor, "batch chunks width"]:
        """The control of each chunk, float64. Static adapters are never asked."""
        raise NotImplementedError(f"{type(self).__name__} is static: it has no control.")

    @abstractmethod
    def update(
        self,
        y: Float[Tensor, "*tokens out"],
        x: Float[Tensor, "*tokens in"],
        control: Float[Tensor, "rows width"] | None,
        slot: Int[Tensor, " n"] | None,
    ) -> Float[Tensor, "*tokens out"]:
        """y plus the update for input x.

        Args:
            y: output of the frozen layer.
            x: its input.
            control: table of controls in the dtype of x; None if static.
            slot: row of the table of each token, in flattened order; None: see `masked_low_rank`.
        """

    def ready(self, dtype: torch.dtype, rows: int) -> Update:
        """`update` for one decoded token of so many rows, looked up once for a chunk.

        It holds as long as no weight changes and no gradient is wanted.
        """
        return self.update

    @abstractmethod
    def flops(self) -> Flops:
        """Price of one forward pass."""

    def penalty(self) -> Tensor | None:
        """Regulariser of the last forward pass, already weighted; None if there is none."""
        return None

    def after_step(self) -> None:
        """Called after every optimiser step: keep the weights inside their bounds."""
        self.keep_out()

    def protect(self, forbidden: Forbidden | None) -> None:
        """Write into none of these output directions, whatever the control, from now on; None: into all.

        Weights that do are projected, now and after every step.
        """
        self.forbidden = forbidden
        self.keep_out()

    def keep_out(self) -> None:
        """Bring the weights out of the forbidden directions, if there are any."""
        for factor in self.writers() if self.forbidden is not None else ():
            self.forbidden.keep_out(factor)

    def writers(self) -> Sequence[Tensor]:
        """The factors (out, rank) that write; none, where `update` itself leaves the directions out.

        Raises:
            AttachError: the variant has no such factor and does not say how else it keeps out.
        """
        raise AttachError(
            f"{type(self).__name__} cannot be protected: override `writers`, see `bem.variants.base.Adapter`."
        )


def linear64(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float64, whatever dtype its weights have."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)
