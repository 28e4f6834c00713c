import codecs
import gzip
import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bem.stats.files import load
from tests.stats.score_files import (
    IN_PLACE,
    TABLE,
    json_values,
    names_the_file,
    outcome,
    refusal,
    written,
)

ROWS = [
    {"id": "q1", "group": "d1", "em": 1, "f1": 0.5},
    {"id": "q2", "group": "d1", "em": 0, "f1": 0.25},
    {"id": "q3", "group": "d2", "em": 1, "f1": 1},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ";").replace("0.5", "0,5").replace("0.25", "0,25"),
        "sep=;\n" + TABLE.replace(",", ";"),
        TABLE.replace("\n", "\r"),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n") + "\n ,,, \n",
        TABLE.replace("\n", ",\n").replace("f1,", "f1"),  # a comma at every line's end
        TABLE.replace("id,", ' "id" , ')
        .replace("q1", ' "q1"')
        .replace(' "', '"')
        .replace('" ', '"'),
        "".join(f'"{cell}",' for cell in ("id", "group", "em"))[:-1] + ',"f1"' + TABLE[14:],
        TABLE.replace("id,group,em,f1", " ID , Cluster,EM, F1 "),
        TABLE.replace("q2", " q2 ").replace("0.25", " 0.25 "),
        TABLE.replace("0.5", "5e-1").replace(",1,", ",True,").replace(",0,", ",FALSE,"),
        codecs.BOM_UTF8 + TABLE.encode(),
        TABLE.encode("utf-16"),
        codecs.BOM_UTF16_BE + TABLE.encode("utf-16-be"),
        TABLE.replace(",", "\t").encode("utf-32"),
        gzip.compress(TABLE.encode(), mtime=0),
        LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"),
        "\n\n" + LINES + " \n",
        LINES.encode("utf-16"),
        LINES.replace("0.25", '"0.25"')
        .replace('"em": 1', '"em": "1"')
        .replace('"em": 0', '"em": false'),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        pd.DataFrame(ROWS).to_json(orient="split"),
        pd.DataFrame(ROWS).to_json(orient="records", lines=True),
        pd.DataFrame(ROWS).to_csv(),
        pd.DataFrame(ROWS).iloc[[0, 1, 2]].set_index(pd.Index([7, 3, 9])).to_csv(),
        pd.DataFrame(ROWS).to_csv(index=False, sep="\t"),
        pd.DataFrame(ROWS).reset_index().rename(columns={"index": "Unnamed: 0"}).to_csv(),
    ],
)
@pytest.mark.parametrize("name", ["s.csv", "s.jsonl", "s.json", "s.txt", "s.csv.gz", "s"])
def test_a_table_is_read_by_its_content_whatever_its_dialect_and_name(tmp_path, content, name):
    m = load(written(tmp_path, content, name))
    assert m.name == "s"
    assert m.example_ids == ("q1", "q2", "q3")
    assert m.clusters == ("d1", "d1", "d2")
    assert m.metrics["em"].tolist() == [[1, 0, 1]]
    assert m.metrics["f1"].tolist() == [[0.5, 0.25, 1]]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\u00e9", "\U0001f600"])
def test_a_separator_of_unicode_inside_text_ends_no_line(tmp_path, character):
    name = f"a{character}b"
    rows = [{"id": name, "em": 1}, {"id": "c", "em": 0}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert load(written(tmp_path, text, "a.jsonl")).example_ids == (name, "c")
    assert load(written(tmp_path, f"id,em\n{name},1\nc,0\n")).example_ids == (name, "c")


def test_text_in_quotes_may_hold_separators_quotes_and_line_ends(tmp_path):
    text = 'id,em\n"a,b",1\n"c\nd",0\n"e ""f""",1\r\n"g\r\nh",1\n'
    assert load(written(tmp_path, text)).example_ids == ("a,b", "c\nd", 'e "f"', "g\r\nh")


def test_a_field_may_be_long(tmp_path):
    assert load(written(tmp_path, "id,em\n" + "x" * 200_000 + ",1\n")).n == 1


def lm_eval_sample(number, score, **more):
    return {
        "doc_id": number,
        "doc": {"question": "?", "id": "x"},
        "target": "4",
        "arguments": [["Q: ?", {"until": ["\n"]}]],
        "resps": [["4"]],
        "filtered_resps": ["4"],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "doc_hash": "0f",
        "prompt_hash": "1f",
        "target_hash": "2f",
        "exact_match": score,
        **more,
    }


def test_samples_of_lm_eval_are_read_as_they_are(tmp_path):
    rows = [lm_eval_sample(i, score) for i, score in ((0, 1.0), (1, 0.0))]
    name = "samples_gsm8k_2026-01-05T10-00-00.123456.jsonl"
    m = load(written(tmp_path, "\n".join(map(json.dumps, rows)), name))
    assert m.name == "samples_gsm8k_2026-01-05T10-00-00.123456"
    assert (m.example_ids, list(m.metrics)) == (("0", "1"), ["exact_match"])
    assert m.metrics["exact_match"].tolist() == [[1, 0]]
    older = [{k: v for k, v in row.items() if k not in ("metrics", "filter")} for row in rows]
    again = load(written(tmp_path, json.dumps(older), "a.json"))
    assert again.metrics["exact_match"].tolist() == [[1, 0]]


def test_samples_of_two_filters_are_no_seeds(tmp_path):
    rows = [lm_eval_sample(i, 1.0, filter=f) for f in ("strict", "flexible") for i in range(2)]
    message = refusal(tmp_path, "\n".join(map(json.dumps, rows)), "a.jsonl")
    assert "2 filters (strict, flexible): keep the rows of one" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "em": 1}\n{"id": 2', "a.jsonl:2: not JSON"),
        ("[1]\n[2]\n", "a.jsonl:1 must be an object with an id, got [1]"),
        ("[1]", "a.jsonl, row 1 must be an object with an id, got 1"),
        ("[]", "a.jsonl has no rows"),
        ("{", "a.jsonl: not JSON"),
        ("{}", "is not a measurement"),
        ('{"results": {"arc": {"acc": 0.5}}}', "lm-eval: --log_samples). Averages are not enough"),
        ('{"em": {"0": 1}, "id": {"0": "q"}}', "column 'id' is {'0': 'q'}: text or a number is needed"),
        ('{"format": "bem-measurement-1", "nam": "x"}', "unknown fields ['nam']"),
        ('{"id": 1, "em": 1, "em": 0}\n', "a.jsonl: key 'em' stands twice in one object"),
        ('{"id":1,"em":1}\n{"id":2,"em":0,"cluster":"d","f1":1}\n', "a.jsonl:1 (id 1): column 'cluster' is missing, which a.jsonl:2 has"),
        ('{"id":1,"em":1,"seed":0}\n{"id":2,"em":0}\n', "a.jsonl:2 (id 2): column 'seed' is missing"),
        ('{"id":1,"em":1,"error":"x"}\n{"id":2,"em":0}\n', "leave one out with --ignore 'error'"),
        ('{"em":1}\n{"id":2,"em":0}\n', "a.jsonl:1: column 'id' is missing"),
        ('{"id":null,"em":1}', "column 'id' is missing"),
        ('{"id":true,"em":1}', "column 'id' is True: text or a number is needed"),
        ('{"id":NaN,"em":1}', "a.jsonl:1 (id nan): column 'id' is nan: every row needs one"),
        ('{"id":1e999,"em":1}', "a.jsonl:1 (id inf): column 'id' is inf: every row needs one"),
        ('{"id":"a","em":null}', "a.jsonl:1 (id 'a'): column 'em' is missing"),
        ('{"id":"a","em":NaN}', "column 'em' is nan: every row needs a finite score"),
        ('{"id":"a","loss":-Infinity}', "column 'loss' is -inf: every row needs a finite score"),
        ('{"id":"a","em":[1]}', "column 'em' is [1], not a number"),
        ('{"id":"a","loss":' + "9" * 400 + "}", "every row needs a finite score"),
        ('{"id":"a","loss":' + "9" * 5000 + "}", "not JSON"),
        ('{"id":"\\ud800","em":1}', "half a character (a surrogate)"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"columns":["id","em"],"data":[["q1"]]}', "a.jsonl, row 1 must be a list of 2 cells"),
    ],
)  # fmt: skip
def test_bad_json_is_refused_with_its_line_and_what_to_do(tmp_path, content, message):
    assert message in refusal(tmp_path, content, "a.jsonl")


@IN_PLACE
@given(
    st.lists(
        st.lists(st.sampled_from(["id", "em", "q1", "1", "0,5", '"', "\r", "\n", " ", "nan", "é"])),
        max_size=5,
    ),
    st.sampled_from([",", ";", "\t"]),
)
def test_any_table_is_read_or_refused(tmp_path, rows, delimiter):
    text = "id,em\n".replace(",", delimiter) + "\n".join(delimiter.join(row) for row in rows)
    assert names_the_file(outcome(tmp_path, text), "scores.csv")


@IN_PLACE
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["id", "em", "seed", "group", "x"]), json_values),
        max_size=4,
    )
)
def test_any_json_rows_are_read_or_refused(tmp_path, rows):
    for text in ("\n".join(map(json.dumps, rows)), json.dumps(rows)):
        assert names_the_file(outcome(tmp_path, text, "a.jsonl"), "a.jsonl")
