"""A policy at work in a server: what is asked, answered and said in feedback passes it, or does not go on.

Texts are judged on one thread, by a detector in a process of its own, so that neither the event loop nor the
engines wait for it. What cannot be judged, or not be put into the audit log, does not go through.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from bem.adapters.attached import Attached
from bem.config.safety import Place, load_policy
from bem.engine.request import Request, Result
from bem.errors import Refused, SafetyError
from bem.safety.audit import AuditLog
from bem.safety.basis import SafetyBasis, read_basis
from bem.safety.detector import SHIPPED
from bem.safety.guard import Met, PolicyGuard, Ruling, strictest
from bem.safety.knob import Knob
from bem.safety.personal import find_personal, redact
from bem.safety.protect import clamp_bare, protect
from bem.safety.weights import read_weights
from bem.safety.worker import DetectorDown, DetectorProcess
from bem.serving.driver import Driver
from bem.serving.feedback import FeedbackRequest
from bem.serving.generation import Answering, Answers, Decided
from bem.serving.guard_metrics import GuardMetrics
from bem.serving.judged import JudgedAnswering
from bem.serving.metrics import Metrics
from bem.serving.prompts import Prepared
from bem.serving.schemas import Asked, ChatRequest, CompletionRequest, Message

log = logging.getLogger(__name__)

T = TypeVar("T")
DOWN = "unchecked"


@dataclass(frozen=True)
class Admission:
    """What a request is allowed."""

    asked: Asked
    """Redacted, if the policy says so."""
    ruling: Ruling
    kappa: float | None = None
    """As the policy or the request itself raised it."""


class Guarding:
    """One policy, its detector, its notes. Without a policy everything goes through, untouched."""

    def __init__(self, path: str | None, metrics: Metrics, tokenizer: Any):
        """
        Args:
            path: of the policy; None: there is none.
        Raises:
            ConfigError: no policy, or one that names what the detector does not know.
            CheckpointError: no basis where the policy names one.
        """
        self.policy = None if path is None else load_policy(path)
        self.tokenizer = tokenizer
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """(place, category, action) -> texts."""
        self.failures = 0
        self.basis: SafetyBasis | None = None
        self.knob: Knob | None = None
        if self.policy is None:
            return
        policy = self.policy
        self.detector = DetectorProcess(SHIPPED, policy.timeout_ms)
        limits = {c.name: c.limit for c in read_weights(SHIPPED).categories}
        self.guard = PolicyGuard(policy, self.detector.check, limits)
        audit = None if policy.audit is None else Path(policy.audit)
        self.audit = AuditLog(audit, policy.keep_text)
        self.metrics = GuardMetrics(metrics, lambda: self.detector.alive)
        self._thread = ThreadPoolExecutor(1, "guard")
        if (knob := policy.knob) is not None:
            self.basis, self.knob = read_basis(knob.basis), Knob(knob.level, knob.floor)

    def warn_of(self, keys: Iterable[str]) -> None:
        """Say which keys of the policy there are none of: their rules would hold for nobody."""
        named = set() if self.policy is None else set(self.policy.keys)
        for name in sorted(named - set(keys)):
            log.warning("the policy has rules for key %r, and there is no such key", name)

    def start(self) -> None:
        """Start the detector, so that the first request does not wait for it."""
        if self.policy is not None:
            self._thread.submit(self.detector.start)

    def close(self) -> None:
        """End it."""
        if self.policy is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self.detector.close()

    def on_model(self, adapted: Any) -> Any:
        """Put the basis on a version, adapted or bare, before it answers anything.

        Raises:
            BaseMismatch: it was fitted for another base.
            SafetyError: the version cannot be guarded.
        """
        if self.basis is not None and self.knob is not None:
            if isinstance(adapted, Attached):
                protect(adapted, self.basis, self.knob)
            else:
                clamp_bare(adapted, self.basis, self.knob)
        return adapted

    # --- what is asked ----------------------------------------------------------------------------

    async def admit(self, asked: Asked, id: str, key: str) -> Admission:
        """Judge a request before anything of it is read by a model.

        Raises:
            Refused: 503, the detector gives no answer; 400, a kappa where nothing can be clamped.
        """
        wanted = asked.bem.kappa
        if wanted is not None and self.basis is None:
            why = "bem.kappa needs a safety basis: start the server with a policy that has a knob."
            raise Refused(400, why, "bem.kappa", "unsupported_value")
        if self.policy is None or not self.guard.ladders("prompts", key):
            return Admission(asked, Ruling("allow", ""), wanted)
        ruling, asked = await self._run(self._judged, asked, id, key)
        kappas = [k for k in (wanted, ruling.kappa) if k is not None]
        return Admission(asked, ruling, max(kappas, default=None))

    def _judged(self, asked: Asked, id: str, key: str) -> tuple[Ruling, Asked]:
        texts = texts_of(asked, self._decoded)
        rulings = [self.rule(text, "prompts", key) for text in texts]
        ruling = strictest(rulings)
        if ruling.action == "redact":
            asked = redacted(asked, {p.kind for r in rulings for p in r.redacted})
            again = [self.rule(t, "prompts", key) for t in texts_of(asked, self._decoded)]
            if any(r.action == "redact" for r in again):  # token ids, or parts that say it together
                ruling = replace(ruling, action="refuse")
        self.note(id, key, "prompts", "\n".join(texts), ruling)
        return ruling, asked

    def _decoded(self, ids: list[int]) -> str:
        """Token ids as text; those that the tokenizer does not know have none."""
        known = len(self.tokenizer)
        return self.tokenizer.decode([i for i in ids if i < known])

    # --- what is answered -------------------------------------------------------------------------

    def answering(
        self,
        admission: Admission,
        prepared: Prepared,
        submit: tuple[Driver, str, Sequence[Request], bool],
        id: str,
        key: str,
    ) -> Answers:
        """The answers to a request: a refusal, judged ones, or as they come.

        Args:
            submit: of `Answering`: driver, engine, requests, streams.
        """
        if admission.ruling.action == "refuse":
            prompts = [len(prompt.ids) for prompt in prepared.prompts]
            return Decided(refusals(submit[2], prompts, admission.ruling.say))
        driver, engine, requests, streams = submit
        raised = [replace(request, kappa=admission.kappa) for request in requests]
        answering = Answering(driver, engine, raised, streams)
        if self.policy is None or not self.guard.ladders("answers", key):
            return answering
        return JudgedAnswering(answering, self, id, key)

    async def ruled(self, text: str, key: str) -> Ruling:
        """What is done about a part of an answer.

        Raises:
            Refused: 503, the detector gives no answer.
        """
        return await self._run(self.rule, text, "answers", key)

    async def noted(self, id: str, key: str, text: str, ruling: Ruling) -> None:
        """Count an answer, and put it into the audit log."""
        await self._run(self.note, id, key, "answers", text, ruling)

    # --- what is said of it -----------------------------------------------------------------------

    async def feedback(self, said: FeedbackRequest, key: str) -> FeedbackRequest:
        """Feedback as it may be kept.

        Raises:
            Refused: 400, its text is refused; 503, the detector gives no answer.
        """
        if self.policy is None or said.text is None or not self.guard.ladders("feedback", key):
            return said
        ruling = await self._run(self._judged_feedback, said.request, said.text, key)
        if ruling.action == "refuse":
            raise Refused(400, ruling.say, "text", "content_filter")
        return said.model_copy(update={"text": ruling.text})

    def _judged_feedback(self, id: str, text: str, key: str) -> Ruling:
        ruling = self.rule(text, "feedback", key)
        self.note(id, key, "feedback", text, ruling)
        return ruling

    # --- on the guard's thread --------------------------------------------------------------------

    def rule(self, text: str, place: Place, key: str) -> Ruling:
        """See `PolicyGuard.rule`; where the policy refuses on errors, it does.

        Raises:
            DetectorDown: nothing is known, and the policy says: unavailable.
        """
        assert self.policy is not None
        began = time.monotonic()
        try:
            return self.guard.rule(text, place, key)
        except DetectorDown as error:
            self.failures += 1
            self.metrics.failed()
            log.error("%s", error)
            if self.policy.on_error == "unavailable":
                raise
            met = Met(DOWN, "refuse", 1.0, str(error))
            return Ruling("refuse", text, (met,), say=self.policy.refusal)
        finally:
            self.metrics.took(time.monotonic() - began)

    def note(self, id: str, key: str, place: str, text: str, ruling: Ruling) -> None:
        """Count a text's ruling; what was not simply let through goes into the audit log first.

        Raises:
            SafetyError: it cannot be written.
        """
        if ruling.action != "allow":
            self.audit.note(id, key, place, text, ruling)
        said = place, ruling.category, ruling.action
        self.counts[said] += 1
        self.metrics.decided(*said)

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        except SafetyError as error:
            log.error("%s", error)
            why = "What is asked and answered here is checked first, and cannot be now."
            raise Refused(503, why, None, "guard_unavailable", retry_after_s=5) from None

    def shown(self) -> dict[str, Any] | None:
        """For the dashboard; None: there is no policy."""
        if self.policy is None:
            return None
        rows = [{"place": p, "category": c, "action": a, "texts": n} for (p, c, a), n in sorted(self.counts.items())]  # fmt: skip
        kappa = None if self.knob is None else {"level": self.knob.level, "floor": self.knob.floor}
        return {"detector": self.detector.alive, "failures": self.failures, "counts": rows, "kappa": kappa}  # fmt: skip


def texts_of(asked: Asked, decode: Callable[[list[int]], str]) -> list[str]:
    """All that a request has a model read, message by message; those of one speaker in a row are one text."""
    found = list(asked.bem.evidence or ())
    if isinstance(asked, ChatRequest):
        runs = groupby(asked.messages, key=lambda m: "system" if m.role == "developer" else m.role)
        found += ["\n".join(_all_of(m) for m in run) for _, run in runs]
        found += [json.dumps(tool.model_dump(mode="json")) for tool in asked.tools or ()]
        return found
    assert isinstance(asked, CompletionRequest)
    given: Any = asked.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    for prompt in given if several else [given]:
        found.append(prompt if isinstance(prompt, str) else decode(prompt))
    return found


def _all_of(message: Message) -> str:
    """Its text, and whatever else of it a template may show."""
    beside = message.model_dump(mode="json", exclude={"role", "content"}, exclude_none=True)
    return f"{message.text}\n{json.dumps(beside)}" if beside else message.text


def redacted(asked: Asked, kinds: set[str]) -> Asked:
    """A request whose texts hold no personal data of these kinds; token ids stay what they are."""

    def clean(text: str) -> str:
        return redact(text, [p for p in find_personal(text) if p.kind in kinds])

    evidence = asked.bem.evidence and [clean(text) for text in asked.bem.evidence]
    update: dict[str, Any] = {"bem": asked.bem.model_copy(update={"evidence": evidence})}
    if isinstance(asked, ChatRequest):
        update["messages"] = [_clean_message(m, clean) for m in asked.messages]
    elif isinstance(asked, CompletionRequest):
        given: Any = asked.prompt
        one = clean(given) if isinstance(given, str) else None
        update["prompt"] = one or [clean(p) if isinstance(p, str) else p for p in given]
    return asked.model_copy(update=update)


def _clean_message(message: Message, clean: Callable[[str], str]) -> Message:
    content: Any = message.content
    if isinstance(content, str):
        content = clean(content)
    elif content is not None:
        content = [p.model_copy(update={"text": clean(p.text)}) if isinstance(getattr(p, "text", None), str) else p for p in content]  # fmt: skip
    return message.model_copy(update={"content": content})


def refusals(requests: Sequence[Request], prompts: Sequence[int], say: str) -> list[Result]:
    """A refusal for each choice; prompts: tokens of each prompt, of which nothing was computed."""
    each = len(requests) // len(prompts)
    return [
        Result(i, (), "", "filtered", request.version or "", prompts[i // each], 0, error=say)
        for i, request in enumerate(requests)
    ]
