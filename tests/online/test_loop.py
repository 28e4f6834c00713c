import errno
import json
import os
import random
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from bem.errors import OnlineError
from bem.online import desk
from bem.online.events import Feedback, Served
from bem.online.feedback import FeedbackLog
from bem.online.live import catch_up
from bem.online.stream import Turn
from bem.runs import upkeep
from bem.runs.pointer import Pointer
from tests.online.toys import SKILLS, Toy, loop, moves, stream


def run(folder, turns, toy=None, **changes):
    with loop(folder, toy, **changes) as made:
        rounds = made.go(turns)
    return made, rounds


def mean(rounds):
    scores = [s for r in rounds for s in r.scores]
    return sum(scores) / len(scores)


def test_what_is_learned_is_used_once_its_canary_has_said_so(tmp_path):
    made, rounds = run(tmp_path, stream(600))
    assert mean(rounds[:5]) == 0.0 and mean(rounds[-5:]) == 1.0
    assert moves(made)[0] == "promoted" and "rolled back" not in moves(made)
    store = made.production.store
    assert store.current().version == made.production.live.version
    assert [e.event for e in store.journal.ledger().entries][:2] == ["import", "promote"]
    assert upkeep.check(store) == []
    kept = json.loads((store.shelf.objects / store.current().verdict).read_text())
    assert kept["verdict"]["decision"] == "PROMOTE"
    assert kept["candidate"] == store.current().version


def test_every_answer_is_by_the_version_that_the_store_had_in_use(tmp_path):
    with loop(tmp_path) as made:
        for at in range(0, 320, 8):
            release = (
                made.production.store.current() if made.production.store.path.exists() else None
            )
            expected = release.version if release else ""
            assert made.round(stream(320)[at : at + 8]).version == expected


def test_a_stream_without_news_moves_nothing_for_the_worse(tmp_path):
    zeros = dict.fromkeys(range(SKILLS), 0.0)
    made, rounds = run(tmp_path, stream(800, targets=zeros))
    assert mean(rounds) == 1.0 and "rolled back" not in moves(made)


def test_a_poisoned_burst_of_one_source_is_never_used(tmp_path):
    """It has a fifth of what is practised on at most, and what was held out says what it costs."""
    good = stream(400)
    bad = [
        replace(t, source="enemy")
        for t in stream(400, 5, targets=dict.fromkeys(range(SKILLS), -9.0), start=1000)
    ]
    made, _ = run(tmp_path, [*good, *bad])
    after = [made.trainee.answers(made.production.live.weights, [t], None)[0].score for t in good]
    assert sum(after) == len(after)


def test_a_poisoned_burst_of_fifty_sources_is_never_used(tmp_path):
    """They move the shadow, and all that comes in says that this is right: what is trusted says no."""
    good = stream(400)
    bad = [
        replace(t, source=f"enemy {i % 50}")
        for i, t in enumerate(
            stream(600, 5, targets=dict.fromkeys(range(SKILLS), -9.0), start=1000)
        )
    ]
    with loop(tmp_path) as made:
        made.trust(stream(80, 9, start=5000))
        made.go([*good, *bad])
    assert "rejected" in moves(made)
    after = [made.trainee.answers(made.production.live.weights, [t], None)[0].score for t in good]
    assert sum(after) == len(after)


def test_a_shadow_that_is_not_finite_begins_anew_and_nothing_else_happens(tmp_path):
    toy = Toy()
    toy.poison = lambda w: w * float("nan")
    made, rounds = run(tmp_path, stream(200), toy)
    assert set(moves(made)) == {"discarded"} and mean(rounds) == 0.0
    assert made.production.store.path.exists() is False


def test_a_candidate_that_raises_is_rejected(tmp_path):
    class Fragile(Toy):
        def answers(self, weights, turns, draws):
            if float(weights["w"][0]) > 0.9:
                raise RuntimeError("boom")
            return super().answers(weights, turns, draws)

    made, _ = run(tmp_path, stream(300), Fragile())
    assert "promoted" not in moves(made) and "rejected" in moves(made)
    rejected = next(e for e in made.desk.entries() if e["what"] == "rejected")
    assert rejected["reason"] == "the candidate failed: RuntimeError: boom"


def test_a_version_that_fails_in_use_is_taken_back_by_itself(tmp_path):
    """Good on trial; then what is asked for turns back to what the version before could do."""
    made, _ = run(tmp_path, stream(48))
    assert moves(made) == ["promoted"]
    zeros = dict.fromkeys(range(SKILLS), 0.0)
    made, _ = run(tmp_path, [*stream(48), *stream(16, 3, targets=zeros, start=1000)])
    assert moves(made) == ["promoted", "rolled back"] and made.production.store.current() is None
    back = made.desk.entries()[-1]
    assert back["to"] == "" and "a loss above 0.1: e-value over 20" in back["reason"]


def test_a_rollback_whose_target_is_damaged_takes_the_next_good_one(tmp_path):
    with loop(tmp_path, watch_events=0) as made:
        made.go(stream(300))
        store, before = made.production.store, [s.version for s in made.production.before]
        assert len(before) > 2 and before[0] == ""
        for version in before[2:]:
            file = store.find(version).files["w.json"]
            (store.shelf.objects / file).write_bytes(b"tampered with")
        made._decide("rollback", "it is worse")
        made._carry_out()
    assert store.current().version == made.production.live.version == before[1]
    entry = next(e for e in made.desk.entries() if e["what"] == "rolled back")
    assert len(entry["problems"]) == len(before) - 2
    assert "was changed after it was written" in entry["problems"][0]


def test_what_is_in_use_and_damaged_is_replaced_by_the_version_before(tmp_path):
    with loop(tmp_path) as made:
        made.go(stream(300))
        store, before = made.production.store, made.production.before[-1].version
        (store.shelf.objects / store.current().files["w.json"]).write_bytes(b"tampered with")
        made.round(stream(8, 2, start=900))
        assert made.production.live.version == before and "damaged" in moves(made)


def test_what_an_operator_puts_into_use_is_followed(tmp_path):
    with loop(tmp_path) as made:
        made.go(stream(300))
        assert made.production.live.version
        made.production.store.rollback("base", reason="an operator says so")
        made.round(stream(8, 2, start=900))
        assert made.production.live.version == "" and made.trial is None
        assert made.trainee.accepted.equal(torch.zeros(SKILLS))


def test_the_erased_are_forgotten_by_the_learner(tmp_path):
    turns = [*stream(100), Turn(None, "u7", erase="u7")]
    with loop(tmp_path) as made:
        made.go(turns)
        held = [*made.learner.practice.items, *made.learner.held.items, *made.learner._fresh]
        assert held and not [i for i in held if i.source == "u7"]
        assert made.learner.counts.forgotten > 0


def test_while_it_is_paused_nothing_is_learned_and_watches_go_on(tmp_path):
    with loop(tmp_path) as made:
        made.go(stream(40))
        steps = made.learner.counts.steps
        made.desk.pause("a look at the data")
        rounds = made.go(stream(160))
        assert made.learner.counts.steps == steps > 0 and len(rounds) == 15
        assert made.desk.resume() and not made.desk.resume()
        made.go(stream(200))
        assert made.learner.counts.steps > steps


def test_there_is_one_writer(tmp_path):
    with loop(tmp_path) as first:
        with pytest.raises(OnlineError, match="has a writer already"), loop(tmp_path):
            pass
        (first.desk.folder / "epoch.json").write_text('{"epoch": 9}')
        with pytest.raises(OnlineError, match="a writer of epoch 9 has begun"):
            first.save()
        (first.desk.folder / "epoch.json").write_text('{"epoch": 1}')
    with loop(tmp_path) as second:
        assert second.desk.epoch == 2


# --- kill and resume ------------------------------------------------------------------------------


def everything(made):
    """All that a later decision could depend on."""
    state = {n: getattr(made, n) for n in ("event", "rounds", "last_candidate", "watching")}
    journal = made.desk.journal.read_text()
    weights = [made.trainee.w.tolist(), made.trainee.accepted.tolist()]
    learner, drift = json.dumps(made.learner.state()), made.drift.to_json()
    # a move that a kill left open is abandoned, by name, and made again
    ledger = [(e.event, e.version) for e in made.production.store.journal.ledger().moves()]
    return state, journal, weights, learner, drift, made.production.state(), ledger


def fall(n=700):
    other = dict.fromkeys(range(SKILLS), 2.0)
    return [*stream(300), *stream(n - 300, 1, targets=other, start=300)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made, _ = run(tmp_path_factory.mktemp("whole"), fall())
    assert moves(made).count("promoted") >= 2
    return everything(made)


def test_stopped_and_resumed_it_does_the_same_to_the_last_bit(tmp_path, uninterrupted):
    turns, at = fall(), 0
    while at < len(turns):
        at += 90
        made, _ = run(tmp_path, turns[: at - at % 8])
    made, _ = run(tmp_path, turns)
    assert everything(made) == uninterrupted


def test_killed_at_any_instant_and_resumed_it_does_the_same_to_the_last_bit(
    tmp_path, uninterrupted
):
    """SIGKILL between 0 and 60 ms after it began, again and again until it gets to the end."""
    turns, rng, kills = fall(), random.Random(0), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                run(tmp_path, turns)
                os._exit(0)
            except BaseException:
                os._exit(1)
        if kills < 40:
            time.sleep(rng.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
    made, _ = run(tmp_path, turns)
    assert kills > 5 and everything(made) == uninterrupted


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(tmp_path):
    run(tmp_path, stream(160))
    with loop(tmp_path) as made:
        newest = made.desk._snapshots()[0]
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    with loop(tmp_path) as made:
        assert made.rounds < 20 and "half written or was changed" in made.desk.problems[0]
    for path in made.desk.snapshots.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(OnlineError, match="no snapshot is whole"), loop(tmp_path):
        pass


def test_another_learners_folder_is_refused(tmp_path):
    run(tmp_path, stream(40))
    with (
        pytest.raises(OnlineError, match=r"online\.margin was 0\.1, is 0\.05"),
        loop(tmp_path, margin=0.05),
    ):
        pass


def test_killed_between_a_promotions_ledger_entry_and_its_pointer_it_makes_the_move_once(
    tmp_path, uninterrupted, monkeypatch
):
    real = Pointer.write

    def killed(self, path):
        if self.entry > 0:
            raise KeyboardInterrupt
        real(self, path)

    monkeypatch.setattr(Pointer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fall())
    monkeypatch.undo()
    made, _ = run(tmp_path, fall())
    events = [e.event for e in made.production.store.journal.ledger().entries]
    assert events[:4] == ["import", "promote", "abandon", "promote"]
    assert everything(made) == uninterrupted


def test_a_clock_that_jumps_changes_nothing(tmp_path, uninterrupted):
    hours = iter(random.Random(1).choices(range(24), k=10**4))
    with loop(tmp_path) as made:
        made.production.store.journal.clock = lambda: datetime(2030, 1, 1, next(hours), tzinfo=UTC)
        made.go(fall())
    assert everything(made) == uninterrupted


def test_a_full_disk_stops_it_and_leaves_what_was_there(tmp_path, uninterrupted, monkeypatch):
    run(tmp_path, fall()[:160])

    def full(path, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(desk, "write_state", full)
        with pytest.raises(OnlineError, match="No space left"):
            run(tmp_path, fall())
    made, _ = run(tmp_path, fall())
    assert everything(made) == uninterrupted


# --- on a log of feedback -------------------------------------------------------------------------


def test_it_follows_a_log_that_grows_and_takes_nothing_in_twice(tmp_path):
    log = FeedbackLog(tmp_path / "feedback.db")

    def said(numbers):
        for i in numbers:
            log.record(Served(f"r{i}", "", f"skill {i % SKILLS}", "0", f"u{i % 40}"))
            log.add(
                Feedback(f"e{i}", f"r{i}", "correction", f"u{i % 40}", text=f"{i % SKILLS} 1.0")
            )

    said(range(30))
    with loop(tmp_path) as made:
        assert catch_up(made, log) == 24 and made.sequence == 24 and made.event == 24
    said(range(30, 200))
    with loop(tmp_path) as made:
        assert catch_up(made, log) == 176 and catch_up(made, log) == 0
        assert made.production.live.version and made.event == 200
        log.erase("u7", "please")
        assert catch_up(made, log) == 1 and made.sequence == 201
        items = [*made.learner.practice.items, *made.learner.held.items, *made.learner._fresh]
        assert items and all(i.source != "u7" for i in items)
        assert len(made.desk._snapshots()) == 1
