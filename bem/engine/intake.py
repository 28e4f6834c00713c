"""From requests to sequences: what can never be served is refused before it waits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from bem.control.generation import CONDITIONING, conditioning_of
from bem.engine.acts import Acts
from bem.engine.answers import Reader
from bem.engine.grammar import Grammars
from bem.engine.request import Request
from bem.engine.sequence import Sequence
from bem.engine.versions import Versions
from bem.errors import EngineError
from bem.safety.protect import knob_of


class Intake:
    """Checks requests, and makes of each as many sequences as it wants answers."""

    def __init__(self, base: Any, reader: Reader, versions: Versions, max_tokens: int, queue: int):
        """
        Args:
            max_tokens: of the longest sequence, prompt and answer.
            queue: requests that may wait.
        """
        self.reader, self.versions, self.max_tokens, self.queue = (
            reader,
            versions,
            max_tokens,
            queue,
        )
        self.base = base
        self.entries = base.get_input_embeddings().weight.shape[0]
        self.grammars = Grammars(reader.tokenizer, reader.ends, self.entries)

    def sequences(self, request: Request, number: int, now: float) -> list[Sequence]:
        """One for each answer.

        Args:
            number: of the request.
            now: by the engine's clock.
        Raises:
            EngineError: it can never be served.
            MissingExtra: it has a grammar, and llguidance is not installed.
        """
        ids = self.reader.ids_of(request.prompt)
        self._check_tokens(request, ids)
        if request.n > self.queue:
            raise EngineError(f"n is {request.n}, and no more than {self.queue} requests may wait.")
        named = None if request.version is None else self.versions.find(request.version)
        acts = named or self.versions.current
        acts.at_strength(request.strength).option(request.route)
        request = self._raised(request)
        for name, told in told_of(request, acts).items():
            if told.shape != (acts.reads[name],):
                raise EngineError(
                    f"{name} has {tuple(told.shape)} numbers, the adapter reads {acts.reads[name]}."
                )
        made: list[Sequence] = []
        for sample in range(request.n):
            first = made[0] if made else None
            one = Sequence(number, request, list(ids), len(ids), now, sample, first, named)
            if request.grammar is not None:
                one.matcher = self.grammars.matcher(request.grammar)
            made.append(one)
        return made

    def _raised(self, request: Request) -> Request:
        """The request without a kappa that changes nothing."""
        if request.kappa is None:
            return request
        knob = knob_of(self.base)
        if knob is None:
            raise EngineError(
                f"kappa {request.kappa} asks for a safety basis, and none guards this model: see bem.safety.protect."
            )
        if request.kappa <= knob.level:
            return replace(request, kappa=None)
        knob.note(request.kappa, request.tenant or "request", "")
        return request

    def _check_tokens(self, request: Request, ids: list[int]) -> None:
        if not ids:
            raise EngineError("the prompt has no token: give it at least one.")
        if len(ids) + request.max_new_tokens > self.max_tokens:
            raise EngineError(
                f"{len(ids)} prompt tokens and max_new_tokens {request.max_new_tokens} are more than the "
                f"{self.max_tokens} tokens that a sequence may have. Shorten the prompt or ask for less."
            )
        entries = self.entries
        if not 0 <= min(ids) <= max(ids) < entries:
            raise EngineError(
                f"token ids {min(ids)} to {max(ids)}: the model has {entries} entries, 0 to {entries - 1}."
            )
        if odd := [t for t in request.sampling.logit_bias if not 0 <= t < entries]:
            raise EngineError(
                f"logit_bias names tokens {odd[:5]}: the model has {entries} entries, 0 to {entries - 1}."
            )
        if odd := [t for t in request.turn_starts if not 0 <= t < len(ids)]:
            raise EngineError(f"turn_starts {odd} are outside the prompt's {len(ids)} tokens.")


def told_of(request: Request, acts: Acts) -> dict[str, Tensor]:
    """What the adapter reads of what is known beside the tokens."""
    given = {name: getattr(request, name) for name in CONDITIONING}
    told = conditioning_of(None, **{n: None if v is None else list(v) for n, v in given.items()})
    return {name: value for name, value in told.items() if name in acts.reads}
