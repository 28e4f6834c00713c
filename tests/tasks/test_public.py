"""The public sets' files become tasks with their instruction, cluster and cue."""

import gzip
import json

import pytest

from bem.errors import DataError
from bem.tasks.load import METRIC_NAMES, load_task
from bem.tasks.public import PUBLIC, public
from bem.tasks.scoring import FORMS


def write(folder, name, part, *rows):
    with gzip.open(folder / f"{name}.{part}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_public_set_gets_its_instruction_and_its_cluster(tmp_path):
    row = {"id": "wsql-16", "input": "q?", "references": ["SELECT a"], "evidence": ["a", "b"]}
    write(tmp_path, "sql_wikisql", "train", {**row, "meta": {"table": "1-1"}})
    write(
        tmp_path, "sql_wikisql", "dev", {**row, "id": "x", "input": "r?", "meta": {"table": "1-2"}}
    )
    task = load_task("sql_wikisql", root=tmp_path)
    assert task.dev[0].prompt == "Write the SQL.\na\nb\nr?"
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


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("sql_wikisql", "sql_wikisql", {}),
        ("vision_nlvr", "vision_nlvr", {"meta": {"boxes": 3}}),
        ("tool_bfcl", "tool_bfcl", {"references": ["{oops"]}),
        ("tool_bfcl", "tool_bfcl", {"references": ["[1]"]}),
        ("rnnlg_styles", "gen_rnnlg", {"meta": {"domain": "zoo"}}),
        ("snips_forms", "json_snips", {"references": ["7"]}),
        ("snips_forms", "json_snips", {"references": []}),
    ],
)
def test_a_file_with_rows_of_another_kind_is_refused_by_name(tmp_path, name, file, row):
    rows = [{"id": i, "input": f"q{i}", "references": ["a"], **row} for i in range(2)]
    write(tmp_path, file, "dev", *rows)
    with pytest.raises(
        DataError, match=rf"{file}\.dev\.jsonl\.gz does not hold the rows of {name}"
    ):
        public(name, tmp_path, "dev")
