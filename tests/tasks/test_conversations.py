"""Turns switch skills, cues stand earlier, and nothing crosses from the held-out side."""

from dataclasses import replace

import pytest

from bem.config import ConversationConfig, DataConfig, parse
from bem.errors import ConfigError, DataError
from bem.tasks.conversations import characters, into_conversations, skill_of, skills
from bem.tasks.load import load_tasks
from bem.tasks.record import Task
from bem.training.data import Example, encode

CUES = {"up": "Shout it.", "down": "Whisper it."}


def cued(part, n=24):
    """Words to be shouted or whispered: the cue, other words, the word."""
    return [
        Example(
            f"{part}-{i}:{ask}",
            f"{cue}\nother words of {part}\n\n{part} word {i}",
            (f"{ask} {part} {i}",),
            group=f"{part}-{i}",
            task="voice",
            meta={"ask": ask, "bare": f"{part} word {i}"},
        )
        for i in range(n)
        for ask, cue in CUES.items()
    ]


def plain(part, n=24):
    return [
        Example(f"{part}-s{i}", f"{i} and 1", (f"{part} sum {i + 1}",), task="sum", instruction="Add.")
        for i in range(n)
    ]  # fmt: skip


def task(name, rows, **changes):
    values = dict(metrics=("em",), primary="em", max_new_tokens=8)
    return Task(name=name, train=rows("train"), dev=rows("dev"), **(values | changes))


def tasks():
    return [task("voice", cued), task("sum", plain)]


def conversations(**knobs):
    return into_conversations(tasks(), ConversationConfig(**knobs))


def all_rows(found):
    return [row for t in found for row in t.train + t.dev]


def test_a_skill_is_a_task_or_what_a_task_is_asked_for_in_a_fixed_order():
    assert [skill_of(row) for row in (cued("dev")[0], plain("dev")[0])] == ["voice/up", "sum"]
    assert skills(tasks()) == ["voice/down", "voice/up", "sum"]
    assert skills(conversations()) == ["voice/down", "voice/up", "sum"]


def test_the_same_seed_gives_the_same_conversations_and_another_seed_others():
    assert conversations() == conversations()
    assert conversations() != conversations(seed=1)


def test_a_conversation_does_not_depend_on_the_rows_that_are_asked_beside_it():
    both = conversations()
    dev_only = [task("voice", cued), task("sum", plain)]
    dev_only = [Task(**{**vars(t), "train": []}) for t in dev_only]
    again = into_conversations(dev_only, ConversationConfig())
    assert [t.dev for t in again] == [t.dev for t in both]


def test_a_row_stays_what_it_was_but_for_what_stands_before_it():
    for before, after in zip(tasks(), conversations(sticky=False), strict=True):
        for old, new in zip(before.train + before.dev, after.train + after.dev, strict=True):
            assert (new.id, new.group, new.references) == (old.id, old.group, old.references)
            assert new.prompt == old.prompt and new.task == old.task
            assert {**new.meta, **old.meta} == new.meta


def test_histories_hold_rows_of_their_own_side_and_of_other_groups_alone():
    for t in conversations(switch_rate=0.5):
        for part in ("train", "dev"):
            other = "dev" if part == "train" else "train"
            for row in getattr(t, part):
                answers = [answer for _, answer in row.history]
                assert not any(other in answer for answer in answers)
                words = [answer.split(maxsplit=1)[1] for answer in (*answers, row.references[0])]
                assert len(set(words)) == len(words)  # no word both shouted and whispered


def test_the_list_of_skills_is_that_of_the_turns():
    for row in all_rows(conversations()):
        said = [*row.history, (row.prompt, row.references[0])]
        assert len(row.meta["skills"]) == len(said) == 4
        for skill, (_, answer) in zip(row.meta["skills"], said, strict=True):
            assert skill == ("sum" if "sum" in answer else f"voice/{answer.split()[0]}")


def test_turns_switch_as_often_as_the_rate_says():
    def share(rate):
        rows = all_rows(conversations(switch_rate=rate))
        pairs = [p for r in rows for p in zip(r.meta["skills"], r.meta["skills"][1:], strict=False)]
        return sum(a != b for a, b in pairs) / len(pairs)

    assert share(0.0) == 0 and share(1.0) == 1
    assert share(0.7) == pytest.approx(0.7, abs=0.08)


def has_cue(text):
    return any(cue in text for cue in CUES.values())


def test_a_cue_holds_until_its_task_is_asked_for_something_else():
    sticky = across = 0
    for row in conversations(switch_rate=0.5)[0].train:
        said = [*(user for user, _ in row.history), row.prompt]
        asked = row.meta["skills"]
        for i, skill in enumerate(asked):
            before = [s for s in asked[:i] if s != "sum"]
            assert has_cue(said[i]) == (skill != "sum" and before[-1:] != [skill])
        assert row.meta["sticky"] == (not has_cue(row.prompt))
        if row.meta["sticky"]:
            sticky += 1
            assert row.prompt == row.meta["bare"]
            ask, last = row.meta["ask"], max(i for i, text in enumerate(said) if has_cue(text))
            assert CUES[ask] in said[last] and set(asked[last:]) <= {f"voice/{ask}", "sum"}
            across += "sum" in asked[last:]
    assert sticky > 15 and across > 5  # of 48 rows


def test_without_sticky_cues_every_turn_shows_its_own():
    for row in conversations(switch_rate=0.3, sticky=False)[0].dev:
        said = [*(user for user, _ in row.history), row.prompt]
        shown = [has_cue(text) for text in said]
        assert shown == [skill != "sum" for skill in row.meta["skills"]] and not row.meta["sticky"]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_after_two_switches_the_skill_comes_back_as_often_as_the_rate_says(rate):
    rows = all_rows(conversations(switch_rate=1.0, return_rate=rate))
    back = [s[i] == s[i + 2] for s in (row.meta["skills"] for row in rows) for i in range(2)]
    chance = 0.5  # of two other skills one is the skill before
    assert sum(back) / len(back) == pytest.approx(max(rate, chance), abs=0.08)


def test_a_task_without_a_cue_says_its_instruction_in_every_turn():
    for row in conversations(switch_rate=0.0)[1].dev:
        assert all(user.startswith("Add.") for user, _ in row.history)
        assert row.prompt.startswith("Add.") and not row.meta["sticky"]


@pytest.mark.parametrize("budget", [80, 110, 140])
def test_the_oldest_turns_are_dropped_whole_and_the_first_left_has_its_cue(budget):
    whole = conversations(switch_rate=0.3)
    found = conversations(switch_rate=0.3, max_characters=budget, turn_characters=80)
    lengths = set()
    for row, long in zip(all_rows(found), all_rows(whole), strict=True):
        n = len(row.meta["skills"])
        lengths.add(n)
        said = sum(len(text) for turn in row.history for text in turn)
        assert said + characters(row) <= budget
        assert row.meta["skills"] == long.meta["skills"][-n:]
        first = row.history[0][0] if row.history else row.prompt
        assert has_cue(first) == (row.meta["skills"][0] != "sum")
    assert min(lengths) < 4


def test_a_row_that_is_longer_than_a_conversation_may_be_is_an_error():
    with pytest.raises(DataError, match="max_characters=20"):
        conversations(max_characters=20, turn_characters=20)
    with pytest.raises(ConfigError, match="a turn must fit"):
        parse(ConversationConfig, {"max_characters": 20}, "conversations")


def test_one_skill_alone_cannot_switch_but_can_go_on():
    with pytest.raises(ConfigError, match="one skill, sum"):
        into_conversations([task("sum", plain)], ConversationConfig())
    (alone,) = into_conversations([task("sum", plain)], ConversationConfig(switch_rate=0))
    assert all(row.meta["skills"] == ["sum"] * 4 for row in alone.dev)


def test_there_are_fewer_turns_where_no_other_group_is_left():
    two = task("sum", lambda part: plain(part, 2))
    (found,) = into_conversations([two], ConversationConfig(switch_rate=0))
    assert [len(row.history) for row in found.dev] == [1, 1]


@pytest.mark.parametrize("name", ["switch", "lookup"])
def test_rows_with_a_history_or_with_evidence_to_come_are_refused(name):
    data = DataConfig(
        tasks=["sig2json", name], train_rows=20, dev_rows=5, conversations=ConversationConfig()
    )
    with pytest.raises(ConfigError, match=f"'{name}'"):
        load_tasks(data)


EMBEDDED = ["forms", "sig2json", "doc2name", "continue"]


def embedded(**knobs):
    data = DataConfig(
        tasks=EMBEDDED, train_rows=40, dev_rows=20, conversations=ConversationConfig(**knobs)
    )
    return load_tasks(data)


def test_the_embedded_suite_becomes_conversations_of_one_turn_start_per_turn(tokenizer):
    found = embedded()
    assert [t.name for t in found] == EMBEDDED and [len(t.dev) for t in found] == [20] * 4
    assert len(skills(found)) == 9
    for t in found:
        for row in t.dev:
            encoded = encode(row, tokenizer, 8192)
            assert sum(encoded.turn_starts) == len(row.meta["skills"]) == len(row.history) + 1
    assert {row.meta["ask"] for row in found[0].train} <= {"call", "count", "json", "kind", "last", "name"}  # fmt: skip


def test_rows_that_are_too_long_are_left_out_before_the_choice():
    found = embedded(turn_characters=400)
    assert [len(t.dev) for t in found] == [20] * 4
    assert all(characters(row) <= 400 for t in found for row in t.train + t.dev)
    with pytest.raises(DataError, match="turn_characters"):
        embedded(turn_characters=20)


def test_one_system_message_opens_the_conversation_and_several_are_refused():
    def told(rows, system):
        return lambda part: [replace(row, system=system) for row in rows(part)]

    pair = [task("voice", told(cued, "Be brief.")), task("sum", told(plain, "Be brief."))]
    for made in into_conversations(pair, ConversationConfig()):
        assert all(row.system == "Be brief." for row in made.train + made.dev)
    with pytest.raises(
        ConfigError, match=r"2 system messages \('', 'Be brief\.'.*conversation has one"
    ):
        into_conversations([pair[0], task("sum", plain)], ConversationConfig())
