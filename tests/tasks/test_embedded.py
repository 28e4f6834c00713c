"""The embedded tasks ask what their names promise; nothing leaks from the held-out side."""

import hashlib

import pytest

from bem.errors import DataError
from bem.tasks import functions as standard_library
from bem.tasks.asks import ASKS
from bem.tasks.embedded import EMBEDDED, embedded
from bem.tasks.functions import Function, functions, split_of
from bem.tasks.load import load_task
from bem.tasks.scoring import score


def test_the_rule_of_the_split_is_the_one_the_base_was_pretrained_with():
    for module in ("json", "re", "os", "pathlib", "random", "asyncio"):
        bucket = int(hashlib.md5(module.encode()).hexdigest(), 16) % 10
        assert split_of(module) == {0: "test", 1: "dev"}.get(bucket, "train")
    assert (split_of("re"), split_of("pathlib"), split_of("json")) == ("dev", "test", "train")


def test_no_module_and_no_def_line_is_on_two_sides():
    sides = functions()
    modules = {part: {f.module.split(".")[0] for f in found} for part, found in sides.items()}
    lines = {part: {(f.name, f.header) for f in found} for part, found in sides.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not modules[one] & modules[other]
        assert not lines[one] & lines[other]
    assert all(split_of(module) == part for part in modules for module in modules[part])


@pytest.mark.parametrize("name", EMBEDDED)
def test_each_family_has_enough_rows_of_enough_files(name):
    train, dev = embedded(name, "train"), embedded(name, "dev")
    assert len(train) >= 1500 and len(dev) >= 200
    assert len({row.group for row in dev}) >= 25
    assert not {row.prompt for row in train} & {row.prompt for row in dev}
    assert len({row.id for row in dev}) == len(dev)
    for row in dev:
        assert split_of(row.group.split(".")[0]) == "dev"
        for user, _ in row.history:
            assert user.strip()
        assert row.references[0] and row.references[0] == row.references[0].strip()


def test_the_right_answer_of_every_row_is_valid_and_exact():
    for name in EMBEDDED:
        task = load_task(name, train_rows=1, dev_rows=100)
        for row in task.dev:
            for metric in ("em", "f1", "validity"):
                value = score(metric, task.form_of(row), row.references[0], row.references)
                assert value == 1.0, (name, row.id, metric)


def test_doc2name_shows_the_function_among_three_others():
    for row in embedded("doc2name", "dev"):
        assert len(row.evidence) == 4
        named = [line for line in row.evidence if f"def {row.references[0]}(" in line]
        assert named == [row.evidence[row.gold_evidence[0]]]
    places = [row.gold_evidence[0] for row in embedded("doc2name", "train")]
    assert all(0.2 < places.count(i) / len(places) < 0.3 for i in range(4))


def test_forms_of_a_function_by_hand():
    function = Function(
        "m", "_get_file_name", "def _get_file_name(self, *parts, sep='/'):",
        ("self", "parts", "sep"), "", (),
    )  # fmt: skip
    answers = {name: ask.answer(function) for name, ask in ASKS.items()}
    assert answers == {
        "json": '{"name": "_get_file_name", "args": ["self", "parts", "sep"]}',
        "last": "sep",
        "name": "_get_file_name",
        "kind": "method",
        "count": "3",
        "call": "_get_file_name(self, parts, sep)",
    }
    alone = Function("m", "get_file", "def get_file(a, b):", ("a", "b"), "", ())
    assert ASKS["kind"].answer(alone) == "function"


def test_what_is_asked_cannot_be_read_off_the_end_of_the_prompt():
    """The same ends occur under every cue, and only the first line tells them apart."""
    by_end: dict[str, dict[str, str]] = {}
    for row in embedded("forms", "dev"):
        cue, *filler, blank, end = row.prompt.split("\n")
        assert blank == "" and end.startswith("def ")
        assert cue in ASKS[row.meta["ask"]].cues
        assert sum(map(len, filler)) >= 256  # a chunk of 64 tokens at 4 characters each
        by_end.setdefault(row.group + end, {})[row.meta["ask"]] = row.references[0]
    assert all(set(asked) == set(ASKS) for asked in by_end.values())
    assert all(len(set(asked.values())) == len(ASKS) for asked in by_end.values())


def test_every_turn_of_a_conversation_asks_for_another_form():
    cue_of = {cue: name for name, ask in ASKS.items() for cue in ask.cues}
    last = []
    for row in embedded("switch", "dev"):
        asked = [cue_of[u.split("\n")[0]] for u in (*(u for u, _ in row.history), row.prompt)]
        assert len(set(asked)) == len(asked) == 3 and asked[-1] == row.meta["ask"]
        last.append(asked[-1])
    assert set(last) == set(ASKS)


def test_the_suite_is_the_same_from_its_cache(tmp_path):
    first = [row.id + row.prompt for row in embedded("forms", "dev")]
    embedded.cache_clear()
    functions.cache_clear()  # now read from the file of the first time
    assert [row.id + row.prompt for row in embedded("forms", "dev")] == first
    path = standard_library._cache_file()
    assert path.is_file()
    (tmp_path / "broken").write_bytes(b"not a cache")
    assert standard_library._read_cache(tmp_path / "broken") == []  # so it is parsed again


def test_an_installation_without_sources_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(standard_library, "_functions", lambda: iter(()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    functions.cache_clear()
    with pytest.raises(DataError, match=r"No standard library sources in .* Use data\.root"):
        functions()
    functions.cache_clear()
