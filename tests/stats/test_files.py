import codecs
import contextlib
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bem.errors import DataError
from bem.stats.corpus import bleu_statistics
from bem.stats.files import FORMAT, from_dict, kind_of, load, save, to_dict
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.scores import Metric

IN_PLACE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def full():
    return Measurement(
        "v1",
        {"em": [[1, 0], [1, 1]], "acc": [0.5, float("nan")]},
        ["x", "y"],
        clusters=["d", "d"],
        slices={"A": [True, False]},
        corpus={"corpus_bleu": bleu_statistics(["a b", "c"], [["a b"], ["d"]])},
        declared={"acc": Metric(True, 100.0, range=(0, 1))},
        latency_ms={"decode": [1.0, 2.0]},
        memory_bytes=5,
        adapter_parameters=7,
        kv_hits=[1],
        kv_needed=[2],
        router=RouterFacts([1, 2], {"clean": np.array([1.0])}),
        meta={"seeds": [0, 1]},
    )


def written(folder, content, name="scores.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def outcome(folder, content, name="scores.csv"):
    """The measurement, or the refusal; any other error is raised."""
    try:
        return load(written(folder, content, name))
    except DataError as refused:
        return refused


def names_the_file(result, name):
    return isinstance(result, Measurement) or name in str(result)


def refusal(folder, content, name="a.csv", **options):
    with pytest.raises(DataError) as refused:
        load(written(folder, content, name), **options)
    assert str(folder / name) in str(refused.value)
    return str(refused.value).replace(f"{folder}/", "")


# --- our own JSON


@pytest.mark.parametrize("name", ["m.json", "m.json.gz", "m"])
def test_json_round_trips(tmp_path, name):
    m = full()
    again = load(save(m, tmp_path / name))
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(m))
    assert again.metrics["em"].shape == (2, 2)
    assert again.declared["acc"] == Metric(True, 100.0, range=(0.0, 1.0))
    assert again.adapter_flops_per_token is None
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing half-written is left


def test_the_same_measurement_is_the_same_bytes(tmp_path):
    one, two = save(full(), tmp_path / "a.json.gz"), save(full(), tmp_path / "b.json.gz")
    assert one.read_bytes() == two.read_bytes()


def test_a_bad_field_is_named_with_the_file():
    values = to_dict(full())
    values["metrics"]["em"] = [[1, 0, 1]]
    with pytest.raises(DataError, match=r"run/m.json: v1: metrics.em has shape"):
        from_dict(values, "run/m.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"em": ["1", "0"]}}, "metrics.em must be numbers, got str"),
        ({"metrics": {"em": [1, 10**400]}}, "metrics.em must be numbers"),
        ({"metrics": [1, 0]}, "metrics must map names to values"),
        ({"example_ids": "xy"}, "example_ids must be a list"),
        ({"example_ids": ["x", None]}, r"example_ids\[1\] is None"),
        ({"clusters": ["d", None]}, r"clusters\[1\] is None"),
        ({"slices": {"A": ["0", "1"]}}, "slices.A must be numbers"),
        ({"slices": {"A": [[1], [0, 1]]}}, "slices.A must be numbers"),
        ({"memory_bytes": "5 GB"}, "memory_bytes must be a number, got '5 GB'"),
        ({"declared": {"acc": {"higher_is_better": "no", "points_per_unit": 1}}}, "A metric is"),
        ({"declared": {"acc": {"higher_is_better": True, "points_per_unit": -1}}}, "positive"),
        ({"declared": {"acc": 5}}, "argument after"),
        ({"router": {"plan_lengths": "long"}}, "router.plan_lengths must be numbers"),
        ({"router": {"index_swap": [1]}}, "router.index_swap must map"),
        ({"router": {"facts": 1}}, "unexpected keyword"),
        ({"name": 5}, "name must be text"),
        ({"latency_ms": {"decode": [[1.0]]}}, "latency_ms.decode has shape"),
        ({"meta": 5}, "meta must map"),
        ({"nam": 5}, r"unknown fields \['nam'\]"),
    ],
)
def test_a_measurement_of_wrong_types_is_refused_with_the_field(change, message):
    with pytest.raises(DataError, match=message):
        from_dict({**to_dict(full()), **change})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(to_dict(full()))), json_values, max_size=3))
def test_a_measurement_with_any_fields_is_read_or_refused(change):
    with contextlib.suppress(DataError):
        from_dict({**to_dict(full()), **change, "format": FORMAT})


# --- tables that are read


def test_csv_with_seeds_clusters_slices_and_declared_metrics(tmp_path):
    m = load(
        written(
            tmp_path,
            "id,seed,cluster,em,acc2:higher:100,cost:lower,slice:hard\n"
            "x,0,d1,1,0.5,3,1\ny,0,d2,0,0.25,4,0\ny,1,d2,1,0.5,2,0\nx,1,d1,1,1,1,1\n",
        )
    )
    assert m.name == "scores"
    assert m.metrics["em"].tolist() == [[1, 0], [1, 1]]
    assert m.metrics["acc2"].tolist() == [[0.5, 0.25], [1.0, 0.5]]
    assert m.clusters == ("d1", "d2")
    assert m.slices["hard"].tolist() == [True, False]
    assert not m.metric("cost").higher_is_better


def test_jsonl_with_repeated_ids_as_seeds(tmp_path):
    rows = [{"id": i, "f1": f} for i, f in (("x", 0.1), ("y", 0.2), ("x", 0.3), ("y", 0.4))]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    m = load(written(tmp_path, packed, "scores.jsonl.gz"))
    assert m.metrics["f1"].tolist() == [[0.1, 0.2], [0.3, 0.4]]


TABLE = "id,group,em,f1\nq1,d1,1,0.5\nq2,d1,0,0.25\nq3,d2,1,1\n"
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
        gzip.compress(TABLE.encode()),
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


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.txt.gz"])
def test_our_json_is_read_whatever_its_name(tmp_path, name):
    save(full(), tmp_path / "m.json")
    again = load((tmp_path / "m.json").rename(tmp_path / name))
    assert json.dumps(to_dict(again)) == json.dumps(to_dict(full()))


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


@pytest.mark.parametrize("ids", ["1,2,3", "1.0,2.0,3.0", " 1 ,2,3"])
def test_ids_are_the_same_as_numbers_floats_and_text(tmp_path, ids):
    text = "id;em\n" + "".join(f"{i};1\n" for i in ids.split(","))
    lines = "".join(json.dumps({"id": i, "em": 1}) + "\n" for i in (1, 2.0, "3"))
    assert load(written(tmp_path, text)).example_ids == ("1", "2", "3")
    assert load(written(tmp_path, lines, "a.jsonl")).example_ids == ("1", "2", "3")


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


def test_columns_can_be_ignored_and_are_listed(tmp_path):
    table = "id,em,question,len\nq1,1,why?,4\nq2,0,how?,4\n"
    m = load(written(tmp_path, table), ignore=["question", "len", "absent"])
    assert (list(m.metrics), m.meta) == (["em"], {"ignored": ["question", "len"]})
    save(full(), tmp_path / "m.json")
    n = load(tmp_path / "m.json", ignore=["acc", "slice:A", "corpus_bleu"])
    assert (list(n.metrics), n.slices, n.corpus) == (["em"], {}, {})
    assert n.meta["ignored"] == ["acc", "corpus_bleu", "slice:A"]


def test_what_the_caller_declares_needs_no_word_in_the_header(tmp_path):
    m = load(written(tmp_path, "id,rouge\nx,0.5\n"), declared={"rouge": Metric(True, 100.0)})
    assert m.metric("rouge").points_per_unit == 100.0


def test_a_name_may_hold_a_colon(tmp_path):
    m = load(written(tmp_path, "id,exact:strict:higher:100\nx,0.5\n"))
    assert m.metric("exact:strict").points_per_unit == 100.0


# --- tables that are refused, with the line, the id and what to do


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.csv is empty: it has no rows"),
        ("\n \n", "a.csv is empty: it has no rows"),
        ("id,em\n", "a.csv has no rows"),
        ("key,em\nx,1\n", "a.csv has no column id; it has: key, em. Every row needs the id"),
        ("id em\nx 1\n", "no column id; it has: id em"),
        (",em\n0,1\n1,0\n", "taken for row numbers: if it is the id, name it id"),
        (",id,em\nx,q1,1\n", "a.csv:2: a column without a name ('Unnamed: 0' to pandas) holds 'x'. Name"),
        ("id,em\nx,1\ny,one\n", "a.csv:3 (id 'y'): column 'em' is 'one', not a number"),
        ("id,em\nx,\n", "a.csv:2 (id 'x'): column 'em' is missing: every row needs a finite score. Score"),
        ("id,em\nx,nan\n", "a.csv:2 (id 'x'): column 'em' is nan: every row needs a finite score"),
        ("id,loss\nx,inf\n", "column 'loss' is 'inf', not a number"),
        ("id,loss\nx,1e999\n", "column 'loss' is 1e999: every row needs a finite score"),
        ("id,loss\nx,1_000\n", "column 'loss' is '1_000', not a number"),
        ("id,em\nx,1 %\n", "column 'em' is '1 %', not a number"),
        ("id,em\n,1\n", "a.csv:2 (id ''): column 'id' is missing"),
        ("id,em,cluster\nx,1,d\ny,1,\n", "a.csv:3 (id 'y'): column 'cluster' is missing"),
        ("id,accuracy\nx,1\n", "column 'accuracy' is no metric I know (em, f1"),
        ("id,accuracy\nx,1\n", "Say which way is better: 'accuracy:higher'"),
        ("id,em,answer\nx,1,\ny,1,Paris\n", "a.csv:3 (id 'y'): column 'answer' holds 'Paris', which is no score: leave it out (--ignore 'answer')"),
        ("id,em,a,b\nx,1,u,v\n", "(--ignore 'a' --ignore 'b')"),
        ("id,acc2:up\nx,1\n", "column 'acc2:up' must look like 'name:higher:100'"),
        ("id,acc2:higher:0\nx,1\n", "'0' are no points: points_per_unit must be a positive number"),
        ("id,acc2:higher:ten\nx,1\n", "'ten' are no points"),
        ("id,group\nx,1\n", "a.csv has no metric; its columns are id, group"),
        ("id,em,em\nq1,1,0\n", "a.csv: column 'em' stands twice: delete or rename one"),
        ("id,em,EM\nq1,1,0\n", "two columns are both 'em'"),
        ("id,em,em:higher:100\nq1,1,0\n", "metric 'em' stands in 2 columns"),
        ("id,em,group,cluster\nq1,1,0,0\n", "has both cluster and group: leave one out"),
        ("id,doc_id,em\nq1,1,0\n", "has both id and doc_id: leave one out"),
        ("id,em\nx,1\ny,1\nx,0\n", "a.csv:4: id 'x' stands in 2 rows (first in a.csv:2), most ids in 1"),
        ("id,em\nx,1\ny,1\nx,0\ny,1\nz,0\n", "a.csv:6: id 'z' stands in 1 rows"),
        ("id,seed,em\nx,0,1\nx,0,1\n", "a.csv:3: id 'x' appears twice in seed 0, first in a.csv:2"),
        ("id,seed,em\nx,0,1\ny,0,1\nx,1,1\n", "seed 1 does not hold the examples of seed 0: id 'y'"),
        ("id,seed,em,group\nq1,0,1,A\nq2,0,0,B\nq1,1,1,B\nq2,1,0,B\n", "a.csv:4: id 'q1' is in cluster 'B', but in 'A' in a.csv:2"),
        ("id,seed,em,slice:x\nq1,0,1,1\nq1,1,1,0\n", "a.csv:3: id 'q1' is in other slices than in a.csv:2"),
        ("id,em,slice:x\nq1,1,0.5\n", "column 'slice:x' is '0.5'; a slice holds an example (1) or not (0)"),
        ("id,em,slice:\nq1,1,1\n", "column 'slice:' must look like"),
        ("id,em\nx,1,2\n", "a.csv:2 has 3 cells, the header 2 (separated by ',')"),
        ("id,em,f1\nx,1\n", "a.csv:2 has 2 cells, the header 3"),
        ("id,f1\nx,0,5\n", "A decimal comma, or a separator inside text, needs quotes"),
        ('id,em\n"x,1\ny,0\n', "a.csv:2: unexpected end of data. A quoted cell begins and ends"),
        ('id,em\n"x"y,1\n', "a.csv:2: ',' expected after"),
        ("id;f1\nx;0,5\ny;0.5\n", "a.csv:2 has '0,5' and a.csv:3 has '0.5': write every number with a decimal point"),
        ("id;loss\nx;1,250\n", "a.csv:2: is '1,250' 1.250 or 1250? Write decimal points"),
        ("id;loss\nx;1,250,000\n", "column 'loss' is '1,250,000', not a number"),
        ("id,em\nx,100\ny,0\n", "a.csv:2 (id 'x'): column 'em' is '100'; em lies in 0 to 1 (100 points in one unit): is it in percent? Divide by 100"),
        ("id,f1\nx,-0.1\n", "f1 lies in 0 to 1"),
        ("id,bleu\nx,100.5\n", "bleu lies in 0 to 100"),
        ("id,acc2:higher:100\nx,87.5\n", "acc2 lies in -2 to 2 (100 points in one unit): is it in percent?"),
        ("id,em\nx\0,1\n", "a.csv:2 holds a NUL character"),
        (TABLE.encode("utf-16-le"), "a.csv:1 holds a NUL character: this is no text. Save it as UTF-8"),
        ("id,em\né,1\n".encode("cp1252"), "a.csv:2 is not UTF-8 text (byte 0xe9). Save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"i\0d\0,", "a.csv:1 is not UTF-16 text"),
        (b"PK\x03\x04....", "is an Excel workbook or a zip archive, not text. Export it as CSV"),
        (b"PAR1....", "is a Parquet file"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_with_its_place_and_what_to_do(tmp_path, content, message):
    assert message in refusal(tmp_path, content)


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


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.json is missing"):
        load(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load(tmp_path)
    packed = bytearray(gzip.compress(b"id,em\n" + b"".join(b"q%d,1\n" % i for i in range(500))))
    packed[12] ^= 255
    packed[13] ^= 255
    assert "cannot be read" in refusal(tmp_path, bytes(packed), "z.csv.gz")
    assert "cannot be read" in refusal(tmp_path, gzip.compress(TABLE.encode())[:-9], "z.csv.gz")


@IN_PLACE
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"\x1f\x8b\x08\x00")
@example(b'"sep=\r')
@example(b"sep=,\r\n")
def test_any_bytes_are_a_table_or_refused(tmp_path, content):
    for name in ("a.csv", "a.json.gz"):
        assert names_the_file(outcome(tmp_path, content, name), name)


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


# --- tables that are written


names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
labels = names.map(str.strip).filter(bool)


@st.composite
def measurements(draw):
    ids = draw(st.lists(labels, min_size=1, max_size=5, unique=True))
    n, seeds = len(ids), draw(st.integers(1, 3))
    table = lambda values: draw(  # noqa: E731
        st.lists(st.lists(values, min_size=n, max_size=n), min_size=seeds, max_size=seeds)
    )
    return Measurement(
        "arm",
        {"em": table(st.floats(0, 1)), "cost": table(st.floats(-1e300, 1e300))},
        ids,
        clusters=draw(st.none() | st.lists(labels, min_size=n, max_size=n)),
        slices=draw(
            st.dictionaries(labels, st.lists(st.booleans(), min_size=n, max_size=n), max_size=2)
        ),
        declared={"cost": Metric(False, draw(st.none() | st.just(1e-303)))},
    )


@IN_PLACE
@given(
    measurements(), st.sampled_from(["arm.csv", "arm.tsv", "arm.jsonl", "arm.csv.gz", "arm.json"])
)
def test_scores_come_back_from_every_format(tmp_path, measurement, name):
    again = load(save(measurement, tmp_path / name))
    ids = [i.removesuffix(".0") for i in measurement.example_ids]  # 1.0, 2.0: pandas' ids
    assert [i.removesuffix(".0") for i in again.example_ids] == ids
    assert again.clusters == measurement.clusters
    assert again.declared == measurement.declared
    for key, scores in measurement.metrics.items():
        assert again.metrics[key].tolist() == scores.tolist()
    for key, members in measurement.slices.items():
        assert again.slices[key].tolist() == members.tolist()


def test_a_file_is_what_its_suffix_says(tmp_path):
    m = Measurement("m", {"em": [1, 0]}, ["a", "b"])
    assert save(m, tmp_path / "m.csv").read_text() == "id,em\na,1.0\nb,0.0\n"
    assert save(m, tmp_path / "m.tsv").read_text() == "id\tem\na\t1.0\nb\t0.0\n"
    assert json.loads(save(m, tmp_path / "m.jsonl").read_text().splitlines()[1]) == {
        "id": "b",
        "em": 0.0,
    }
    assert json.loads(save(m, tmp_path / "m.json").read_text())["format"] == FORMAT
    with pytest.raises(
        DataError, match=r"m.xlsx: scores are written as .json, .jsonl, .csv or .tsv"
    ):
        kind_of(tmp_path / "m.xlsx")
    with pytest.raises(DataError, match=r"corpus_bleu has no score per example: save as .json"):
        save(full(), tmp_path / "full.csv")
