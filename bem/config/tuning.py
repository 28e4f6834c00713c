"""The search for every arm's learning rate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bem.config.section import Section

Rate = Annotated[float, Field(gt=0)]


class TuningConfig(Section):
    """Successive halving over learning rates, with the same budget for every arm.

    Every trial is the beginning of the arm's own training at another peak rate. The half of the trials with
    the lower loss on the validation rows goes on to twice as many steps, until one is left; its training
    then goes on from there.
    """

    rates: tuple[Rate, ...] = Field(min_length=2)
    """Peak learning rates that are tried, from low to high."""
    steps: int = Field(ge=1)
    """Steps of the longest trials; those before them take half of it, a quarter ..."""

    @model_validator(mode="after")
    def _rates_rise(self) -> TuningConfig:
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates must be increasing, got {list(self.rates)}")
        shortest = self.steps >> (len(self.rungs) - 1)
        if not shortest:
            raise ValueError(
                f"steps {self.steps} are too few to be halved {len(self.rungs) - 1} times for "
                f"{len(self.rates)} rates"
            )
        return self

    @property
    def rungs(self) -> list[int]:
        """Steps after which the trials are compared: [8, 16, 32] for five to eight rates and 32 steps."""
        halvings = (len(self.rates) - 1).bit_length()
        return [self.steps >> (halvings - 1 - rung) for rung in range(halvings)]
