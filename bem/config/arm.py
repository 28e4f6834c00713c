"""One arm of an experiment, and what an arm cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from bem.config.adapters import KINDS, TrainingConfig
from bem.config.section import Folder, Section

KNOBS = tuple(dict.fromkeys(knob for kind in KINDS.values() for knob in kind.model_fields))
"""Of all variants."""


Route = Literal[
    "ar0", "ar1", "fitted", "oracle", "gold", "linear", "encoder", "single", "random", "wrong", "xlora",
    "arrow",
]  # fmt: skip
ROUTERS = ("ar1", "ar0", "fitted")
"""Routes that a router of ours decides; where one is shown for all, the first that a run has."""
LABELLED = ("fitted", "linear", "encoder")
"""Routes that learn from the makers' labels of `RoutingConfig.labelled_rows` conversations."""


class ArmConfig(Section):
    """One arm of an experiment: a name and what it changes in `adapters` (or no adapter at all)."""

    open_keys: ClassVar[Mapping[str, Sequence[str]]] = {
        "adapters": KNOBS,
        "training": tuple(TrainingConfig.model_fields),
    }

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in the report and on disk."""
    adapters: dict[str, Any] = {}
    """Changes to the experiment's `adapters` section: the variant, and knobs of that variant."""
    training: dict[str, Any] = {}
    """Changes to the experiment's `training` section: {learning_rate: 1.0e-3}."""
    route: Route | None = None
    """Who chooses between the experts of `routing`: ar0 cloned router | ar1 improved by policy
    gradient | fitted router by the makers' labels (`bem.fit_router`) | oracle least loss in hindsight | gold the maker's label | linear classifier on mean
    hidden states | encoder nearest centroid of each turn's sentence embedding | single best one
    expert | random, wrong controls | xlora, arrow PEFT's methods. None: no experts, the adapter of
    this arm."""
    shots: int | None = Field(default=None, ge=0)
    """The bare base instead of an adapter, asked behind so many training rows of the same skill, shown as
    earlier turns; 0: zero-shot. Of controls only. None: the adapter, or the route, of this arm."""
    checkpoint: Folder | None = None
    """Folder of a saved adapter of the arm's variant, or the name of a release (`bem-smol`): measured as it
    is. None: the adapter is trained."""
    match: Literal["parameters", "flops", "none"] = "parameters"
    """What is held within the budget tolerance of the baseline by choosing the rank."""
    role: Literal["baseline", "candidate", "control"] = "candidate"
    """Controls are measured and shown, never promoted."""
    compare_to: str | None = None
    """Arm that this one is judged against; None: the baseline."""

    @property
    def is_bare(self) -> bool:
        """The arm is the base itself: no adapter and no experts."""
        return self.shots is not None

    @property
    def has_adapter(self) -> bool:
        """The arm has an adapter of its own: it is neither bare nor routed."""
        return not self.is_bare and not self.route

    @property
    def is_trained(self) -> bool:
        """That adapter is trained here."""
        return self.has_adapter and self.checkpoint is None


def refuse_without_effect(arm: ArmConfig) -> None:
    """An arm's setting that something else decides would be dropped without a word."""
    if arm.is_bare:
        _refuse_with_shots(arm)
    if arm.checkpoint is not None:
        _refuse_with_checkpoint(arm)
    if arm.route and arm.adapters:
        raise ValueError(
            f"arms.{arm.name}: {', '.join(arm.adapters)} has no effect with a route: its experts are those of "
            "`routing`. Remove it"
        )
    if arm.route and arm.training:
        raise ValueError(
            f"arms.{arm.name}: training has no effect with a route: its experts are trained as "
            "`routing.training` says. Remove it"
        )
    if arm.role != "baseline" and arm.match != "none" and "rank" in arm.adapters:
        raise ValueError(
            f"arms.{arm.name}: rank {arm.adapters['rank']} has no effect under `match: {arm.match}`, which chooses "
            "the rank. Remove it, or set `match: none`"
        )


def _refuse_with_checkpoint(arm: ArmConfig) -> None:
    """What is saved is measured as it is."""
    knobs = ", ".join(knob for knob in arm.adapters if knob != "variant")
    decided = {"route": arm.route, "shots": arm.is_bare, "training": arm.training, knobs: knobs}
    decided["match"] = arm.match != "none" and arm.role != "baseline"
    if given := [name for name, value in decided.items() if value]:
        why = {"match": "Set `match: none`", "route": "Give `routing.checkpoint` instead"}
        raise ValueError(
            f"arms.{arm.name}: {given[0]} has no effect with a checkpoint, which is measured as it is. "
            + why.get(given[0], "Remove one")
        )


def _refuse_with_shots(arm: ArmConfig) -> None:
    """Nothing of the bare base is trained, matched, routed or promoted."""
    decided = {
        "adapters": arm.adapters,
        "training": arm.training,
        "route": arm.route,
        "match": arm.match != "parameters",
    }
    if given := [name for name, value in decided.items() if value]:
        raise ValueError(
            f"arms.{arm.name}: {', '.join(given)} has no effect with shots: {arm.shots}, which asks the bare base. "
            "Remove it, or remove shots"
        )
    if arm.role != "control":
        raise ValueError(
            f"arms.{arm.name}: role {arm.role} with shots: {arm.shots}, but the bare base has no adapter that could "
            "be promoted or that others could be matched to. Set `role: control`"
        )
