"""What is done about a text: a policy over a detector's findings. The strictest step of all categories counts.

    guard = PolicyGuard(policy, ViolationDetector().check, limits)
    ruling = guard.rule("Write to ada@example.org", "prompts", key="-")
    ruling.action, ruling.text                    # "redact", "Write to [email]"

Fails closed: a text that the detector could not read is refused, and a detector that does not answer is an
error (`DetectorDown`), which whoever asked turns into a refusal or into nothing at all.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from bem.config.safety import PERSONAL, Action, Ladders, Place, Rules, SafetyPolicy, Step
from bem.errors import ConfigError
from bem.safety.detector import Checked
from bem.safety.personal import PersonalData, redact

ORDER: tuple[Action, ...] = ("allow", "flag", "raise_kappa", "redact", "refuse")
"""From the mildest on."""
UNCHECKED = "unchecked"
REMEMBERED = 4096
"""Texts whose findings are kept: a conversation brings all its turns again with each one."""


@dataclass(frozen=True)
class Met:
    """A step that a text met."""

    category: str
    action: Action
    score: float
    reason: str
    """Without any of the text."""


@dataclass(frozen=True)
class Ruling:
    """What is done about one text."""

    action: Action
    """The strictest of all."""
    text: str
    """As it may go on: redacted, or as it was."""
    met: tuple[Met, ...] = ()
    kappa: float | None = None
    """Raised to this at least."""
    say: str = ""
    """A refusal's text."""
    redacted: tuple[PersonalData, ...] = ()
    """Places in the text as it was given."""

    @property
    def category(self) -> str:
        """For which the action is taken; "none" where nothing was met."""
        return next((m.category for m in self.met if m.action == self.action), "none")


class PolicyGuard:
    """Rules on texts; threads may share it, if they may share the detector."""

    def __init__(
        self,
        policy: SafetyPolicy,
        check: Callable[[str], Checked],
        limits: Mapping[str, float],
    ):
        """
        Args:
            check: of a detector; may raise `DetectorDown`.
            limits: category of that detector -> its own limit.
        Raises:
            ConfigError: the policy names a category that the detector does not know.
        """
        self.policy, self.limits, self._check = policy, dict(limits), check
        self._known: OrderedDict[bytes, Checked] = OrderedDict()
        self._lock = threading.Lock()
        known = (*self.limits, PERSONAL)
        for rules in (policy.rules, *policy.keys.values()):
            for place, category, _ in rules.steps():
                if category not in known:
                    raise ConfigError(f"{place}.{category}: the detector knows {', '.join(known)}.")

    def ladders(self, place: Place, key: str) -> Ladders:
        """What holds for a key's texts there; empty: they are not looked at."""
        rules: Rules = self.policy.keys.get(key, self.policy.rules)
        return getattr(rules, place)

    def rule(self, text: str, place: Place, key: str) -> Ruling:
        """What is done about a text.

        Raises:
            DetectorDown: nothing is known of it.
        """
        ladders = self.ladders(place, key)
        if not ladders:
            return Ruling("allow", text)
        checked = self._checked(text)
        if checked.error:
            met = Met(UNCHECKED, "refuse", 1.0, checked.findings[0].reason)
            return Ruling("refuse", text, (met,), say=self.policy.refusal)
        return self._ruling(text, checked, ladders)

    def _ruling(self, text: str, checked: Checked, ladders: Ladders) -> Ruling:
        met: list[Met] = []
        kappas: list[float] = []
        hidden: list[PersonalData] = []
        say = self.policy.refusal
        for category, step, score, finds in self._steps(checked, ladders):
            reason = f"{category} {score:.2f}" if not finds else f"personal data: {_kinds(finds)}"
            met.append(Met(category, step.do, score, reason))
            kappas += [step.kappa] if step.kappa is not None else []
            say = step.say or say
            hidden += finds if step.do == "redact" else []
        actions: list[Action] = [m.action for m in met]
        action: Action = "allow" if not actions else max(actions, key=lambda a: ORDER.index(a))
        found = sorted(set(hidden), key=lambda each: each.start)  # two steps may name one kind
        return Ruling(
            action, redact(text, found), tuple(met), max(kappas, default=None), say, tuple(found)
        )

    def _steps(
        self, checked: Checked, ladders: Ladders
    ) -> Iterator[tuple[str, Step, float, list[PersonalData]]]:
        """(category, the step that counts, score, finds) of each category that met one."""
        for category, steps in ladders.items():
            if category == PERSONAL:  # each step has kinds of its own: all of them count
                for step in steps:
                    finds = [p for p in checked.personal if not step.kinds or p.kind in step.kinds]
                    if finds:
                        yield category, step, 1.0, finds
                continue
            score, limit = checked.scores[category], self.limits[category]
            passed = [(limit if s.above is None else s.above, s) for s in steps]
            passed = [pair for pair in passed if score > pair[0]]
            if passed:
                yield category, max(passed, key=lambda pair: pair[0])[1], score, []

    def _checked(self, text: str) -> Checked:
        name = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            if name in self._known:
                self._known.move_to_end(name)
                return self._known[name]
        checked = self._check(text)
        if not checked.error:
            with self._lock:
                self._known[name] = checked
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return checked


def strictest(rulings: Sequence[Ruling]) -> Ruling:
    """One ruling of several texts: the strictest action, all that was met, the highest kappa."""
    if not rulings:
        return Ruling("allow", "")
    worst = max(rulings, key=lambda r: ORDER.index(r.action))
    met = tuple(m for r in rulings for m in r.met)
    kappa = max((r.kappa for r in rulings if r.kappa is not None), default=None)
    return Ruling(worst.action, worst.text, met, kappa, worst.say, worst.redacted)


def _kinds(finds: Sequence[PersonalData]) -> str:
    return ", ".join(sorted({f.kind for f in finds}))
