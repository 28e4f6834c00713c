"""Online learning: how fast, how far, and what a change must show."""

from __future__ import annotations

from pydantic import Field, model_validator

from bem.config.section import Section, Seed


class OnlineConfig(Section):
    """What a learner may do with feedback, and what decides over it. Events are answered requests."""

    seed: Seed = 0
    """Of everything that is drawn."""

    learning_rate: float = Field(default=3e-3, gt=0)
    """Of AdamW for adapters, of the proximal step for routers."""
    batch_size: int = Field(default=16, ge=1)
    """Lessons in a step."""
    fresh_share: float = Field(default=0.5, ge=0, le=1)
    """Of a batch: the newest lessons."""
    trusted_share: float = Field(default=0.25, ge=0, le=1)
    """Of a batch: trusted lessons, if there are any, so that a growing reservoir does not crowd them out. The rest
    is drawn from everything that was, source by source."""
    round_size: int = Field(default=16, ge=1)
    """Events that are answered before the learner takes its steps."""
    steps_per_round: int = Field(default=1, ge=1)
    """Steps after each round."""
    max_length: int = Field(default=512, ge=8)
    """Longest sequence in tokens."""

    pull: float = Field(default=0.0, ge=0)
    """Towards the last accepted version: (pull / 2) |w - accepted|^2 in every step's objective."""
    ewc: float = Field(default=0.0, ge=0)
    """Strength of elastic weights; 0: none. Means something for one estimator of the Fisher alone."""
    largest_step: float = Field(default=0.05, gt=0)
    """Longest step, as a share of the weights' norm: a longer one is cut."""
    largest_distance: float = Field(default=1.0, gt=0)
    """From the last accepted version, as a share of its norm: a step beyond is discarded."""
    kl_near: float = Field(default=0.05, gt=0)
    """Routers: largest mean KL to the last accepted policy, nats."""
    kl_far: float = Field(default=2.0, gt=0)
    """Routers: largest mean KL to the policy that the learner began with, nats."""
    explore: float = Field(default=0.0, ge=0, le=0.5)
    """Routers: share of the requests that a random expert answers; without it no score says what another
    expert would have done."""

    capacity: int = Field(default=2000, ge=20)
    """Lessons that are kept to practise on."""
    held_capacity: int = Field(default=400, ge=20)
    """Labelled events that are never learned from: candidates must not lose on them."""
    held_share: float = Field(default=0.1, gt=0, lt=1)
    """Of the lessons, by a hash of their content, that are held out."""
    max_share: float = Field(default=0.05, gt=0, le=1)
    """Of either that one source may hold."""

    candidate_every: int = Field(default=200, ge=1)
    """Events between two candidates, at least."""
    metric: str = Field(default="score", min_length=1)
    """What the score is called in verdicts."""
    margin: float = Field(default=0.05, gt=0, lt=1)
    """A candidate is promoted when a loss of so much is ruled out: on what comes in, on what was held out, and on
    what is trusted."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """It is rolled back when a loss of more than this is shown."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Chance of a false promotion, and of a false rollback, of one candidate, over all looks together."""
    trial_events: int = Field(default=400, ge=1)
    """Events after which an undecided candidate is put away, and its shadow, which has learned meanwhile, may make
    another."""
    replay_events: int = Field(default=400, ge=1)
    """Events of what was held out, and as many of what is trusted, that a candidate answers at most when it is made."""
    events_per_source: int = Field(default=20, ge=1)
    """Events of one source that count in the trial of a candidate."""
    watch_events: int = Field(default=200, ge=0)
    """Events after a promotion for which the version before answers too, and takes over where it is better."""

    drift_window: int = Field(default=1000, ge=200)
    """Scores of the drift detector's reference."""
    sensitivity: float = Field(default=0.01, gt=0, le=0.5)
    """Chance of a false alarm within 20 windows."""
    snapshot_every: int = Field(default=10, ge=1)
    """Rounds between two snapshots; there is one around every promotion and rollback besides."""

    @model_validator(mode="after")
    def _settings_agree(self) -> OnlineConfig:
        if self.fresh_share + self.trusted_share > 1:
            raise ValueError(
                f"need fresh_share + trusted_share <= 1, got {self.fresh_share} and {self.trusted_share}"
            )
        if self.margin > self.tolerance:
            raise ValueError(
                f"need margin <= tolerance, got {self.margin} and {self.tolerance}: one candidate could be "
                "promoted and rolled back"
            )
        if self.kl_near > self.kl_far:
            raise ValueError(f"need kl_near <= kl_far, got {self.kl_near} and {self.kl_far}")
        return self
