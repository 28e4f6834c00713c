import json
from collections import Counter

import numpy as np
import pytest

from bem.errors import DataError
from bem.online import Item, Replay


def item(i, source="s", content=None):
    return Item(f"e{i}", source, content if content is not None else {"text": f"row {i}"})


def filled(n=400, capacity=100, sources=40, seed=0, **settings):
    replay = Replay(capacity, seed, **settings)
    for i in range(n):
        replay.offer(item(i, f"u{i % sources}"))
    return replay


def test_every_item_of_the_stream_is_kept_with_the_same_chance():
    """k/n of 20 of 100: 5 old and new blocks of 20 items hold a fifth each, over 300 streams."""
    kept = Counter()
    for seed in range(300):
        replay = Replay(20, seed, max_share=1.0)
        for i in range(100):
            replay.offer(item(i))
        kept.update(int(i.id[1:]) // 20 for i in replay.items)
    shares = np.array([kept[b] for b in range(5)]) / (300 * 20)
    np.testing.assert_allclose(shares, 0.2, atol=4 * (0.2 * 0.8 / 6000) ** 0.5)


def test_a_source_with_a_full_share_keeps_a_fair_sample_of_its_own():
    """Ten of 100 of one source: its first half is as likely as its second."""
    early = 0
    for seed in range(200):
        replay = Replay(100, seed, max_share=0.1)
        for i in range(100):
            replay.offer(item(i))
        assert len(replay.items) == 10
        early += sum(int(i.id[1:]) < 50 for i in replay.items)
    assert early / 2000 == pytest.approx(0.5, abs=0.05)


def test_no_source_holds_more_than_its_share_whatever_it_sends():
    replay = filled()
    for i in range(5000):
        replay.offer(item(f"flood{i}", "attacker"))
        assert sum(i.source == "attacker" for i in replay.items) <= 5
    assert len(replay.items) == 100


def test_duplicates_are_refused_by_content_whoever_sends_them():
    replay = Replay(100)
    assert replay.offer(item(1, "a", {"x": 1, "y": 2})) == "added"
    assert replay.offer(item(2, "b", {"y": 2, "x": 1})) == "duplicate"
    assert replay.trust(item(3, "curated", {"z": 1}))
    assert replay.offer(item(4, "b", {"z": 1})) == "duplicate"
    assert not replay.trust(item(5, "curated", {"z": 1}))


def test_what_was_passed_over_gets_no_second_chance_by_being_sent_again():
    replay = filled(n=2000)
    assert {replay.offer(item(i, "again")) for i in range(2000)} == {"duplicate"}


def test_the_trusted_stratum_never_leaves():
    replay = Replay(100)
    replay.trust(item("t", "curated"))
    for i in range(3000):
        replay.offer(item(i, f"u{i % 50}"))
    assert [i.id for i in replay.trusted] == ["et"] and len(replay.items) == 100


def test_an_item_that_becomes_trusted_leaves_the_reservoir():
    replay = Replay(100)
    replay.offer(item(1, "a"))
    assert replay.trust(item(1, "a")) and replay.items == []


def test_a_batch_gives_no_source_more_than_its_share():
    """Of 40 sources one has five of 83 items, 6 %: it is held to 5 %, the others share the rest alike."""
    replay = filled(n=80)
    for i in range(20):
        replay.offer(item(f"more{i}", "u0"))
    chances = replay.chances()
    of_u0 = np.array([i.source == "u0" for i in replay.items])
    assert of_u0.sum() == 5 and chances[of_u0].sum() == pytest.approx(0.05)
    assert np.unique(chances[~of_u0].round(12)).tolist() == [round(0.95 / 78, 12)]
    few = Replay(100)
    for i in range(12):
        few.offer(item(i, f"u{i % 3}"))
    few.trust(item("t", "curated"))
    chances = few.chances()
    assert chances[:12].sum() == pytest.approx(0.15) and chances[12] == pytest.approx(0.85)


def test_reservoir_and_trusted_stratum_are_drawn_from_apart():
    replay = filled(n=40)  # one item of each of 40 sources
    replay.trust(item("t", "curated"))
    assert {i.source for i in replay.draw_trusted(5)} == {"curated"}
    drawn = replay.draw_offered(2000)
    assert replay.is_fair and len({i.id for i in drawn}) == 40
    few = Replay(100)
    for i in range(19):  # of 5 % each: 95 %
        few.offer(item(i, f"u{i}"))
    assert not few.is_fair and few.draw_offered(4) == [] and few.draw_trusted(4) == []
    few.offer(item(19, "u19"))
    assert few.is_fair and len(few.draw_offered(4)) == 4


def test_too_few_sources_without_a_trusted_item_are_an_error():
    replay = Replay(100)
    replay.offer(item(1))
    with pytest.raises(DataError, match="1 sources with 5% of a batch"):
        replay.draw(4)


def test_erasing_a_source_leaves_nothing_of_it():
    replay = filled()
    replay.trust(item("t", "u3"))
    gone = replay.forget("u3")
    assert gone >= 1 and '"u3"' not in json.dumps(replay.state())
    assert replay.offer(item("t", "u3")) != "duplicate"


def test_restored_it_keeps_and_draws_the_same():
    whole, first = filled(), filled()
    second = Replay.from_state(json.loads(first.to_json()))
    for replay in (whole, second):
        for i in range(1000, 1500):
            replay.offer(item(i, f"u{i % 40}"))
    assert whole.draw(50) == second.draw(50)
    assert whole.to_json() == second.to_json()


@pytest.mark.parametrize("settings", [{"max_share": 0.0}, {"capacity": 10}, {"remembered": -1}])
def test_settings_that_cannot_be_honoured_are_errors(settings):
    with pytest.raises(ValueError):
        Replay(**settings)


def test_a_damaged_state_is_refused():
    with pytest.raises(DataError, match="no state of a replay reservoir"):
        Replay.from_state({"capacity": 100})
