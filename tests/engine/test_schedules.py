"""Random schedules: whatever joins, leaves, is cancelled, thrown out or swapped, every answer is the one that
`generate` gives under the version with which it began."""

import os
from functools import cache

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bem.engine.engine import Engine
from bem.engine.request import Request
from tests.conftest import make_tokenizer
from tests.engine.plain import plain, prompts
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import adapted

EXAMPLES = int(os.environ.get("BEM_SCHEDULES", "15"))
"""How many schedules are drawn; 10,000 take some hours."""
NEW = 12
TEXTS = prompts(4, 11, 26, 33)
TEXTS += [TEXTS[3][:17] + own for own in prompts(3, 8, seed=9)]  # with a prefix in common


@cache
def releases():
    """(what serves, its releases by number)."""
    live = adapted("router")
    return live, [live.shadow(), changed_expert(live, "a"), changed_expert(live, "c")]


@cache
def expected(release: int, text: int) -> list[int]:
    _, known = releases()
    return plain(known[release], TEXTS[text], NEW)


EVENT = (
    st.tuples(st.just("submit"), st.integers(0, len(TEXTS) - 1)),
    st.tuples(st.just("submit"), st.integers(0, len(TEXTS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("step"), st.just(1)),
    st.tuples(st.just("swap"), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("budget"), st.sampled_from([0, 20_000, 60_000, 10**7])),
)
EVENTS = st.lists(st.one_of(*EVENT), min_size=10, max_size=30)


class Played:
    """A schedule that runs, and which release each request began under."""

    def __init__(self, slots: int, prefill: int):
        self.live, self.known = releases()
        self.digests = [r.version.digest for r in self.known]
        self.engine = Engine(self.live, make_tokenizer(), slots=slots, prefill_tokens=prefill)
        self.asked: dict[int, int] = {}
        self.results = {}

    def play(self, event: str, value: int) -> None:
        if event == "submit":
            wanted = Request(TEXTS[value], max_new_tokens=NEW, ignore_eos=True)
            self.asked[self.engine.submit(wanted)] = value
        elif event == "step":
            for _ in range(value):
                self.collect()
        elif event == "cancel":
            self.engine.cancel(value)
        elif event == "swap":
            self.live.adopt(self.known[value])
        else:
            self.engine.store.budget = value

    def collect(self) -> None:
        self.results |= {r.id: r for r in self.engine.step().finished}

    def check(self) -> None:
        while self.engine.busy:
            self.collect()
        assert self.results.keys() == self.asked.keys()
        for number, result in self.results.items():
            answer = list(result.token_ids)
            if not answer:
                assert result.finish_reason == "cancelled"
                continue
            whole = expected(self.digests.index(result.version), self.asked[number])
            assert answer == whole[: len(answer)]
            assert len(answer) == NEW or result.finish_reason == "cancelled"
        store, control = self.engine.store, self.engine._runner.control
        assert len(control.state._free) == self.engine.slots
        assert not any(block.users for block in store.blocks.values())
        assert store.stats.nbytes == sum(block.nbytes for block in store.blocks.values())
        assert store.stats.needed == store.stats.reused + sum(store.stats.missed.values())


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(slots=st.integers(1, 4), prefill=st.sampled_from([5, 16, 64]), events=EVENTS)
def test_any_schedule_gives_the_tokens_of_generate_and_leaves_nothing_behind(
    slots, prefill, events
):
    torch.manual_seed(0)
    played = Played(slots, prefill)
    for event in events:
        played.play(*event)
    played.check()
