"""Tasks give what their names promise; nothing leaks from the held-out side."""

import gzip
import hashlib
import json

import pytest

from bem.config import DataConfig, TaskConfig
from bem.errors import ConfigError, DataError
from bem.tasks.embedded import (
    ASKS,
    EMBEDDED,
    Function,
    embedded,
    functions,
    split_of,
)
from bem.tasks.load import METRIC_NAMES, TASKS, load_task, load_tasks, training_mixture
from bem.tasks.public import PUBLIC, public
from bem.tasks.record import Family
from bem.tasks.scoring import FORMS


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """The suite is parsed once into a folder of the test run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        functions.cache_clear()
        yield
        functions.cache_clear()


# ------------------------------------------------------------ embedded


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
    from bem.tasks.scoring import score

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
    from bem.tasks import embedded as tasks_embedded

    path = tasks_embedded._cache_file()
    assert path.is_file()
    (tmp_path / "broken").write_bytes(b"not a cache")
    assert tasks_embedded._read_cache(tmp_path / "broken") == []  # so it is parsed again


def test_an_installation_without_sources_says_what_to_do(tmp_path, monkeypatch):
    from bem.tasks import embedded as tasks_embedded

    monkeypatch.setattr(tasks_embedded, "_functions", lambda: iter(()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    functions.cache_clear()
    with pytest.raises(DataError, match=r"No standard library sources in .* Use data\.root"):
        functions()
    functions.cache_clear()


# ------------------------------------------------------------ public


def write(folder, name, part, *rows):
    with gzip.open(folder / f"{name}.{part}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_public_set_gets_its_instruction_and_its_cluster(tmp_path):
    row = {"id": "wsql-16", "input": "q?", "references": ["SELECT a"], "evidence": ["a", "b"]}
    write(tmp_path, "sql_wikisql", "train", {**row, "meta": {"table": "1-1"}})
    write(tmp_path, "sql_wikisql", "dev", {**row, "id": "x", "meta": {"table": "1-2"}})
    task = load_task("sql_wikisql", root=tmp_path)
    assert task.dev[0].prompt == "Write the SQL.\na\nb\nq?"
    assert (task.dev[0].group, task.dev[0].task) == ("1-2", "sql_wikisql")
    assert (task.form, task.primary, task.max_new_tokens) == ("sql", "em", 64)


def test_dialogues_and_stories_are_clusters(tmp_path):
    row = {"id": "babi-dev-3-1", "input": "q?", "references": ["a"], "meta": {"hops": 1}}
    write(tmp_path, "qa_babi", "dev", row, {**row, "id": "babi-dev-3-2"})
    assert {r.group for r in public("qa_babi", tmp_path, "dev")} == {"babi-dev-3"}


def test_a_scene_is_put_into_words(tmp_path):
    row = {"id": "nlvr-1-0", "input": "s", "references": ["true"]}
    boxes = [[["square", "yellow", 40, 80, 20], ["circle", "blue", 1, 2, 10]], []]
    write(tmp_path, "vision_nlvr", "dev", {**row, "meta": {"boxes": boxes}})
    (example,) = public("vision_nlvr", tmp_path, "dev")
    assert example.evidence == (
        "box 1: yellow square at 40,80 size 20, blue circle at 1,2 size 10",
        "box 2: empty",
    )
    assert example.group == "nlvr-1"


def test_bfcl_gives_one_call_to_learn_from_and_keeps_what_is_acceptable(tmp_path):
    allowed = json.dumps({"f": {"x": [1, 2], "y": ["", "m"]}})
    rows = [
        {"id": "a", "input": "q", "references": [allowed]},
        {"id": "b", "input": "q2", "references": ["none"]},
    ]
    write(tmp_path, "tool_bfcl", "dev", *rows)
    call, none = public("tool_bfcl", tmp_path, "dev")
    assert call.references == ('{"f": {"x": 1}}', allowed) and none.references == ("none",)


def test_one_utterance_is_asked_in_three_forms_with_the_cue_first(tmp_path):
    rows = [
        {
            "id": f"r{i}",
            "input": f"utterance number {i} of them all",
            "references": [json.dumps({"intent": "Play", "slots": {"artist": f"a{i}"}})],
        }
        for i in range(4)
    ]
    write(tmp_path, "json_snips", "dev", *rows)
    found = public("snips_forms", tmp_path, "dev")
    assert len(found) == 12 and {row.group for row in found} == {"r0", "r1", "r2", "r3"}
    answers = {row.meta["ask"]: row.references[0] for row in found if row.group == "r2"}
    assert answers == {
        "json": rows[2]["references"][0],
        "intent": "Play",
        "slots": "artist: a2",
    }
    for row in found:
        _, *filler, blank, last = row.prompt.split("\n")
        assert blank == "" and last == rows[int(row.group[1])]["input"]
        assert sum(map(len, filler)) >= 320 and last not in filler


def test_the_domain_of_an_act_is_only_in_the_cue(tmp_path):
    rows = [
        {
            "id": f"{domain}-{i}",
            "input": f"{domain} inform(name='n{i}';area=west)",
            "references": [f"n{i} is a {domain}"],
            "meta": {"domain": domain},
        }
        for i, domain in enumerate(("restaurant", "hotel", "hotel"))
    ]
    write(tmp_path, "gen_rnnlg", "dev", *rows)
    for row in public("rnnlg_styles", tmp_path, "dev"):
        _, *rest = row.prompt.split("\n")
        assert not any(line.startswith(("restaurant", "hotel")) for line in rest)
        assert rest[-1].startswith("inform(name=")
        assert row.meta["ask"] in row.group and row.meta["ask"] in ("restaurant", "hotel")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_family_is_described_whole(name):
    family = PUBLIC[name].family
    assert family.about and family.form in FORMS and family.primary in family.metrics
    assert set(family.metrics) <= set(METRIC_NAMES) and "dev" in PUBLIC[name].parts


def test_missing_folders_files_and_sides_are_named(tmp_path):
    with pytest.raises(DataError, match=r"json_snips is a public set: set data\.root"):
        load_task("json_snips")
    with pytest.raises(DataError, match=r"no file .*json_snips\.train.* Is data\.root"):
        load_task("json_snips", root=tmp_path)
    write(tmp_path, "qa_hotpot500", "dev", {"id": "1", "input": "q", "references": ["a"]})
    with pytest.raises(DataError, match="qa_hotpot500 has no train rows: it is for measuring only"):
        load_task("qa_hotpot500", root=tmp_path)
    assert load_task("qa_hotpot500", root=tmp_path, need_train=False).train == []


# ------------------------------------------------------------ loading by config


def own(tmp_path, rows=5):
    path = tmp_path / "own.jsonl"
    lines = [{"id": str(i), "input": f"q{i}", "references": ["a"]} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_your_own_files_need_no_registration(tmp_path):
    path = own(tmp_path)
    entry = TaskConfig(
        name="mine", train=path, dev=path, instruction="Say.", metric="chrf", max_new_tokens=7
    )
    task = load_task(entry)
    assert (task.name, task.primary, task.max_new_tokens) == ("mine", "chrf", 7)
    assert task.dev[0].prompt == "Say.\nq0" and task.dev[0].task == "mine"
    assert "chrf" in task.metrics


def test_a_row_may_name_its_form_but_not_an_unknown_one(tmp_path):
    path = tmp_path / "own.jsonl"
    row = {"input": "q", "references": ["a"], "meta": {"form": "poem"}}
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"row 'own-1' has the unknown form 'poem'\. Known: text"):
        load_task(TaskConfig(name="mine", train=str(path), dev=str(path)))


def test_unknown_names_are_met_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"No task 'sig2jsn'\. Did you mean 'sig2json'\?"):
        load_task("sig2jsn")
    with pytest.raises(ConfigError, match=r"Known: doc2name.*needs `train` and `dev`"):
        load_task("zzzzzz")
    with pytest.raises(ConfigError, match=r"unknown metric rouge\. Known: em"):
        load_task(TaskConfig(name="sig2json", metrics=["em", "rouge"]))
    with pytest.raises(DataError, match="'mine' has no dev rows"):
        load_task(TaskConfig(name="mine", train=own(tmp_path)))


def test_fewer_rows_are_a_seeded_choice_in_the_same_order(tmp_path):
    whole = load_task("sig2json")
    few = load_task("sig2json", train_rows=50, dev_rows=20, seed=1)
    ids = [row.id for row in whole.dev]
    places = [ids.index(row.id) for row in few.dev]
    assert len(few.train) == 50 and len(places) == 20 and places == sorted(places)
    again = load_task("sig2json", train_rows=50, dev_rows=20, seed=1)
    other = load_task("sig2json", train_rows=50, dev_rows=20, seed=2)
    assert few == again != other


def test_several_tasks_make_one_mixture_with_ids_of_their_own():
    data = DataConfig(tasks=["sig2json", "sig2doc"], train_rows=30, dev_rows=5)
    tasks = load_tasks(data)
    rows = training_mixture(tasks)
    assert [task.name for task in tasks] == ["sig2json", "sig2doc"] and len(rows) == 60
    assert len({row.id for row in rows}) == 60
    assert {row.task for row in rows} == {"sig2json", "sig2doc"}


def test_the_registry_names_every_family_once():
    assert set(TASKS) == set(EMBEDDED) | set(PUBLIC) and not set(EMBEDDED) & set(PUBLIC)
    assert all(isinstance(family, Family) for family in TASKS.values())
