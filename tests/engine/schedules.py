"""Random schedules of an engine, drawn from a seed, and what must be true of each: whatever joins, leaves, is cancelled,
runs out of time, is thrown out or swapped, an answer is the one that `generate` gives under the version with
which it began, and nothing is left behind. `benchmarks/engine_schedules.py` plays thousands."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from random import Random

from transformers import LlamaConfig, LlamaForCausalLM

from bem.engine.engine import Engine
from bem.engine.request import Request, Result
from tests.conftest import make_tokenizer
from tests.engine.plain import plain, prompts
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import lively
from tests.routing.mounted import mounted

NEW = 7
VOCABULARY = 48
TEXTS = prompts(3, 9, 14, 11, vocabulary=VOCABULARY)
TEXTS += [TEXTS[2][:9] + own for own in prompts(2, 5, seed=9, vocabulary=VOCABULARY)]
SAID = prompts(1, 5, seed=4, vocabulary=VOCABULARY)
"""What a conversation goes on with behind an answer."""
BUDGETS = (0, 3_000, 10_000, 40_000, 10**8)
"""Bytes of the store: none, one chunk, some, many, all."""
KINDS = {
    "submit": 8, "go on": 3, "step": 9, "swap": 3, "cancel": 2, "budget": 2, "purge": 1, "keep": 1,
    "drop": 1, "pin": 1, "quota": 1, "late": 1,
}  # fmt: skip
"""Event -> how often."""


@cache
def releases():
    """(what serves, its releases by number): of a model of two blocks, with chunks of four tokens."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    live = lively(mounted(model, chunk_size=4, ranks=(1, 2), strengths=(0.5, 1.0)))
    return live, [live.shadow(), changed_expert(live, "a"), changed_expert(live, "c")]


@cache
def tokenizer():
    return make_tokenizer()


@dataclass(frozen=True)
class Asked:
    """A prompt by numbers, so that its answer needs to be computed once for all schedules."""

    text: int
    said: int | None = None
    """What was said behind the answer to `text`; None: nothing yet."""
    then: int = 0
    """The release that gave this answer."""
    route: int | None = None

    def prompt(self) -> tuple[list[int], tuple[int, ...]]:
        """(token ids, turn starts)."""
        first = TEXTS[self.text]
        if self.said is None:
            return first, ()
        return [*first, *answer(Asked(self.text), self.then), *SAID[self.said]], (len(first) - 1,)


@cache
def answer(asked: Asked, release: int) -> list[int]:
    """What `generate` gives."""
    ids, turns = asked.prompt()
    return plain(releases()[1][release], ids, NEW, turns, route=asked.route)


class Played:
    """A schedule that runs, and what was asked in it."""

    def __init__(self, random: Random):
        self.random = random
        self.live, self.known = releases()
        self.live.adopt(self.known[0])
        self.digests = [r.version.digest for r in self.known]
        self.now = 0.0
        self.engine = Engine(
            self.live, tokenizer(), slots=random.randint(1, 4), prefill_tokens=random.choice([3, 8, 64]),
            clock=lambda: self.now,
        )  # fmt: skip
        self.asked: dict[int, Asked] = {}
        self.wanted: dict[int, Request] = {}
        self.results: dict[tuple[int, int], Result] = {}
        self.kept: dict[str, int] = {}
        self.count: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.compared = self.mixed = 0

    def play(self, events: int) -> None:
        """So many events, to the end; then whatever waits."""
        for _ in range(events):
            (kind,) = self.random.choices(list(KINDS), list(KINDS.values()))
            getattr(self, f"_{kind.replace(' ', '_')}")()
            self.count[kind] += 1
        while self.engine.busy:
            self._collect()

    # --- events -----------------------------------------------------------------------------------

    def _submit(self, asked: Asked | None = None) -> None:
        random = self.random
        if asked is None:
            route = random.randrange(4) if random.random() < 0.25 else None
            asked = Asked(random.randrange(len(TEXTS)), route=route)
        ids, turns = asked.prompt()
        request = Request(
            ids,
            max_new_tokens=random.randint(1, NEW),
            n=random.choice([1, 1, 1, 2]),
            ignore_eos=True,
            turn_starts=turns,
            route=asked.route,
            version=random.choice([None, *self.kept]),
            key=random.choice("ab"),
            tenant=random.choice(["", "", "t"]),
            prompt_logprobs=random.choice([None, None, None, 0]),
            prompt_logprobs_from=random.choice([1, len(ids) - 1]),
            timeout_s=random.choice([None, None, None, 2.0]),
        )
        number = self.engine.submit(request)
        self.asked[number], self.wanted[number] = asked, request

    def _go_on(self) -> None:
        random = self.random
        then = random.randrange(len(self.known))
        self._submit(Asked(random.randrange(len(TEXTS)), random.randrange(len(SAID)), then))

    def _step(self) -> None:
        for _ in range(self.random.choice([1, 1, 2, 5])):
            self._collect()

    def _collect(self) -> None:
        self.mixed += len({s.acts.version.digest for s in self.engine.running if s.acts}) > 1
        for result in self.engine.step().finished:
            assert (result.id, result.index) not in self.results, "handed out twice"
            self.results[result.id, result.index] = result

    def _swap(self) -> None:
        self.live.adopt(self.known[self.random.randrange(len(self.known))])

    def _cancel(self) -> None:
        self.engine.cancel(self.random.randrange(len(self.asked) + 1))

    def _budget(self) -> None:
        self.engine.store.budget = self.random.choice(BUDGETS)

    def _purge(self) -> None:
        weights = {w for block in self.engine.store.blocks.values() for w in block.weights}
        self.engine.store.purge(self.random.choice([*self.digests, *sorted(weights)]))

    def _keep(self) -> None:
        name, release = self.random.choice("xy"), self.random.randrange(len(self.known))
        self.engine.keep(name, self.known[release])
        self.kept[name] = release

    def _drop(self) -> None:
        if self.kept:
            name = self.random.choice(sorted(self.kept))
            self.engine.drop(name)
            del self.kept[name]

    def _pin(self) -> None:
        if names := list(self.engine.store.blocks):
            self.engine.store.pin([self.random.choice(names)], self.random.random() < 0.5)

    def _quota(self) -> None:
        self.engine.store.set_quota(
            self.random.choice(self.digests), self.random.choice([0.2, 1.0])
        )

    def _late(self) -> None:
        self.now += 1.0

    # --- what must be true ------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError: an answer is another one, or something is left."""
        for number, request in self.wanted.items():
            for sample in range(request.n):
                self._check_answer(number, self.results.pop((number, sample)))
        assert not self.results, "results that nobody asked for"
        self._check_nothing_left()

    def _check_answer(self, number: int, result: Result) -> None:
        request, given = self.wanted[number], list(result.token_ids)
        self.reasons.append(result.finish_reason)
        self.compared += len(given)
        cut = result.finish_reason in ("cancelled", "deadline")
        assert cut or (result.finish_reason, len(given)) == ("length", request.max_new_tokens)
        if given:
            whole = answer(self.asked[number], self.digests.index(result.version))
            assert given == whole[: len(given)], (number, given, whole)
            if request.prompt_logprobs is not None:
                assert (
                    len(result.prompt_logprobs)
                    == result.prompt_tokens - request.prompt_logprobs_from
                )

    def _check_nothing_left(self) -> None:
        engine = self.engine
        store, stats, control = engine.store, engine.store.stats, engine._runner.control
        assert control is not None and len(control.state._free) == engine.slots
        assert not engine.running and not len(engine.waiting)
        assert not any(block.users for block in store.blocks.values())
        assert stats.nbytes == sum(block.nbytes for block in store.blocks.values())
        assert stats.blocks == len(store.blocks)
        assert stats.needed == stats.reused + sum(stats.missed.values())
        for name, block in store.blocks.items():
            assert block.parent not in store.blocks or name in store.blocks[block.parent].children
            assert all(child in store.blocks for child in block.children)
        for decided in store.decisions.values():
            assert decided.blocks and all(name in store.blocks for name in decided.blocks.values())


def played(seed: int) -> Played:
    """The schedule of a seed, played and checked.

    Raises:
        AssertionError: see `Played.check`.
    """
    random = Random(seed)
    schedule = Played(random)
    schedule.play(random.randint(8, 24))
    schedule.check()
    return schedule
