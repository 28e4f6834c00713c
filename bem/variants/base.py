"""What every adapter declares, and the code from which it makes its control.

An adapter adds an update to the output of one frozen linear layer. What changes from chunk to chunk
is its *control*: a short vector that it derives from the controller's code and that then holds for
every token of the chunk. An adapter without control (width 0) is static.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Code:
    """What the controller knows about each chunk, from the tokens before it. Float32."""

    z: Tensor  # (batch, chunks, d_control)
    heads: (
        Tensor | None
    )  # (batch, chunks, 2 * n_heads): statistics of each head over the last chunk
    number: Tensor  # int (batch, chunks): how many chunks came before in the sequence, plus one
    evidence: Tensor | None = (
        None  # (batch, chunks, len(EVIDENCE_FEATURES)): known before each chunk
    )
    real: Tensor | None = None  # bool (batch, chunks): the slot holds tokens


@dataclass(frozen=True)
class Flops:
    """Matrix-product floating point operations (a multiply and an add count as two)."""

    per_token: int = 0
    per_chunk: int = 0  # spent once for every chunk slot, not for every token


class Adapter(nn.Module, ABC):
    """An update to one frozen linear layer. Abstract: subclasses are final."""

    control_width: int = 0  # floats of control per chunk; 0: static

    def control(self, code: Code) -> Tensor:
        """The control of each chunk, (batch, chunks, control_width). Static adapters are never asked."""
        raise NotImplementedError(f"{type(self).__name__} is static: it has no control.")

    @abstractmethod
    def update(self, y: Tensor, x: Tensor, control: Tensor | None) -> Tensor:
        """y plus the update for input x.

        Args:
            y: output of the frozen layer (batch, tokens, d_out).
            x: its input (batch, tokens, d_in).
            control: (batch, tokens, control_width) in the dtype of x, or None if static.
        """

    @abstractmethod
    def flops(self) -> Flops:
        """Price of one forward pass."""

    def penalty(self) -> Tensor | None:
        """Regulariser of the last forward pass, already weighted; None if there is none."""
        return None

    def after_step(self) -> None:
        """Called after every optimiser step: keep the weights inside their bounds."""
