"""What a server does about texts that a detector finds: a policy file, see docs/safety.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from bem.config.section import Folder, Section, parse
from bem.errors import ConfigError

Action = Literal["allow", "flag", "raise_kappa", "redact", "refuse"]
Place = Literal["prompts", "answers", "feedback"]
PERSONAL = "personal"
"""The category of personal data, beside those of the detector."""
PersonalKind = Literal["email", "card", "iban", "ssn", "ip", "phone"]


class Step(Section):
    """One rung of a category's ladder: the highest one that a score passes counts."""

    do: Action
    above: float | None = Field(None, ge=0, le=1)
    """Probability; None: the detector's own limit. Personal data has none: a find counts."""
    kappa: float | None = Field(None, gt=0, le=1)
    """raise_kappa: to what, at least."""
    kinds: tuple[PersonalKind, ...] = ()
    """Personal data: which; none named: all."""
    say: str | None = Field(None, min_length=1, max_length=2000)
    """refuse: instead of the policy's text."""

    @model_validator(mode="after")
    def _kappa_where_it_is_raised(self) -> Step:
        if (self.do == "raise_kappa") != (self.kappa is not None):
            raise ValueError("raise_kappa needs kappa, and nothing else has one")
        if self.say is not None and self.do != "refuse":
            raise ValueError("say belongs to refuse")
        return self


Ladders = Mapping[str, tuple[Step, ...]]
"""Category -> its steps."""


class Rules(Section):
    """What is done where; a category that is not named is let through there."""

    prompts: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    answers: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    feedback: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    """Texts of corrections, before they are kept."""

    @model_validator(mode="after")
    def _steps_fit_their_place(self) -> Rules:
        for place, category, step in self.steps():
            where = f"{place}.{category}"
            if step.do == "raise_kappa" and place != "prompts":
                raise ValueError(f"{where}: kappa is raised before an answer begins: under prompts")
            if step.do == "redact" and category != PERSONAL:
                raise ValueError(f"{where}: redact is for {PERSONAL} alone")
            if category == PERSONAL and step.above is not None:
                raise ValueError(f"{where}: personal data has no probability, leave `above` out")
            if step.kinds and category != PERSONAL:
                raise ValueError(f"{where}: kinds are of {PERSONAL} alone")
        return self

    def steps(self) -> Iterator[tuple[Place, str, Step]]:
        """(place, category, step) of all."""
        named: tuple[tuple[Place, Ladders], ...] = (
            ("prompts", self.prompts),
            ("answers", self.answers),
            ("feedback", self.feedback),
        )
        for place, ladders in named:
            for category, steps in ladders.items():
                for step in steps:
                    yield place, category, step


class StreamRules(Section):
    """How an answer is read while it is made. In characters; a reader sees nothing that was not checked."""

    check_every: int = Field(120, ge=1)
    """New characters between two looks."""
    hold_back: int = Field(80, ge=48)
    """What stands at the end waits for what follows it: longer than the longest card number or IBAN."""
    remembered: int = Field(400, ge=0)
    """What was sent that is read again with each look."""


class KnobRules(Section):
    """A safety basis on every version, see docs/safety.md."""

    basis: Folder
    """Folder of `bem safety fit`, for the base that is served."""
    level: float = Field(0.0, ge=0, le=1)
    floor: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _level_from_the_floor(self) -> KnobRules:
        if self.level < self.floor:
            raise ValueError(f"level {self.level} lies below the floor {self.floor}")
        return self


class SafetyPolicy(Section):
    """Of one server."""

    rules: Rules
    keys: dict[str, Rules] = Field(default_factory=dict)
    """Name of an API key -> rules instead of these: whole, not merged."""
    refusal: str = Field("I cannot help with that.", min_length=1, max_length=2000)
    on_error: Literal["unavailable", "refuse"] = "unavailable"
    """When the detector does not answer: status 503, or a refusal. Nothing goes through unchecked."""
    timeout_ms: float = Field(2000.0, gt=0)
    """For one text; a detector that takes longer is started anew."""
    audit: Folder | None = None
    """JSON Lines of everything that was not simply let through; None: none."""
    keep_text: bool = False
    """Write the texts to it too."""
    stream: StreamRules = Field(default_factory=lambda: StreamRules.model_validate({}))
    knob: KnobRules | None = None
    """None: kappa cannot be raised."""

    @model_validator(mode="after")
    def _kappa_needs_a_basis(self) -> SafetyPolicy:
        raised = [s for rules in (self.rules, *self.keys.values()) for _, _, s in rules.steps() if s.kappa]  # fmt: skip
        if raised and self.knob is None:
            raise ValueError("raise_kappa needs knob.basis: what is to be raised without one?")
        return self


def load_policy(path: str | Path) -> SafetyPolicy:
    """Read a policy from YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest is named) or a bad value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no policy that can be read: {error}") from None
    return parse(SafetyPolicy, values, str(path))
